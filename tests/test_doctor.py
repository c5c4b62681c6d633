"""Findings about software, a store and the nodes of a cluster; a real cluster is examined in faults/test_nodes.py."""

import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from packaging.version import Version
from ray.exceptions import GetTimeoutError
from typer.testing import CliRunner

from vila_ops import doctor
from vila_ops.artifacts.store import throughput
from vila_ops.cli import app
from vila_ops.cluster import ACCELERATOR_TYPE
from vila_ops.config import Resources
from vila_ops.config.local import LocalServers
from vila_ops.doctor import cluster
from vila_ops.doctor.cluster import clock_findings, examined, has_device, slow_nodes, version_findings
from vila_ops.doctor.finding import Finding
from vila_ops.doctor.node import PACKAGES, NodeReport
from vila_ops.doctor.services import services, serving
from vila_ops.doctor.software import needs, packages
from vila_ops.errors import DiskFault, StoreRefused

FIXED = {"ray": "2.54", "mlflow": "3.11", "prefect": "3.6.22", "torch": "2.6"}
"""First versions without CVE-2026-27482; 2025-14279, 2026-2614 and 2026-4137; 2026-7722 and 2026-3514; 2025-32434."""


@pytest.mark.parametrize("name", FIXED)
def test_no_version_before_a_security_fix_is_accepted(name: str) -> None:
    version = Version(FIXED[name])
    before = f"{version.major}.{version.minor - 1}.9" if version.micro == 0 else f"3.6.{version.micro - 1}"
    wanted = needs()[name]
    assert not wanted.contains(before)
    (finding,) = packages({name: before})
    assert not finding.ok
    assert finding.text.startswith(f"{name} {before}; {wanted} is needed; install it by `pip install '{name}")


def test_the_installed_versions_are_those_that_are_needed_and_a_missing_one_is_named() -> None:
    (finding,) = packages({"ray": "2.60.0", "fastapi": "0.150.0"})
    assert finding.ok
    (too_new, missing) = packages({"ray": "2.60.0", "fastapi": "0.155.0", "dvc": None})
    assert too_new.text.startswith("fastapi 0.155.0; <0.151,>=0.139 is needed")
    assert missing.text.startswith("dvc is missing; ")


def test_beside_vllm_an_older_transformers_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """The advice to install a newer one would break vLLM."""
    for there, ok in ((None, False), (object(), True)):
        monkeypatch.setattr("vila_ops.doctor.software.find_spec", lambda _, there=there: there)
        assert [finding.ok for finding in packages({"transformers": "5.19.0"})] == [ok]


def test_a_missing_vllm_is_told_where_the_resources_ask_for_it(
    tmp_path: Path, make_resources: Callable[..., Resources], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vila_ops.generate.load.find_spec", lambda _: None)

    def lacks(look: Callable[[Resources], Iterator[Finding]], setting: str, kind: str) -> list[str]:
        findings = look(make_resources(tmp_path, **{setting: {"kind": kind}}))
        return [finding.text.partition(", which")[0] for finding in findings if not finding.ok]

    assert lacks(services, "evaluate.engine", "vllm") == ["the engine vllm needs vLLM"]
    assert lacks(serving, "serve.engine", "vllm") == ["the engine vllm needs vLLM"]
    assert lacks(services, "serve.engine", "vllm") == [], "an evaluation serves nothing"
    assert lacks(serving, "evaluate.engine", "vllm") == []
    assert lacks(serving, "serve.engine", "auto") == []


def test_a_store_tells_its_throughput_and_keeps_nothing_of_the_measurement(store: str, tmp_path: Path) -> None:
    wrote, read = throughput(store)
    assert wrote > 0
    assert read > 0
    assert not [path for path in tmp_path.rglob("*") if ".probe" in str(path)]


def test_a_disk_without_space_for_the_measurement_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vila_ops.artifacts.disk_faults.free_bytes", lambda _: 2**20)
    with pytest.raises(DiskFault, match="needs 33554432 bytes, and its disk has 1048576 bytes free"):
        throughput(str(tmp_path))


def test_a_store_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoreRefused, match="cannot be written"):
        throughput(str(tmp_path / "file/store"))


def test_a_node_is_slow_below_half_of_the_median_of_the_others() -> None:
    fast = {"multiply": 100e9, "wrote": 500e6, "read": 1e9, "network": 1e9}
    nodes = {"a": fast, "b": {**fast, "wrote": 251e6}, "c": {**fast, "wrote": 20e6, "network": 0.4e9}, "d": fast}
    told = [finding.text for finding in slow_nodes(nodes)]
    assert [text.partition(";")[0] for text in told] == [
        "node c is slow: writing into the store 20 MB/s, the median of the others is 500",
        "node c is slow: sending to its neighbours 400 MB/s, the median of the others is 1000",
    ]
    assert not any(finding.ok for finding in slow_nodes(nodes))
    assert not list(slow_nodes({"a": fast}))
    assert not list(slow_nodes({"a": fast, "b": {key: value for key, value in fast.items() if key != "network"}}))


