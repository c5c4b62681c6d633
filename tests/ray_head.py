"""A Ray cluster of one node, in processes of its own."""

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[1]


def end_node(node: "subprocess.Popen[bytes]") -> None:
    """End the process of a node, and all that it started."""
    tree = [*psutil.Process(node.pid).children(recursive=True), psutil.Process(node.pid)]
    for process in tree:
        process.terminate()
    for process in psutil.wait_procs(tree, timeout=5)[1]:
        process.kill()
    node.wait(10)


@contextmanager
def ray_head(free_ports: Callable[[int], list[int]]) -> Iterator[tuple[str, psutil.Process]]:
    """Address and process of a Ray head without a dashboard, which takes as much CPU as all else of it."""
    import ray  # not before `pytest_configure`

    names = ("port", "ray-client-server-port", "dashboard-agent-listen-port", "metrics-export-port")
    ports = free_ports(len(names))
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats"]
    command += ["--node-ip-address", "127.0.0.1", "--num-cpus", "4", "--object-store-memory", "100000000"]
    command += ["--include-dashboard", "false", "--min-worker-port", "0", "--max-worker-port", "0"]
    command += [text for name, port in zip(names, ports, strict=True) for text in (f"--{name}", str(port))]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    with tempfile.TemporaryDirectory(prefix="ray-t") as folder:  # short: Ray puts sockets there
        head = subprocess.Popen([*command, "--temp-dir", folder], env=env, stdout=subprocess.DEVNULL)
        try:
            _await_listener(head, ports[0])
            yield f"127.0.0.1:{ports[0]}", psutil.Process(head.pid)
        finally:
            ray.shutdown()  # a driver that is still connected is ended with its cluster
            end_node(head)


def _await_listener(process: "subprocess.Popen[bytes]", port: int) -> None:
    deadline = time.monotonic() + 1200
    while time.monotonic() < deadline and process.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise RuntimeError("Ray did not start")
