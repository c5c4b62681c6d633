"""Checks of a Ray cluster: each node measures itself, and neighbours their network. The slow one is named."""

import statistics
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from vila_ops.artifacts.store import root_of
from vila_ops.cluster import device_on, gpu_label, gpu_options, live_nodes
from vila_ops.config import Resources
from vila_ops.doctor.finding import Finding
from vila_ops.doctor.node import MESSAGE_BYTES, PACKAGES, NodeProbe, NodeReport
from vila_ops.train.ray_workers import network_variables

PATIENCE_SECONDS = 120.0
"""How long a node may take to answer."""
WAIT_OR_LOOK = "if all its GPUs are in use, wait for them, else look at `ray status`"
OPEN_PORTS = "look at its network interface, and open all ports between the nodes"
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
    alive = live_nodes(resources)
    device = device_on(resources, resources.device)
    measured = [one for one in alive if has_device(one, device, gpu_label(resources, device))]
    options = {
        "num_cpus": 0,
        **gpu_options(resources, device),
        "runtime_env": {"env_vars": network_variables(resources)},
    }
    actor = ray.remote(NodeProbe)
    nodes: dict[str, Any] = {
        _name(one): actor.options(
            **options, scheduling_strategy=NodeAffinitySchedulingStrategy(one["NodeID"], soft=False)
        ).remote(root_of(resources.storage.store))
        for one in measured
    }
    others = [
        Finding(ok=True, text=f"node {_name(one)} is not measured: it has no GPU for workers")
        for one in alive
        if one not in measured
    ]
    try:
        return [*others, *examined(nodes, [one["NodeManagerAddress"] for one in measured])]
    finally:
        for node in nodes.values():
            ray.kill(node)


def has_device(node: Mapping[str, Any], device: str, label: Mapping[str, str]) -> bool:
    """Whether a worker on a device can be placed on a node, as `ray.nodes` describes it, by a label of its GPUs."""
    return device == "cpu" or (node["Resources"].get("GPU", 0.0) >= 1 and label.items() <= node["Labels"].items())


def _name(node: Mapping[str, Any]) -> str:
    return f"{node['NodeManagerAddress']} ({node['NodeID'][:8]})"


def examined(nodes: Mapping[str, Any], addresses: Sequence[str]) -> Iterator[Finding]:
    """What actors on nodes measure; one that does not answer is told and left out."""
    reports = yield from _answers({name: node.measure.remote() for name, node in nodes.items()}, WAIT_OR_LOOK)
    clocks: dict[str, tuple[float, float]] = {}  # seconds ahead of this machine's, and half of the time of asking
    for name in reports:
        started = time.time()
        there = yield from _answers({name: nodes[name].clock.remote()}, WAIT_OR_LOOK)
        ended = time.time()
        if name in there:
            clocks[name] = there[name] - (started + ended) / 2, (ended - started) / 2
    for name, report in reports.items():
        clock = f"; clock {clocks[name][0]:+.3f} s" if name in clocks else ""
        yield Finding(ok=True, text=f"node {name}: {_told(report)}{clock}")
    yield from clock_findings(clocks)
    yield from version_findings(reports)
    speeds = {
        name: {"multiply": report.multiply, "wrote": report.wrote, "read": report.read}
        for name, report in reports.items()
    }
    if len(nodes) > 1 and len(reports) == len(clocks) == len(nodes):
        links = yield from _network(nodes, addresses)
        for number, name in enumerate(nodes if links else ()):
            speeds[name]["network"] = max(links[number], links[number - 1])
    yield from slow_nodes(speeds)


def _answers(asked: Mapping[str, Any], way_out: str) -> Generator[Finding, None, dict[str, Any]]:
    """What nodes answer within PATIENCE_SECONDS, by name; a finding for each that does not, or answers by an error."""
    answers = {}
    ray.wait(list(asked.values()), num_returns=len(asked), timeout=PATIENCE_SECONDS)
    for name, answer in asked.items():
        try:
            answers[name] = ray.get(answer, timeout=0)
        except GetTimeoutError:
            yield Finding(ok=False, text=f"node {name} did not answer within {PATIENCE_SECONDS:.0f} s; {way_out}")
        except RayError as error:
            yield Finding(ok=False, text=f"node {name}: {getattr(error, 'cause', None) or error}")
    return answers


def _network(nodes: Mapping[str, Any], addresses: Sequence[str]) -> Generator[Finding, None, list[float]]:
    """Bytes a second between each node and the next one, the last and the first too; and of an all-reduce.

    No numbers where nodes do not reach each other: a node that waits for another one answers nothing more.
    """
    names, probes, size = list(nodes), list(nodes.values()), len(nodes)
    meeting = yield from _answers({names[0]: probes[0].rendezvous.remote(addresses[0])}, OPEN_PORTS)
    if not meeting:
        return []
    (place,) = meeting.values()
    asked = {name: node.join.remote(place, rank, size) for rank, (name, node) in enumerate(nodes.items())}
    joined = yield from _answers(asked, OPEN_PORTS)
    if len(joined) < size:
        return []
    links: list[float] = []
    for rank, name in enumerate(names):
        other = (rank + 1) % size
        pair = {
            f"{name} with {names[other]}": probes[rank].exchange.remote(other, first=True),
            f"{names[other]} with {name}": probes[other].exchange.remote(rank, first=False),
        }
        passed = yield from _answers(pair, OPEN_PORTS)
        if len(passed) < len(pair):
            return []
        links.append(min(passed.values()))
    buses = yield from _answers({name: node.all_reduce.remote() for name, node in nodes.items()}, OPEN_PORTS)
    if len(buses) == size:
        message, bus = f"{MESSAGE_BYTES / 2**20:.0f} MiB", min(buses.values()) / 1e6
        yield Finding(ok=True, text=f"all-reduce of {message} between {size} nodes: bus {bus:.0f} MB/s")
    return links


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