def test_a_clock_is_wrong_only_where_the_time_that_asking_took_leaves_no_doubt() -> None:
    clocks = {"a": (0.2, 0.001), "b": (3.0, 2.5), "c": (-1.5, 0.1), "d": (90.0, 1.0)}
    told = [finding.text.partition(" from")[0] for finding in clock_findings(clocks)]
    assert told == ["node c: its clock is -1.5 s", "node d: its clock is +90.0 s"]


def test_nodes_with_another_version_are_named() -> None:
    versions = dict.fromkeys(PACKAGES, "1.0")
    speeds = {"multiply": 1.0, "wrote": 1.0, "read": 1.0}
    one = NodeReport(host="one", packages=versions, device="cpu", **speeds)
    two = NodeReport(host="two", packages={**versions, "torch": "1.1"}, device="cpu", **speeds)
    assert not list(version_findings({"a": one, "b": one}))
    (finding,) = version_findings({"a": one, "b": two})
    assert finding.text == "torch has several versions, 1.0 on a, 1.1 on b; use one image on all nodes"


def test_where_workers_get_a_gpu_only_nodes_with_such_a_gpu_are_measured() -> None:
    cpu: dict[str, Any] = {"Resources": {"CPU": 8.0}, "Labels": {}}
    gpu = {"Resources": {"GPU": 8.0}, "Labels": {ACCELERATOR_TYPE: "H100"}}
    h100, a100 = {ACCELERATOR_TYPE: "H100"}, {ACCELERATOR_TYPE: "A100"}
    assert [has_device(one, "cpu", {}) for one in (cpu, gpu)] == [True, True]
    assert [has_device(one, "cuda", {}) for one in (cpu, gpu)] == [False, True]
    assert [has_device(gpu, "cuda", label) for label in (h100, a100)] == [True, False]


NEVER = {"clock": "b", "rendezvous": "a", "join": "c", "exchange": "b", "all_reduce": "c"}
"""A node that does not answer, by what it is asked."""


@pytest.mark.parametrize("asked", NEVER)
def test_a_node_that_stops_answering_is_named_and_loses_no_other_finding(
    asked: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    versions, speeds = dict.fromkeys(PACKAGES, "1.0"), {"multiply": 100e9, "wrote": 1.0, "read": 1.0}
    report = NodeReport(host="h", packages=versions, device="cpu", **speeds)
    answers: dict[str, Any] = {"rendezvous": "tcp://a:1", "join": None, "exchange": 1e9, "all_reduce": 1e9}

    def node(name: str) -> Any:
        own = report.with_changes({"multiply": 1e9}) if name == "c" else report

        def answer(question: str) -> Any:
            if (question, name) == (asked, NEVER[asked]):
                raise GetTimeoutError
            return {**answers, "measure": own, "clock": time.time()}[question]

        def ask(question: str) -> SimpleNamespace:
            return SimpleNamespace(remote=lambda *_, **__: lambda: answer(question))

        return SimpleNamespace(**{question: ask(question) for question in ("measure", "clock", *answers)})

    def get(answer: Callable[[], Any], timeout: float) -> Any:
        assert timeout == 0, "what did not answer in time is not waited for again"
        return answer()

    monkeypatch.setattr("vila_ops.doctor.cluster.ray", SimpleNamespace(wait=lambda *_, **__: None, get=get))
    told = list(examined({name: node(name) for name in "abc"}, ["1", "2", "3"]))
    (silent,) = [finding.text for finding in told if "did not answer within 120 s" in finding.text]
    assert silent.startswith("node b with a" if asked == "exchange" else f"node {NEVER[asked]} ")
    assert len([finding for finding in told if finding.text.startswith(("node a: h", "node b: h", "node c: h"))]) == 3
    assert told[-1].text.startswith("node c is slow: matrix products 1 Gflop/s")


@pytest.mark.parametrize("options", [(), ("--cluster",)])
def test_the_ray_of_this_machines_servers_is_asked_with_its_token(
    options: tuple[str, ...],
    tmp_path: Path,
    free_servers: Callable[[Path], LocalServers],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As every command that works on the cluster does."""
    servers, asked = free_servers(tmp_path), list[str | None]()
    (tmp_path / "ray.token").write_text("1f")
    (tmp_path / "local.yaml").write_text(json.dumps(servers.model_dump(mode="json")))
    (tmp_path / "r.yaml").write_text(f"{{launch: ray, ray_address: '127.0.0.1:{servers.ray_port}'}}")
    monkeypatch.setattr(os, "environ", {**os.environ})  # join changes it
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)

    def examine(*_: object) -> list[doctor.Finding]:
        asked.append(os.environ.get("RAY_AUTH_TOKEN_PATH"))
        return []

    monkeypatch.setattr(doctor, "examine", examine)
    monkeypatch.setattr(cluster, "examine_cluster", examine)
    command = ["doctor", "-r", str(tmp_path / "r.yaml"), "--servers", str(tmp_path / "local.yaml"), *options]
    done = CliRunner().invoke(app, command)
    assert (done.exit_code, asked) == (0, [str(tmp_path / "ray.token")]), done.output
