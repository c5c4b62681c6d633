"""What the servers of one machine refuse before any of them starts; `flows/full_pipeline` starts them."""

import configparser
import contextlib
import os
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from pydantic import ValidationError

from vila_ops import local
from vila_ops.config.load import read
from vila_ops.config.local import LocalServers
from vila_ops.errors import ServerFailed
from vila_ops.local import databases, deployments, machine, process, servers
from vila_ops.local.servers import Server

REPOSITORY = Path(__file__).parents[1]


def states(settings: LocalServers) -> set[str]:
    return {server.state for server in local.status(settings)}


def alive(pid: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


def files_below(*folders: Path) -> Iterator[Path]:
    """The files of folders that servers use, without those that vanish meanwhile."""
    for path in (Path(here, name) for folder in folders for here, _, names in os.walk(folder) for name in names):
        if path.is_file():
            yield path


def content(path: Path) -> bytes:
    """Of a file that a server may remove."""
    with contextlib.suppress(FileNotFoundError):
        return path.read_bytes()
    return b""


@pytest.fixture
def listener() -> Iterator[tuple[int, int]]:
    """A process that is not ours, and the port that it holds."""
    code = "import socket, time; s = socket.create_server(('127.0.0.1', 0)); print(s.getsockname()[1], flush=True)"
    command = [sys.executable, "-c", f"{code}; time.sleep(600)"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield process.pid, int(process.stdout.readline())
        process.kill()


def test_the_committed_settings_load() -> None:
    assert LocalServers.model_validate(read(REPOSITORY / "configs/local.yaml")) == LocalServers()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"host": "0.0.0.0"}, "stands for every address"),
        ({"host": "::1"}, "::1 is an IPv6 address, which the servers are not started with; use 127.0.0.1"),
        ({"host": "192.0.2.7"}, "reached from outside; set password to env:NAME or file:PATH"),
        ({"password": "env:TWO WORDS"}, "a secret is given as env:NAME or file:PATH"),
        ({"mlflow_port": 4200}, "are both 4200"),
        ({"serve_port": 10002}, "Ray's worker ports"),
    ],
)
def test_settings_that_cannot_work_are_refused(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        LocalServers.model_validate(wrong)


@pytest.mark.parametrize(
    ("wrong", "given", "message"),
    [
        ({"password": "env:VILA_CANARY"}, None, "password is env:VILA_CANARY, but the environment has no VILA_CANARY"),
        ({"password": "env:VILA_CANARY"}, "canary", r"password \(env:VILA_CANARY\) has fewer than 12 characters"),
        ({"password": "file:canary.txt"}, None, r"password is file:canary.txt, but .* cannot be read \(No such"),
        ({"mlflow_database": "env:VILA_CANARY"}, "vila:canary@db/mlflow", "is no URL that begins with postgresql://"),
        ({"prefect_database": "env:VILA_CANARY"}, "postgresql://vila:canary@db/p", r"postgresql\+asyncpg://"),
    ],
)
def test_a_secret_that_cannot_be_used_is_told_without_it_and_nothing_starts(
    wrong: dict[str, str], given: str | None, message: str, tmp_path: Path,
    free_servers: Callable[[Path], LocalServers], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    settings = free_servers(tmp_path)
    if given is not None:
        monkeypatch.setenv("VILA_CANARY", given)
    with pytest.raises(ValueError, match=message) as raised:
        local.up(settings.with_changes(wrong))
    assert "canary" not in str(raised.value).replace("canary.txt", "")
    assert states(settings) == {"stopped"}


def test_mlflow_s_logins_are_made_for_a_new_password_and_stay_otherwise(
    tmp_path: Path, free_servers: Callable[[Path], LocalServers], monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLflow keeps the first password that it was given; the record of a server holds none."""
    monkeypatch.setattr(servers, "find_spec", lambda _: object())
    monkeypatch.setenv("VILA_CANARY", "canary-of-a-password")
    settings = free_servers(tmp_path).with_changes({"password": "env:VILA_CANARY"})
    logins, written = tmp_path / "mlflow-logins.db", tmp_path / "mlflow-logins.ini"
    logins.write_text("of an earlier version, which wrote no digest")
    first = servers.prepare(settings, "mlflow")
    assert not logins.exists()
    logins.write_text("with users that the admin added")
    second = servers.prepare(settings, "mlflow")
    assert logins.exists()
    assert first != second
    parsed = configparser.ConfigParser()
    parsed.read(written)
    assert parsed["mlflow"]["database_uri"] == f"sqlite:///{logins}"
    assert "canary" not in written.read_text()
    for server in servers.servers_of(settings).values():
        assert "canary" not in str(server.command)
        assert "canary" not in str(process.recorded(server.env))
        assert "canary" in str(server.env)
    before = process.recorded(servers.servers_of(settings)["prefect"].env)
    monkeypatch.setenv("VILA_CANARY", "canary-of-another-one")
    assert before != process.recorded(servers.servers_of(settings)["prefect"].env), "so that it is started again"
    servers.prepare(settings, "mlflow")
    assert not logins.exists()


@pytest.mark.slow
def test_mlflow_s_database_is_upgraded_once_after_an_update_and_a_copy_stays(
    tmp_path: Path, empty_database: Path, free_servers: Callable[[Path], LocalServers], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new one is left to MLflow. The upgrade is MLflow's own, here of tables that are of its version already."""
    settings, file, marker = free_servers(tmp_path), tmp_path / "mlflow.db", tmp_path / "mlflow.version"
    servers.prepare(settings, "mlflow")
    assert [*tmp_path.iterdir()] == [marker]
    before, own = marker.read_text(), databases.UPGRADE
    shutil.copyfile(empty_database, file)
    monkeypatch.setattr(databases, "version", lambda _: "99.0")
    monkeypatch.setattr(databases, "UPGRADE", "raise SystemExit('postgresql://vila:canary@db: no')")
    with pytest.raises(ServerFailed, match="were not upgraded:\npostgresql://db: no"):
        servers.prepare(settings, "mlflow")
    assert marker.read_text() == before
    (copy,) = tmp_path.glob("mlflow.db.before-99.0-*")
    with contextlib.closing(sqlite3.connect(copy)) as database:
        assert database.execute("SELECT COUNT(*) FROM experiments").fetchone() is not None
    monkeypatch.setattr(databases, "UPGRADE", own)
    servers.prepare(settings, "mlflow")
    assert marker.read_text().split()[0] == "99.0"
    monkeypatch.setattr(databases, "UPGRADE", "raise SystemExit(1)")
    servers.prepare(settings, "mlflow")
    monkeypatch.setattr(servers, "find_spec", lambda _: object())
    monkeypatch.setenv("VILA_MLFLOW", "postgresql://db/mlflow")
    with pytest.raises(ServerFailed, match="were not upgraded"):
        servers.prepare(settings.with_changes({"mlflow_database": "env:VILA_MLFLOW"}), "mlflow")


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


@pytest.mark.parametrize("says", ["timed out", "is out of memory"])
def test_a_server_that_gave_up_on_a_busy_machine_is_started_again_and_no_other(
    says: str, tmp_path: Path, free_servers: Callable[[Path], LocalServers], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first start ends with a message in the log. Ray gives itself 30 s, which no setting changes."""
    settings, first = free_servers(tmp_path / "root"), tmp_path / "first"
    script = f"import pathlib, time; p = pathlib.Path({str(first)!r})\nif p.exists(): time.sleep(600)\np.touch()"
    server = Server(
        name="mlflow",
        command=(sys.executable, "-c", f"{script}; print('error: it {says}')"),
        env={},
        ports={},
        url="http://127.0.0.1",
        healthy=lambda record, _: record.process().alive() and first.exists() and record.pid != starts[0],
        gives_up="it timed out",
    )
    starts: list[int] = []
    start = machine.start
    monkeypatch.setattr(machine, "start", lambda *a: [one := start(*a), starts.append(one.pid)][0])
    monkeypatch.setattr(machine, "servers_of", lambda _: {"mlflow": server})
    if says == "timed out":
        local.up(settings, only=("mlflow",))
    else:
        with pytest.raises(ServerFailed, match=r"mlflow ended after .* s; (.|\n)*error: it is out of memory"):
            local.up(settings, only=("mlflow",))
    local.down(settings)
    assert len(starts) == (2 if says == "timed out" else 1)
    assert not any(alive(pid) for pid in starts)


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


def test_a_deployment_of_flows_that_takes_too_long_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def late(command: list[str], *, timeout: float, **_: object) -> None:
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(deployments, "get_json", lambda *_, **__: [])
    monkeypatch.setattr(subprocess, "run", late)
    with pytest.raises(ServerFailed, match=r"did not end within 7 s.*run the same command again, or raise start_time"):
        deployments.deploy_flows(LocalServers(start_timeout_seconds=7))


def test_schedules_are_what_people_made_of_them_before_the_flows_were_deployed_again() -> None:
    """Prefect's `deploy` switches a schedule off that the file has so, and removes one that the file does not have."""
    daily, weekly, own = ({"cron": f"0 {hour} * * *", "timezone": "UTC"} for hour in (4, 3, 9))
    ours = [
        {"id": "1", "schedule": daily, "active": False, "parameters": {"trigger": "schedule"}, "slug": None},
        {"id": "2", "schedule": weekly, "active": False, "parameters": {}, "slug": None},
    ]
    assert list(deployments.schedules_changed([], ours)) == []
    assert list(deployments.schedules_changed(ours, ours)) == []
    on = {**ours[0], "id": "9", "active": True, "parameters": {"trigger": "schedule", "recipe": "mine"}}
    added = {"id": "8", "schedule": own, "active": True, "parameters": {}, "slug": "mine"}
    assert list(deployments.schedules_changed([on, added, {**ours[1], "id": "7"}], ours)) == [
        ("1", {"schedule": daily, "active": True, "parameters": {"trigger": "schedule", "recipe": "mine"}}),
        (None, {"schedule": own, "active": True, "parameters": {}}),
    ]
