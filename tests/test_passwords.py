"""MLflow and Prefect ask for a password, on PostgreSQL where it is installed, and nothing that others see has it."""

import contextlib
import os
import secrets
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
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
        statements += [f"CREATE DATABASE {name} OWNER vila" for name in ("mlflow", "prefect")]
        (folder / "setup.sql").write_text(";\n".join(statements) + ";\n")
        at = ("--host=127.0.0.1", f"--port={port}", "--username=postgres", "--dbname=postgres", "--set=ON_ERROR_STOP=1")
        run("psql", *at, f"--file={folder}/setup.sql", user=None)
        place = f"vila:{CANARY}@127.0.0.1:{port}"
        yield {"mlflow": f"postgresql://{place}/mlflow", "prefect": f"postgresql+asyncpg://{place}/prefect"}
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


def command_lines() -> Iterator[str]:
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            yield " ".join(process.cmdline())
