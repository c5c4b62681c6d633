"""The servers of one machine, really started: on free ports, in a folder of this test."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import httpx
import psutil
import pytest
from pydantic import ValidationError

from vila_ops import local
from vila_ops.config.load import read
from vila_ops.config.local import LocalServers

REPOSITORY = Path(__file__).parents[1]
FLOW = """
import os
from pathlib import Path

from prefect import flow


@flow(name="vila")
def vila(suffix: str) -> None:
    keys = ("MLFLOW_TRACKING_URI", "RAY_AUTH_TOKEN_PATH", "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S")
    Path(f"ran-{suffix}.txt").write_text("\\n".join(os.environ[key] for key in keys))
"""


def pids(settings: LocalServers) -> dict[str, int | None]:
    return {server.name: server.pid for server in local.status(settings)}


def states(settings: LocalServers) -> set[str]:
    return {server.state for server in local.status(settings)}


def alive(pid: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


@pytest.fixture
def listener() -> Iterator[tuple[int, int]]:
    """A process that is not ours, and the port that it holds."""
    code = "import socket, time; s = socket.create_server(('127.0.0.1', 0)); print(s.getsockname()[1], flush=True)"
    command = [sys.executable, "-c", f"{code}; time.sleep(600)"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield process.pid, int(process.stdout.readline())
        process.kill()


@pytest.fixture(scope="module")
def box(
    tmp_path_factory: pytest.TempPathFactory, free_servers: Callable[[Path], LocalServers]
) -> Iterator[LocalServers]:
    """A checkout with the repository's prefect.yaml and a trivial flow, and its servers up."""
    checkout = tmp_path_factory.mktemp("checkout")
    (checkout / "flows").mkdir()
    (checkout / "flows" / "full_pipeline.py").write_text(FLOW)
    shutil.copytree(REPOSITORY / "infra", checkout / "infra")
    with contextlib.chdir(checkout):
        settings = free_servers(Path("store/local"))
        try:
            local.up(settings)
            yield settings
        finally:
            local.down(settings)


