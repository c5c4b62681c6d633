"""MLflow and Prefect ask for a password, on PostgreSQL where it is installed, and nothing that others see has it."""

import contextlib
import os
import secrets
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import psutil
import pytest
from mlflow import MlflowClient

from tests.test_local import content, files_below, states
from vila_ops import local, tracking
from vila_ops.config import Resources
from vila_ops.config.local import LocalServers
from vila_ops.errors import TrackerRefused
from vila_ops.local import servers as local_servers
from vila_ops.local import take_over
from vila_ops.pipeline.automations import answer
from vila_ops.pipeline.sweeper import client_of

pytestmark = pytest.mark.slow
CANARY = f"canary-{secrets.token_hex(12)}"
"""The password of MLflow and Prefect, and of PostgreSQL."""
POSTGRES = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name))
USER = "postgres" if os.getuid() == 0 else None
"""PostgreSQL refuses to run as root."""


@pytest.fixture(scope="module")
def databases(free_ports: Callable[[int], list[int]]) -> Iterator[dict[str, str]]:
    """The URLs of two empty databases of a user without special rights; none where PostgreSQL is not installed."""
    if not POSTGRES:
        yield {}
        return
    (port,), folder = free_ports(1), Path(tempfile.mkdtemp(prefix="vila-tests-pg-"))  # which another user may enter

    def run(program: str, *words: str | Path, user: str | None = USER) -> None:
        env = {**os.environ, "PGPASSWORD": CANARY, "LC_ALL": "C.UTF-8"}
        command = [POSTGRES[-1] / program, *words]
        subprocess.run(command, user=user, cwd="/", env=env, check=True, stdout=subprocess.DEVNULL)

    (folder / "password").write_text(CANARY)
    if USER is not None:
        shutil.chown(folder, USER)
        shutil.chown(folder / "password", USER)
    data, options = folder / "data", f"-p {port} -k {folder} -c listen_addresses=127.0.0.1 -c fsync=off"
    login = ("--auth=scram-sha-256", f"--pwfile={folder}/password", "--username=postgres")
    run("initdb", f"--pgdata={data}", "--no-sync", "--encoding=UTF8", *login)
    run("pg_ctl", "start", f"--pgdata={data}", f"--log={folder}/log", "--options", options, "--wait")
    try:
        statements = [f"CREATE ROLE vila LOGIN PASSWORD '{CANARY}'"]
        statements += [
            f"CREATE DATABASE {name} OWNER vila" for name in ("mlflow", "prefect", "new_mlflow", "new_prefect")
        ]
        (folder / "setup.sql").write_text(";\n".join(statements) + ";\n")
        at = ("--host=127.0.0.1", f"--port={port}", "--username=postgres", "--dbname=postgres", "--set=ON_ERROR_STOP=1")
        run("psql", *at, f"--file={folder}/setup.sql", user=None)
        place = f"vila:{CANARY}@127.0.0.1:{port}"
        urls = {"mlflow": f"postgresql://{place}/mlflow", "prefect": f"postgresql+asyncpg://{place}/prefect"}
        yield urls | {f"new_{name}": url.replace(f"/{name}", f"/new_{name}") for name, url in urls.items()}
    finally:
        run("pg_ctl", "stop", f"--pgdata={data}", "--mode=immediate", "--wait")
        shutil.rmtree(folder)


@pytest.fixture(scope="module")
def servers(
    databases: dict[str, str],
    tmp_path_factory: pytest.TempPathFactory,
    free_servers: Callable[[Path], LocalServers],
    empty_database: Path,
) -> Iterator[LocalServers]:
    """MLflow and Prefect with a password, without a deployment. Their secrets are in the environment and in a file."""
    folder = tmp_path_factory.mktemp("passwords")
    (folder / "prefect.yaml").write_text("deployments: []\n")
    changes = {"password": "env:VILA_CANARY", "prefect_file": str(folder / "prefect.yaml")}
    if databases:
        (folder / "prefect-url").write_text(databases["prefect"])
        changes |= {"mlflow_database": "env:VILA_CANARY_URL", "prefect_database": f"file:{folder}/prefect-url"}
    settings = free_servers(folder / "root").with_changes(changes)
    (folder / "root").mkdir()
    if not databases:
        shutil.copyfile(empty_database, folder / "root/mlflow.db")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VILA_CANARY", CANARY)
        patch.setenv("VILA_CANARY_URL", databases.get("mlflow", ""))
        try:
            local.up(settings, only=("mlflow", "prefect"))
            yield settings
        finally:
            local.down(settings)


