"""Two Ray nodes in two network namespaces do the tiny pipeline with the digests of one process.

Between them: a store on S3, MLflow on PostgreSQL, Ray's token authentication; nothing else of the machine is in their
network. As root, with PostgreSQL and iproute2: `VILA_NAMESPACES=1 python -m pytest tests/infra/test_two_nodes.py`.
"""

import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif("VILA_NAMESPACES" not in os.environ, reason="long: VILA_NAMESPACES asks for it"),
    pytest.mark.skipif(os.geteuid() != 0, reason="only root makes network namespaces"),
    pytest.mark.skipif(shutil.which("ip") is None, reason="iproute2 is not installed"),
]
ROOT = Path(__file__).parents[2]
HERE, THERE = "10.213.0.1", "10.213.0.2"
"""Addresses of the node with the servers, the head and the driver, and of the other node."""
INTERFACE = "vila0"
"""The end of the cable in each namespace."""
PATIENCE_SECONDS = 600
TINY = "configs/recipes/tiny.yaml"


class Namespaces:
    """Two namespaces with a cable between them. Everything that runs in them is ended with them."""

    def __init__(self) -> None:
        mark = secrets.token_hex(2)
        self.names = {HERE: f"vila-a-{mark}", THERE: f"vila-b-{mark}"}
        self.cables = {HERE: f"va{mark}", THERE: f"vb{mark}"}

    def make(self) -> None:
        """Make both, each with its address on its end of the cable. Skips the test where that is not allowed."""
        made = subprocess.run(["ip", "netns", "add", self.names[HERE]], capture_output=True, text=True, check=False)
        if made.returncode:
            pytest.skip(f"network namespaces are not allowed here: {made.stderr.strip()}")
        _ip("netns", "add", self.names[THERE])
        _ip("link", "add", self.cables[HERE], "type", "veth", "peer", "name", self.cables[THERE])
        for address, name in self.names.items():
            cable = self.cables[address]
            _ip("link", "set", cable, "netns", name)
            _ip("-n", name, "link", "set", cable, "name", INTERFACE)
            _ip("-n", name, "address", "add", f"{address}/24", "dev", INTERFACE)
            for link in ("lo", INTERFACE):
                _ip("-n", name, "link", "set", link, "up")

    def start(self, address: str, command: Sequence[str], *, env: dict[str, str], log: Path) -> subprocess.Popen[bytes]:
        """Start a process in the namespace of an address."""
        with log.open("ab") as out:
            return subprocess.Popen(self._inside(address, command), env=env, cwd=ROOT, stdout=out, stderr=out)

    def run(self, address: str, command: Sequence[str], *, env: dict[str, str], ok: bool = True) -> str:
        """Run a command in the namespace of an address, and return what it printed."""
        done = subprocess.run(
            self._inside(address, command), env=env, cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert not ok or done.returncode == 0, f"{command}\n{done.stdout[-4000:]}\n{done.stderr[-8000:]}"
        return done.stdout if ok else f"{done.returncode}"

    def end(self) -> None:
        """End all processes in the namespaces, and remove them."""
        for name in self.names.values():
            inside = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, check=False)
            for pid in map(int, inside.stdout.split()):
                with suppress(psutil.NoSuchProcess):
                    psutil.Process(pid).kill()
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)

    def _inside(self, address: str, command: Sequence[str]) -> list[str]:
        return ["ip", "netns", "exec", self.names[address], *command]


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


def _wait(is_so: Any, what: str, log: Path) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not is_so():
        assert time.monotonic() < deadline, f"no {what}: {log.read_text()[-4000:]}"
        time.sleep(0.5)


@pytest.fixture
def namespaces() -> Iterator[Namespaces]:
    made = Namespaces()
    try:
        made.make()
        yield made
    finally:
        made.end()


@pytest.fixture
def folder() -> Iterator[Path]:
    """A short path, since Ray puts sockets there, that the user of PostgreSQL may enter."""
    with tempfile.TemporaryDirectory(prefix="vila-n", ignore_cleanup_errors=True) as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.fixture
def env(folder: Path) -> dict[str, str]:
    """Of every process: the token of Ray, the keys of S3, and nothing of the user's own."""
    (folder / "token").write_text(secrets.token_hex(32))
    return {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "HOME": str(folder),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(folder / "token"),
        "AWS_ENDPOINT_URL": f"http://{HERE}:5555",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": secrets.token_hex(16),
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
    }


def postgres(namespaces: Namespaces, folder: Path, env: dict[str, str]) -> str:
    """The URI of a database of a PostgreSQL server that asks for a password."""
    pytest.importorskip("psycopg", reason="install vila-ops[servers]")
    binaries = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name))
    if not binaries:
        pytest.skip("PostgreSQL is not installed: apt-get install postgresql")
    password, data = secrets.token_hex(16), folder / "postgres"
    data.mkdir()
    (folder / "password").write_text(password)
    for path in (data, folder / "password"):
        shutil.chown(path, "postgres")
    own = ["runuser", "-u", "postgres", "--"]
    subprocess.run(
        [*own, f"{binaries[-1]}/initdb", "-D", str(data), "-A", "scram-sha-256", f"--pwfile={folder / 'password'}"],
        check=True, capture_output=True, cwd=data,
    )  # fmt: skip
    with (data / "pg_hba.conf").open("a") as rules:
        rules.write("host all all 10.213.0.0/24 scram-sha-256\n")
    command = [*own, f"{binaries[-1]}/postgres", "-D", str(data), "-h", HERE, "-k", str(data)]
    namespaces.start(HERE, command, env=env, log=folder / "postgres.log")
    ready = [f"{binaries[-1]}/pg_isready", "-h", HERE]
    _wait(lambda: namespaces.run(HERE, ready, env=env, ok=False) == "0", "PostgreSQL", folder / "postgres.log")
    return f"postgresql+psycopg://postgres:{password}@{HERE}/postgres"