def test_the_committed_settings_load() -> None:
    assert LocalServers.model_validate(read(REPOSITORY / "configs/local.yaml")) == LocalServers()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"host": "0.0.0.0"}, "reached from outside"),
        ({"mlflow_port": 4200}, "are both 4200"),
        ({"serve_port": 10002}, "Ray's worker ports"),
    ],
)
def test_settings_that_cannot_work_are_refused(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        LocalServers.model_validate(wrong)


@pytest.mark.parametrize("setting", ["prefect_port", "serve_port"])
def test_a_foreign_process_on_a_port_is_named_and_nothing_starts(
    tmp_path: Path, listener: tuple[int, int], setting: str, free_servers: Callable[[Path], LocalServers]
) -> None:
    pid, port = listener
    settings = LocalServers.model_validate({**free_servers(tmp_path).model_dump(), setting: port})
    with pytest.raises(ValueError, match=f"port {port} is held by process {pid} .*set {setting} in"):
        local.up(settings)
    assert states(settings) == {"stopped"}
    assert alive(pid)


def test_a_holder_that_cannot_be_seen_is_refused_unless_it_is_just_dying(
    tmp_path: Path, free_servers: Callable[[Path], LocalServers], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = LocalServers.model_validate({**free_servers(tmp_path).model_dump(), "stop_grace_seconds": 0.3})
    address = SimpleNamespace(ip="127.0.0.1", port=settings.serve_port)
    unseen = SimpleNamespace(laddr=address, status=psutil.CONN_LISTEN, pid=None)
    seen = iter([[unseen], [unseen], []])
    monkeypatch.setattr(psutil, "net_connections", lambda kind: next(seen, []))
    local.up(settings, only=())
    assert next(seen, None) is None
    monkeypatch.setattr(psutil, "net_connections", lambda kind: [unseen])
    with pytest.raises(ValueError, match=f"port {settings.serve_port} is held by a process of another user"):
        local.up(settings, only=())


def test_a_stranger_under_a_recorded_pid_is_left_alone(
    tmp_path: Path, listener: tuple[int, int], free_servers: Callable[[Path], LocalServers]
) -> None:
    settings = free_servers(tmp_path)
    pid, _ = listener
    record = local.ProcessRecord(name="mlflow", pid=pid, started=time.time() - 86400, command=(), env={}, directory="")
    (tmp_path / "pids").mkdir()
    (tmp_path / "pids" / "mlflow.json").write_text(record.model_dump_json())
    assert states(settings) == {"stopped"}
    local.down(settings)
    assert alive(pid)
    assert not (tmp_path / "pids" / "mlflow.json").exists()


@pytest.mark.ray
@pytest.mark.slow
def test_every_server_is_healthy_and_a_second_up_adopts_it(box: LocalServers) -> None:
    assert states(box) == {"healthy"}
    before = pids(box)
    local.up(box)
    assert pids(box) == before


@pytest.mark.ray
@pytest.mark.slow
def test_mlflow_stores_below_root(box: LocalServers) -> None:
    path = f"{local.endpoints(box).mlflow}/api/2.0/mlflow-artifacts/artifacts/0/hello.txt"
    assert httpx.put(path, content=b"hello", trust_env=False).is_success
    assert (Path(box.root) / "mlflow-artifacts/0/hello.txt").read_bytes() == b"hello"
    assert (Path(box.root) / "mlflow.db").is_file()


@pytest.mark.ray
@pytest.mark.slow
def test_ray_asks_for_the_token(box: LocalServers) -> None:
    jobs = f"{local.endpoints(box).ray_dashboard}/api/jobs/"
    token = Path(local.env(box)["RAY_AUTH_TOKEN_PATH"])
    assert token.stat().st_mode & 0o077 == 0
    assert httpx.get(jobs, trust_env=False).status_code == 401
    assert httpx.get(jobs, headers={"Authorization": f"Bearer {token.read_text()}"}, trust_env=False).json() == []


@pytest.mark.ray
@pytest.mark.slow
def test_the_worker_runs_the_deployment_in_the_checkout_with_our_environment(box: LocalServers) -> None:
    env = local.env(box)
    deployment = httpx.get(f"{env['PREFECT_API_URL']}/deployments/name/vila/full-pipeline", trust_env=False).json()
    assert [schedule["active"] for schedule in deployment["schedules"]] == [False]
    prefect = str(Path(sys.executable).parent / "prefect")
    command = [prefect, "deployment", "run", "vila/full-pipeline", "--param", "suffix=once", "--watch"]
    done = subprocess.run(command, env={**os.environ, **env}, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    seen = [env["MLFLOW_TRACKING_URI"], env["RAY_AUTH_TOKEN_PATH"], env["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"]]
    assert Path("ran-once.txt").read_text().splitlines() == seen


@pytest.mark.ray
@pytest.mark.slow
def test_up_replaces_what_was_killed_or_is_configured_otherwise_and_nothing_else(box: LocalServers) -> None:
    before = pids(box)
    assert before["ray"] is not None
    os.kill(before["ray"], signal.SIGKILL)  # its agents live on, with the ports that the next head needs
    other = LocalServers.model_validate({**box.model_dump(), "max_flow_runs": box.max_flow_runs + 1})
    local.up(other)
    after = pids(other)
    assert states(other) == {"healthy"}
    assert {name for name in before if before[name] != after[name]} == {"ray", "worker"}


@pytest.mark.ray
@pytest.mark.slow
def test_down_leaves_no_process_of_ours(box: LocalServers) -> None:
    records = [json.loads(path.read_text()) for path in Path(box.root, "pids").iterdir()]
    sessions = {record["pid"] for record in records}
    ours = [pid for pid in psutil.pids() if psutil.pid_exists(pid) and os.getsid(pid) in sessions]
    assert len(ours) > len(sessions)
    ray_folder = Path(next(record["command"][-1] for record in records if record["name"] == "ray"))
    assert ray_folder.is_dir()
    local.down(box)
    assert [pid for pid in ours if alive(pid)] == []
    assert states(box) == {"stopped"}
    assert not ray_folder.exists()