def test_mlflow_and_prefect_answer_nobody_without_the_password(servers: LocalServers) -> None:
    at = local.endpoints(servers)
    asked = {
        f"{at.mlflow}/": None,
        f"{at.mlflow}/api/2.0/mlflow/experiments/search?max_results=1": None,
        f"{at.mlflow}/api/2.0/mlflow-artifacts/artifacts": None,
        f"{at.prefect}/api/flows/filter": {},
        f"{at.prefect}/api/admin/settings": None,
    }
    for url, body in asked.items():
        method = "GET" if body is None else "POST"
        for login in (None, ("admin", "wrong-password-1")):
            refused = httpx.request(method, url, json=body, auth=login, trust_env=False)
            assert refused.status_code == 401, url
            assert CANARY not in refused.text
        assert httpx.request(method, url, json=body, auth=("admin", CANARY), trust_env=False).is_success, url


def test_our_clients_have_the_password_from_the_environment(
    servers: LocalServers, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    at = local.endpoints(servers)
    resources = Resources(launch="inline").with_changes({"tracking.uri": at.mlflow, "storage.store": str(tmp_path)})
    for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(TrackerRefused, match="does not take a question"):
        tracking.ask(resources)
    for name, value in local.env(servers).items():
        monkeypatch.setenv(name, value)
    run_id = tracking.start_run(resources, "align", parent=None, params={}, tags={})
    assert run_id is not None
    assert MlflowClient(at.mlflow).get_run(run_id).info.run_name == "align"
    with client_of(f"{at.prefect}/api") as api:
        assert answer(api, "/flows/filter", {}) == []
    assert states(servers) == {"healthy", "stopped"}


def test_no_process_record_or_log_shows_a_password(servers: LocalServers) -> None:
    root = Path(servers.root)
    files = [*files_below(root)]
    assert {"mlflow.json", "prefect.json", "mlflow.log", "prefect.log"} <= {path.name for path in files}
    assert [path for path in files if CANARY.encode() in content(path)] == []
    assert [words for words in command_lines() if CANARY in words] == []


def test_both_keep_their_data_in_postgresql(servers: LocalServers, databases: dict[str, str]) -> None:
    if not databases:
        pytest.skip("PostgreSQL is not installed (Debian's package postgresql)")
    assert not (Path(servers.root) / "mlflow.db").exists()
    assert not (Path(servers.root) / "prefect/prefect.db").exists()
    import psycopg

    for name, table in (("mlflow", "experiments"), ("prefect", "flow_run")):
        with psycopg.connect(databases[name].replace("+asyncpg", "")) as connection:
            assert connection.execute(f"SELECT COUNT(*) >= 0 FROM {table}").fetchone() == (True,)


def test_what_sqlite_has_is_in_postgresql_after_the_next_start_once(
    databases: dict[str, str],
    tmp_path: Path,
    free_servers: Callable[[Path], LocalServers],
    empty_database: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """With types and foreign keys that only PostgreSQL has, and counters that go on."""
    if not databases:
        pytest.skip("PostgreSQL is not installed (Debian's package postgresql)")
    settings = free_servers(tmp_path)
    (tmp_path / "prefect").mkdir()
    shutil.copyfile(empty_database, tmp_path / "mlflow.db")
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    run = client.create_run(client.create_experiment("kettles")).info
    client.log_metric(run.run_id, "loss", 0.1, step=3)
    client.create_registered_model("kettles")
    client.create_model_version("kettles", "vila-store:///x", tags={"digest": "1f"})
    client.set_registered_model_alias("kettles", "champion", "1")
    before = tmp_path / "prefect/prefect.db"
    upgrade = [sys.executable, "-m", "prefect", "server", "database", "upgrade", "-y"]
    own = {take_over.PREFECT_URL: f"sqlite+aiosqlite:///{before}", "PREFECT_HOME": str(tmp_path / "prefect")}
    subprocess.run(upgrade, env={**os.environ, **own}, check=True, stdout=subprocess.DEVNULL)
    with contextlib.closing(sqlite3.connect(before)) as database:
        database.executescript(FLOW_RUN)

    for name in ("mlflow", "prefect"):
        monkeypatch.setenv(f"VILA_NEW_{name.upper()}", databases[f"new_{name}"])
    new = {"mlflow_database": "env:VILA_NEW_MLFLOW", "prefect_database": "env:VILA_NEW_PREFECT"}
    settings = settings.with_changes(new)
    local_servers.prepare(settings, "mlflow")
    local_servers.prepare(settings, "prefect")

    moved = MlflowClient(databases["new_mlflow"].replace("postgresql://", "postgresql+psycopg://"))
    assert [one.value for one in moved.get_metric_history(run.run_id, "loss")] == [0.1]
    assert moved.get_model_version_by_alias("kettles", "champion").tags == {"digest": "1f"}
    assert int(moved.create_experiment("more")) == int(run.experiment_id) + 1
    import psycopg

    with psycopg.connect(databases["new_prefect"].replace("+asyncpg", "")) as target:
        columns = "s.type::text, r.total_run_time, r.start_time, r.tags, r.labels"
        read = target.execute(f"SELECT {columns} FROM flow_run r JOIN flow_run_state s ON s.id = r.state_id").fetchone()
        began, took = datetime(2026, 11, 30, 8, tzinfo=UTC), timedelta(seconds=62.5)
        assert read == ("COMPLETED", took, began, ["vila"], {"vila-ops.store": "/s"})
        keys = "SELECT count(*) FROM pg_constraint WHERE contype = 'f' AND conrelid = 'flow_run'::regclass"
        assert target.execute(keys).fetchone() not in (None, (0,))

    assert [path.name for path in tmp_path.glob("*.db")] == []
    assert len([*tmp_path.glob("mlflow.db.moved-*"), *tmp_path.glob("prefect/prefect.db.moved-*")]) == 2
    shutil.copyfile(empty_database, tmp_path / "mlflow.db")
    local_servers.prepare(settings, "mlflow")
    assert "has rows already (of an earlier copy, or its own; in the table " in caplog.text
    assert (tmp_path / "mlflow.db").exists()


FLOW_RUN = """
INSERT INTO flow (id, name, tags) VALUES ('11111111-1111-4111-8111-111111111111', 'vila', '[]');
INSERT INTO flow_run (id, name, flow_id, tags, labels, start_time, total_run_time, run_count, state_type, state_name)
VALUES ('22222222-2222-4222-8222-222222222222', 'red-kettle', '11111111-1111-4111-8111-111111111111', '["vila"]',
        '{"vila-ops.store": "/s"}', '2026-11-30 08:00:00.000000', '1970-01-01 00:01:02.500000', 1, 'COMPLETED', 'Done');
INSERT INTO flow_run_state (id, flow_run_id, type, name, timestamp, state_details, data)
VALUES ('33333333-3333-4333-8333-333333333333', '22222222-2222-4222-8222-222222222222', 'COMPLETED', 'Completed',
        '2026-11-30 08:01:02.500000', '{}', 'null');
UPDATE flow_run SET state_id = '33333333-3333-4333-8333-333333333333';
"""
"""A flow run as Prefect's sqlite has it: times without a zone, durations from 1970 on, JSON as text."""


def command_lines() -> Iterator[str]:
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            yield " ".join(process.cmdline())
