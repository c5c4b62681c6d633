"""Checks of a Ray cluster: each node measures itself, and neighbours their network. The slow one is named."""

import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from vila_ops.cluster import connect, device_on, gpu_options
from vila_ops.config import Resources
from vila_ops.doctor.finding import Finding
from vila_ops.doctor.node import MESSAGE_BYTES, PACKAGES, NodeProbe, NodeReport
from vila_ops.train.ray_workers import network_variables

PATIENCE_SECONDS = 120.0
"""How long a node may take to answer."""
CLOCK_SECONDS = 1.0
"""How far the clock of a node may be from that of this machine. Windows of schedules and ages of files are compared."""
SLOW = 0.5
"""A node is slow that is slower than this share of the median of the others."""
MEASURES = {
    "multiply": ("matrix products", 1e9, "Gflop/s", "look for other programs, and for throttling by heat or power"),
    "wrote": ("writing into the store", 1e6, "MB/s", "look at its disk, or at its route to the store"),
    "read": ("reading from the store", 1e6, "MB/s", "look at its disk, or at its route to the store"),
    "network": ("sending to its neighbours", 1e6, "MB/s", "look at its network card, cable and switch port"),
}
"""What is compared between nodes: its name, unit, and what to do about a slow node."""


def examine_cluster(resources: Resources) -> list[Finding]:
    """All checks of the cluster of the resources. Raises ClusterUnreachable, and ValueError with launch inline."""
    if resources.launch == "inline":
        raise ValueError("launch is inline, which has no cluster; give resources with launch ray or ray_job (-r FILE)")
    connect(resources)
    device = device_on(resources, resources.device)
    there = {one["NodeID"]: one["NodeManagerAddress"] for one in ray.nodes() if one["Alive"]}  # type: ignore[no-untyped-call]
    options = {
        "num_cpus": 0,
        **gpu_options(resources, device),
        "runtime_env": {"env_vars": network_variables(resources)},
    }
    actor = ray.remote(NodeProbe)
    nodes: dict[str, Any] = {
        f"{address} ({node[:8]})": actor.options(
            **options, scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)
        ).remote(resources.storage.store)
        for node, address in there.items()
    }
    try:
        return list(_examined(nodes, list(there.values())))
    finally:
        for node in nodes.values():
            ray.kill(node)


def _examined(nodes: dict[str, Any], addresses: Sequence[str]) -> Iterator[Finding]:
    answers, reports = {name: node.measure.remote() for name, node in nodes.items()}, {}
    ray.wait(list(answers.values()), num_returns=len(answers), timeout=PATIENCE_SECONDS)
    for name, answer in answers.items():
        try:
            reports[name] = ray.get(answer, timeout=0)
        except GetTimeoutError:
            way = "if all its GPUs are in use, wait for them, else look at `ray status`"
            yield Finding(ok=False, text=f"node {name} did not answer within {PATIENCE_SECONDS:.0f} s; {way}")
        except RayError as error:
            yield Finding(ok=False, text=f"node {name}: {getattr(error, 'cause', None) or error}")
    clocks = {name: _offset(nodes[name]) for name in reports}
    for name, report in reports.items():
        yield Finding(ok=True, text=f"node {name}: {_told(report)}; clock {clocks[name][0]:+.3f} s")
    yield from clock_findings(clocks)
    yield from version_findings(reports)
    speeds = {
        name: {"multiply": report.multiply, "wrote": report.wrote, "read": report.read}
        for name, report in reports.items()
    }
    if len(nodes) > 1 and len(reports) == len(nodes):
        links, bus = _network(list(nodes.values()), addresses)
        message = f"{MESSAGE_BYTES / 2**20:.0f} MiB"
        yield Finding(ok=True, text=f"all-reduce of {message} between {len(nodes)} nodes: bus {bus / 1e6:.0f} MB/s")
        for number, name in enumerate(nodes):
            speeds[name]["network"] = max(links[number], links[number - 1])
    yield from slow_nodes(speeds)


def _network(nodes: Sequence[Any], addresses: Sequence[str]) -> tuple[list[float], float]:
    """Bytes a second between each node and the next one, the last and the first too; and of an all-reduce."""
    size = len(nodes)
    meeting = ray.get(nodes[0].rendezvous.remote(addresses[0]), timeout=PATIENCE_SECONDS)
    ray.get([node.join.remote(meeting, rank, size) for rank, node in enumerate(nodes)], timeout=PATIENCE_SECONDS)
    links = []
    for rank, node in enumerate(nodes):
        other = (rank + 1) % size
        pair = [node.exchange.remote(other, first=True), nodes[other].exchange.remote(rank, first=False)]
        links.append(min(ray.get(pair, timeout=PATIENCE_SECONDS)))
    bus = min(ray.get([node.all_reduce.remote() for node in nodes], timeout=PATIENCE_SECONDS))
    return links, bus


def _offset(node: Any) -> tuple[float, float]:
    """Seconds by which the clock of a node is ahead of this one, and half of the time that asking took."""
    started = time.time()
    there: float = ray.get(node.clock.remote(), timeout=PATIENCE_SECONDS)
    ended = time.time()
    return there - (started + ended) / 2, (ended - started) / 2


def clock_findings(clocks: Mapping[str, tuple[float, float]]) -> Iterator[Finding]:
    """The nodes whose clocks are certainly too far from this machine's; offset and its uncertainty by node."""
    for name, (offset, uncertain) in clocks.items():
        if abs(offset) - uncertain > CLOCK_SECONDS:
            text = f"node {name}: its clock is {offset:+.1f} s from this machine's; synchronise it (chrony, timesyncd)"
            yield Finding(ok=False, text=text)


def version_findings(reports: Mapping[str, NodeReport]) -> Iterator[Finding]:
    """One finding for each package of which nodes have several versions."""
    for package in PACKAGES:
        versions = {name: report.packages[package] for name, report in reports.items()}
        if len(set(versions.values())) > 1:
            there = ", ".join(f"{version} on {name}" for name, version in sorted(versions.items()))
            yield Finding(ok=False, text=f"{package} has several versions, {there}; use one image on all nodes")


def slow_nodes(speeds: Mapping[str, Mapping[str, float]]) -> Iterator[Finding]:
    """The nodes that are slow by one of the measures, which are given by node."""
    for name, own in speeds.items():
        for measure, value in own.items():
            others = [one[measure] for other, one in speeds.items() if other != name and measure in one]
            if others and value < SLOW * (median := statistics.median(others)):
                what, unit, unit_name, way = MEASURES[measure]
                yield Finding(
                    ok=False,
                    text=f"node {name} is slow: {what} {value / unit:.0f} {unit_name}, the median of the others is "
                    f"{median / unit:.0f}; {way}",
                )


def _told(report: NodeReport) -> str:
    return (
        f"{report.host}, {report.device}; {report.multiply / 1e9:.0f} Gflop/s; store: writes {report.wrote / 1e6:.0f} "
        f"and reads {report.read / 1e6:.0f} MB/s"
    )