def servers(namespaces: Namespaces, folder: Path, env: dict[str, str]) -> None:
    """S3, and MLflow on PostgreSQL."""
    s3, mlflow = folder / "s3.log", folder / "mlflow.log"
    namespaces.start(HERE, [sys.executable, "-m", "tests.s3_servers", HERE, "5555", "vila"], env=env, log=s3)
    listening = ["python", "-c", "import socket, sys; socket.create_connection((sys.argv[1], int(sys.argv[2])))"]
    _wait(lambda: namespaces.run(HERE, [*listening, HERE, "5555"], env=env, ok=False) == "0", "S3", s3)
    database = postgres(namespaces, folder, env)
    command = ["mlflow", "server", "--host", HERE, "--port", "5000", "--workers", "1", "--backend-store-uri", database]
    command += ["--artifacts-destination", "s3://vila/mlflow", "--allowed-hosts", f"{HERE}:5000"]
    namespaces.start(HERE, command, env=env, log=mlflow)
    _wait(lambda: namespaces.run(HERE, [*listening, HERE, "5000"], env=env, ok=False) == "0", "MLflow", mlflow)


def cluster(namespaces: Namespaces, folder: Path, env: dict[str, str]) -> None:
    """A head with two CPUs and another node with two."""
    ray = ["ray", "start", "--block", "--disable-usage-stats", "--num-cpus", "2", "--object-store-memory", "100000000"]
    head = [*ray, "--head", "--node-ip-address", HERE, "--port", "6379", "--temp-dir", str(folder / "ray")]
    namespaces.start(HERE, [*head, "--include-dashboard", "false"], env=env, log=folder / "head.log")
    status = ["ray", "status", "--address", f"{HERE}:6379"]
    _wait(lambda: namespaces.run(HERE, status, env=env, ok=False) == "0", "head", folder / "head.log")
    other = [*ray, "--node-ip-address", THERE, "--address", f"{HERE}:6379"]
    namespaces.start(THERE, other, env=env, log=folder / "node.log")
    nodes = ["python", "-c", f"import ray; ray.init('{HERE}:6379'); assert sum(n['Alive'] for n in ray.nodes()) == 2"]
    _wait(lambda: namespaces.run(HERE, nodes, env=env, ok=False) == "0", "second node", folder / "node.log")


def resources(folder: Path, name: str, **settings: Any) -> str:
    """A file of resources, with one thread everywhere."""
    path = folder / f"{name}.yaml"
    for section in ("train", "evaluate"):
        settings[section] = {"threads_per_worker": 1, **settings.get(section, {})}
    path.write_text(yaml.safe_dump({"device": "cpu", **settings}))
    return str(path)


def digests(outcome: dict[str, Any]) -> dict[str, Any]:
    """What the tasks made."""
    return {
        kind: {name: made["digest"] for name, made in outcome[kind].items()}
        for kind in ("models", "datasets", "stage_reports")
    } | {"report": outcome["report"]["digest"]}


def test_two_nodes_make_what_one_process_makes(namespaces: Namespaces, folder: Path, env: dict[str, str]) -> None:
    servers(namespaces, folder, env)
    cluster(namespaces, folder, env)
    cache = {"cache": str(folder / "cache"), "data": str(folder / "data")}
    ray = {"launch": "ray", "ray_address": f"{HERE}:6379"}
    both = resources(
        folder, "both", **ray, storage={"store": "s3://vila/store", **cache},
        tracking={"uri": f"http://{HERE}:5000"}, serve={"port": 8000, "cpus_per_replica": 1},
    )  # fmt: skip
    run = ["vila-ops", "run", TINY, "--json", "-r"]
    there = json.loads(namespaces.run(HERE, [*run, both], env=env))
    alone = resources(folder, "alone", launch="inline", storage={"store": str(folder / "store"), **cache})
    here = json.loads(namespaces.run(THERE, [*run, alone], env=env))
    assert digests(there) == digests(here)
    assert there["version"]["version"] == 1
    assert there["deployment"] is not None
    assert there["answer"] is not None

    spread = resources(
        folder, "spread", **ray, storage={"store": "s3://vila/spread", **cache},
        train={"num_workers": 2, "zero_stage": 1, "placement": "STRICT_SPREAD", "network": {"interface": INTERFACE}},
    )  # fmt: skip
    again = json.loads(namespaces.run(HERE, ["vila-ops", "doctor", "--cluster", "--json", "-r", spread], env=env))
    assert len([one for one in again if one["text"].startswith(f"node {THERE} (")]) == 1
    namespaces.run(HERE, ["vila-ops", "undeploy", TINY, "-r", both], env=env)
    namespaces.run(HERE, ["vila-ops", "train", TINY, "--stage", "align", "-r", spread], env=env)
    without = {name: value for name, value in env.items() if not name.startswith("RAY_AUTH")}
    refused = namespaces.run(THERE, ["vila-ops", "doctor", "--cluster", "-r", both], env=without, ok=False)
    assert refused == "1", "without the token"
