"""Prepare as Ray Data tasks on two nodes: two raylets on this machine, with workers of their own."""

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import ray

from tests.ray_head import end_node
from vila_ops.artifacts.store import read_manifest, verify
from vila_ops.cluster import connect
from vila_ops.config import Mixture, Resources
from vila_ops.data.preprocess.prepare import prepare

pytestmark = [pytest.mark.ray, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
RAY = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--num-cpus", "2", "--disable-usage-stats"]
OPTIONS = ["--node-ip-address", "127.0.0.1", "--object-store-memory", "100000000"]
OPTIONS += ["--min-worker-port", "0", "--max-worker-port", "0"]


@contextmanager
def node(*arguments: str) -> Iterator[None]:
    """A Ray node of this test, ended by its own processes' ids."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    started = [*RAY, *OPTIONS, *arguments]
    process = subprocess.Popen(started, env=env, cwd=tempfile.gettempdir(), stdout=subprocess.DEVNULL)
    try:
        yield
    finally:
        end_node(process)


@pytest.fixture
def two_nodes(free_ports: Callable[[int], list[int]]) -> Iterator[str]:
    """The address of a cluster of two nodes."""
    ports = free_ports(7)
    address = f"127.0.0.1:{ports[0]}"
    names = ("port", "ray-client-server-port", "dashboard-agent-listen-port", "metrics-export-port")
    head = [text for name, port in zip(names, ports, strict=False) for text in (f"--{name}", str(port))]
    other = ["--dashboard-agent-listen-port", str(ports[4]), "--metrics-export-port", str(ports[5])]
    with ExitStack() as stack:
        folders = [stack.enter_context(tempfile.TemporaryDirectory(prefix="ray-t")) for _ in range(2)]
        stack.enter_context(node("--head", "--include-dashboard", "false", *head, "--temp-dir", folders[0]))
        _wait(lambda: _listens(ports[0]))
        connect(Resources(launch="ray", ray_address=address))
        stack.enter_context(node("--address", address, *other))
        _wait(lambda: sum(one["Alive"] for one in ray.nodes()) == 2)
        yield address
        ray.shutdown()  # a driver that is still connected is ended with its cluster


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _wait(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 1200
    while not is_so():
        assert time.monotonic() < deadline, "no cluster of two nodes within 1200 s"
        time.sleep(0.2)


def test_two_nodes_make_the_dataset_of_one_process_and_refuse_what_it_refuses(
    two_nodes: str,
    make_mixture: Any,
    make_text: Any,
    make_resources: Callable[..., Resources],
    tiny: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All places are relative to the driver's working directory, which is not that of the nodes."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "raw").symlink_to(tiny)
    told = make_mixture("pairs", "documents", "instructions", shard_bytes=40_000).model_dump()
    relative = {name: {**source, "path": f"raw/{name}"} for name, source in told["sources"].items()}
    asked = Mixture.model_validate({**told, "sources": relative})
    alone = prepare(asked, make_text(), make_resources(tmp_path / "alone"))
    cluster = {"launch": "ray", "ray_address": two_nodes, "prepare.num_workers": 4}
    on_ray = make_resources(Path("ray"), **cluster)
    together = prepare(asked, make_text(), on_ray)
    verify(together)
    assert together.digest == alone.digest
    workers = read_manifest(together.uri)["execution"]["workers"]
    assert len({worker["node"] for worker in workers}) == 2, workers
    wrong = Mixture.model_validate(
        {"name": "wrong", "sources": {"told": {**relative["instructions"], "render": "questions"}}}
    )
    with pytest.raises(ValueError, match=r"^record '[^']*' is not one image with a caption, which render questions"):
        prepare(wrong, make_text(), on_ray)
