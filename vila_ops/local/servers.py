"""The servers of one machine: how MLflow, Prefect, its worker, the sweeper and a Ray head are started and checked."""

import hashlib
import ipaddress
import json
import os
import secrets
import shutil
import ssl
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from vila_ops.config.base import Config, fingerprint
from vila_ops.config.local import LocalServers
from vila_ops.config.secrets import Secret, read_secret
from vila_ops.local.databases import upgrade_mlflow
from vila_ops.local.log_writer import KEPT
from vila_ops.local.process import Name, ProcessRecord, root_of, write_private
from vila_ops.local.take_over import take_over_mlflow, take_over_prefect

QUICK_SECONDS = 5.0
"""How long a running server may take to answer. MLflow's first answer, which creates its tables, takes longer."""
AGAIN = ("/bin/sh", "-c", 'while :; do "$@"; sleep 3; done', "again")
"""Before a command: it is started again when it ends, until this shell and its session are ended."""
ADMIN = "admin"
"""The user of MLflow and Prefect, where they ask for a password."""
LEAST_CHARACTERS = 12
"""Of a password; MLflow takes no shorter one."""
LOGINS = """# for the password with digest {digest}
[mlflow]
default_permission = READ
database_uri = sqlite:///{folder}/mlflow-logins.db
admin_username = {admin}
"""
"""Settings of MLflow's logins. MLflow takes the admin's password only where it makes their database."""
AUTOMATION = "vila-ops: lost flow runs have crashed"
"""Name of the automation of Prefect that the sweeper makes."""
TELEMETRY_OFF = {
    "DO_NOT_TRACK": "1",
    "DVC_NO_ANALYTICS": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "RAY_USAGE_STATS_ENABLED": "0",
}


class Endpoints(Config):
    """Addresses of the servers of this machine."""

    mlflow: str
    prefect: str
    """Address of the page; the API is at /api below it."""
    ray: str
    """host:port, for `ray_address`."""
    ray_dashboard: str
    serve: str
    """Where `deploy` listens."""


@dataclass(frozen=True)
class Server:
    """One server: how to start it, the ports that it listens on, and how to check that it works."""

    name: Name
    command: tuple[str, ...]
    env: dict[str, str]
    ports: dict[str, int]
    """Ports by the name of their setting, which errors tell."""
    url: str
    healthy: Callable[[ProcessRecord, float], bool]
    """Called with the record and the seconds to wait for an answer."""
    gives_up: str | None = None
    """Text in the log of a server that ended because its own start took it too long."""


def env(settings: LocalServers) -> dict[str, str]:
    """The environment of a process that uses these servers; to be set before Prefect, MLflow or Ray are imported."""
    root = root_of(settings)
    inherited = {name: os.environ[name] for name in ("HF_HUB_OFFLINE",) if name in os.environ}
    return {
        **TELEMETRY_OFF,
        **inherited,
        "MLFLOW_TRACKING_URI": endpoints(settings).mlflow,
        "PREFECT_API_URL": f"{endpoints(settings).prefect}/api",
        # a request is tried again for 17 minutes (2 s, 4 s, ... 512 s); by default for 62 s, then flow runs crash
        "PREFECT_CLIENT_MAX_RETRIES": "9",
        "PREFECT_HOME": str(root / "prefect"),
        "PREFECT_LOGGING_EXTRA_LOGGERS": "vila_ops",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(_ray_token(root)),
        # ray.train.report() waits for the next health check: 2.0 s per call at the default, 0.1 s here (measured).
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1",
        **_login_variables(settings),
    }


def login(settings: LocalServers) -> dict[str, Any]:
    """What a request of httpx to MLflow or Prefect needs. Raises ValueError for a password that is not there."""
    password = _password(settings)
    return {} if password is None else {"auth": (ADMIN, password)}


def _login_variables(settings: LocalServers) -> dict[str, str]:
    """What the clients of MLflow and Prefect read."""
    password = _password(settings)
    if password is None:
        return {}
    return {
        "MLFLOW_TRACKING_USERNAME": ADMIN,
        "MLFLOW_TRACKING_PASSWORD": password,
        "PREFECT_API_AUTH_STRING": f"{ADMIN}:{password}",
    }


def _password(settings: LocalServers) -> str | None:
    if settings.password is None:
        return None
    password = read_secret(settings.password, setting="password")
    if len(password) < LEAST_CHARACTERS:
        raise ValueError(f"password ({settings.password}) has fewer than {LEAST_CHARACTERS} characters; take another")
    return password


def _database(reference: Secret | None, *, setting: str, scheme: str) -> str | None:
    """The URL of a database of PostgreSQL; None for sqlite. Raises ValueError, which does not show it."""
    if reference is None:
        return None
    url = read_secret(reference, setting=setting)
    if not url.startswith(f"{scheme}://"):
        raise ValueError(f"{setting} ({reference}) is no URL that begins with {scheme}://; write one there")
    return url


def _require(module: str, setting: str) -> None:
    """Raise ValueError for a setting that needs a package which is not installed."""
    if find_spec(module) is None:
        raise ValueError(f"{setting} needs the package {module}: pip install 'vila-ops[servers]'")


def join(settings: LocalServers, *, ray_address: str | None) -> None:
    """Set this process's environment for these servers, if `ray_address` is theirs and they were started before."""
    if ray_address == endpoints(settings).ray and _ray_token(root_of(settings)).is_file():
        os.environ |= env(settings)


def endpoints(settings: LocalServers) -> Endpoints:
    """The addresses of the servers, whether they run or not."""
    host = settings.host
    return Endpoints(
        mlflow=f"http://{host}:{settings.mlflow_port}",
        prefect=f"http://{host}:{settings.prefect_port}",
        ray=f"{host}:{settings.ray_port}",
        ray_dashboard=f"http://{host}:{settings.ray_dashboard_port}",
        serve=f"http://{host}:{settings.serve_port}",
    )


def servers_of(settings: LocalServers) -> dict[Name, Server]:
    """Every server, by name."""
    servers = (_mlflow(settings), _prefect(settings), _ray(settings), _worker(settings), _sweeper(settings))
    return {server.name: server for server in servers}


def _mlflow(settings: LocalServers) -> Server:
    """MLflow's application under uvicorn, as `mlflow server` starts it.

    `mlflow server` itself keeps a parent that imports MLflow again: 6 s of CPU and 250 MB more (measured).
    """
    root = root_of(settings)
    url = endpoints(settings).mlflow
    serve = (sys.executable, "-m", "uvicorn", "--host", settings.host, "--port", str(settings.mlflow_port))
    app: tuple[str, ...] = ("mlflow.server.fastapi_app:app",)
    logins: dict[str, str] = {}
    if (password := _password(settings)) is not None:
        app = ("--factory", "mlflow.server.auth:create_app")
        logins = {"MLFLOW_AUTH_CONFIG_PATH": str(_logins(root)), "MLFLOW_AUTH_ADMIN_PASSWORD": password}
    hosts: dict[str, str] = {}
    if not ipaddress.ip_address(settings.host).is_loopback:  # by default it answers to private addresses too
        own = f"{settings.host}:{settings.mlflow_port}"
        hosts = {"MLFLOW_SERVER_ALLOWED_HOSTS": os.environ.get("MLFLOW_SERVER_ALLOWED_HOSTS", own)}
    return Server(
        name="mlflow",
        command=(*serve, "--log-level", "warning", *app),
        env={
            **env(settings),
            **logins,
            **hosts,
            "_MLFLOW_SERVER_FILE_STORE": _mlflow_url(settings),
            "_MLFLOW_SERVER_ARTIFACT_ROOT": "mlflow-artifacts:/",
            "_MLFLOW_SERVER_ARTIFACT_DESTINATION": str(root / "mlflow-artifacts"),
            "_MLFLOW_SERVER_SERVE_ARTIFACTS": "true",
            "_MLFLOW_SGI_NAME": "uvicorn",
            # Eight more processes (600 MB) for judges that we do not use, orphaned by SIGTERM (measured).
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        },
        ports={"mlflow_port": settings.mlflow_port},
        url=url,
        healthy=lambda _, seconds: answers(
            f"{url}/api/2.0/mlflow/experiments/search?max_results=1", seconds, **login(settings)
        ),
    )


def _mlflow_database(settings: LocalServers) -> str | None:
    return _database(settings.mlflow_database, setting="mlflow_database", scheme="postgresql")


def _mlflow_url(settings: LocalServers) -> str:
    """The database as SQLAlchemy takes it."""
    database = _mlflow_database(settings)
    if database is None:
        return f"sqlite:///{root_of(settings) / 'mlflow.db'}"
    return database.replace("postgresql://", "postgresql+psycopg://", 1)  # SQLAlchemy 2.0 takes psycopg2 by default


def _prefect(settings: LocalServers) -> Server:
    url = endpoints(settings).prefect
    serve = ("server", "start", "--host", settings.host, "--port", str(settings.prefect_port))
    database, password = _prefect_url(settings), _password(settings)
    return Server(
        name="prefect",
        command=(sys.executable, "-m", "prefect", *serve),
        env={
            **env(settings),
            **({} if database is None else {"PREFECT_SERVER_DATABASE_CONNECTION_URL": database}),
            **({} if password is None else {"PREFECT_SERVER_API_AUTH_STRING": f"{ADMIN}:{password}"}),
        },
        ports={"prefect_port": settings.prefect_port},
        url=url,
        healthy=lambda _, seconds: answers(f"{url}/api/health", seconds),
    )


def _prefect_url(settings: LocalServers) -> str | None:
    return _database(settings.prefect_database, setting="prefect_database", scheme="postgresql+asyncpg")


def _worker(settings: LocalServers) -> Server:
    """Prefect's worker, started again whenever it ends: it gives up when Prefect's server is away for long."""
    serve = ("worker", "start", "--type", "process", "--pool", settings.work_pool, "--name", settings.work_pool)
    return Server(
        name="worker",
        command=(*AGAIN, sys.executable, "-m", "prefect", *serve, "--limit", str(settings.max_flow_runs)),
        env={
            **env(settings),
            "PREFECT_WORKER_QUERY_SECONDS": str(settings.worker_poll_seconds),
            # Prefect polls every 120 s for cancelled flow runs where its WebSocket missed the event
            "PREFECT_WORKER_CANCELLATION_POLL_SECONDS": str(settings.worker_poll_seconds),
            "PWD": str(Path.cwd()),  # the folder that prefect.yaml's set_working_directory takes
        },
        ports={},
        url=f"{endpoints(settings).prefect}/work-pools/work-pool/{settings.work_pool}",
        healthy=lambda record, seconds: _polls(settings, record, seconds),
    )


def _sweeper(settings: LocalServers) -> Server:
    api = f"{endpoints(settings).prefect}/api"
    return Server(
        name="sweeper",
        command=(sys.executable, "-m", "vila_ops", "sweep", "--prefect", api),
        env=env(settings),
        ports={},
        url=f"{endpoints(settings).prefect}/automations",
        healthy=lambda record, seconds: record.process().alive() and _reacts(settings, seconds),
    )


def _ray(settings: LocalServers) -> Server:
    """`ray start --block`: a process tree whose leader ends it on SIGTERM, and ends itself when a part of it dies."""
    url = endpoints(settings).ray_dashboard
    ports = {
        "ray_port": settings.ray_port,
        "ray_dashboard_port": settings.ray_dashboard_port,
        "ray_agent_port": settings.ray_agent_port,
        "ray_client_port": settings.ray_client_port,
    }
    listen = (
        *("--node-ip-address", settings.host, "--port", str(settings.ray_port)),
        *("--dashboard-host", settings.host, "--dashboard-port", str(settings.ray_dashboard_port)),
        *("--dashboard-agent-listen-port", str(settings.ray_agent_port)),
        *("--ray-client-server-port", str(settings.ray_client_port)),
    )
    size = (
        *("--num-cpus", str(settings.ray_cpus)),
        *("--object-store-memory", str(settings.ray_object_store_bytes)),
    )
    start = ("-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats", "--log-color", "false")
    return Server(
        name="ray",
        command=(sys.executable, *start, *listen, *size, "--temp-dir", str(ray_folder(settings))),
        env={
            **env(settings),
            # By default the first driver starts a worker for each CPU (1.5 s of CPU), most of which are never used.
            "RAY_prestart_worker_first_driver": "0",
            "RAY_ROTATION_MAX_BYTES": str(settings.log_bytes),  # of each file in its own folder; 512 MB by default
            "RAY_ROTATION_BACKUP_COUNT": str(KEPT),
        },
        ports=ports,
        url=url,
        healthy=lambda _, seconds: _has_live_node(settings, seconds),
        gives_up="The current node timed out during startup",  # after 30 s, which are fixed in ray/_private/node.py
    )


def ray_folder(settings: LocalServers) -> Path:
    """Folder of Ray's sockets and logs. It is outside root, because a socket's path may have 107 characters at most."""
    digest = hashlib.sha256(str(root_of(settings)).encode()).hexdigest()[:8]
    return Path(tempfile.gettempdir()) / f"vila-ops-ray-{os.getuid()}-{digest}"


def _ray_token(root: Path) -> Path:
    return root / "ray.token"


def _prepare_prefect(settings: LocalServers) -> None:
    """Take over what sqlite has, where Prefect's database is in PostgreSQL from now on."""
    url, file = _prefect_url(settings), root_of(settings) / "prefect/prefect.db"
    if url is not None and file.exists():
        _require("psycopg", "prefect_database")
        take_over_prefect(file, url, env(settings))


def prepare(settings: LocalServers, name: Name) -> dict[str, str]:
    """Make what a server needs before it starts; returns variables of this start alone. Raises ValueError."""
    root = root_of(settings)
    if name == "ray":
        _prepare_ray(settings)
    if name == "prefect":
        _prepare_prefect(settings)
    if name != "mlflow":
        return {}
    database = _mlflow_database(settings)
    if database is not None:
        _require("psycopg", "mlflow_database")
    upgrade_mlflow(settings, _mlflow_url(settings), env(settings))
    if database is not None and (file := root / "mlflow.db").exists():
        take_over_mlflow(file, database, env(settings))
    password = _password(settings)
    if password is None:
        return {}
    _require("flask_wtf", "password")
    _make_logins(root, password)
    return {"MLFLOW_FLASK_SERVER_SECRET_KEY": secrets.token_hex(32)}


def _logins(root: Path) -> Path:
    return root / "mlflow-logins.ini"


def _make_logins(root: Path, password: str) -> None:
    """Write the settings of MLflow's logins. A new password costs their database, with the users that were added."""
    path, wanted = _logins(root), LOGINS.format(folder=root, admin=ADMIN, digest=fingerprint(password))
    if not path.exists() or path.read_text() != wanted:
        (root / "mlflow-logins.db").unlink(missing_ok=True)
        write_private(path, wanted)


def _prepare_ray(settings: LocalServers) -> None:
    """Create Ray's token, readable by its owner alone, and an empty folder for Ray. Raises ValueError.

    Ray listens on every interface whatever its options say (`--node-ip-address 127.0.0.1` becomes the outer address),
    so only the token protects it.
    """
    token = _ray_token(root_of(settings))
    if not token.exists():
        write_private(token, secrets.token_hex(32))
    folder = ray_folder(settings)
    if folder.is_dir() and not folder.is_symlink() and folder.stat().st_uid == os.getuid():
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.is_symlink() or folder.stat().st_uid != os.getuid():
        raise ValueError(f"{folder} belongs to another user; set TMPDIR to a folder of your own")


_NO_TLS = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
"""A context without certificates: our servers speak HTTP, and reading certificates for each request costs 20 ms."""


def get_json(url: str, seconds: float, **request: Any) -> Any:
    """The JSON of a successful answer, None for any other. Proxies are not used."""
    import httpx  # heavy: it imports rich; `status` needs it only for servers that run

    try:
        with httpx.Client(timeout=seconds, trust_env=False, verify=_NO_TLS) as client:
            answer = client.request("POST" if "json" in request else "GET", url, **request)
            return answer.json() if answer.is_success else None
    except (httpx.HTTPError, json.JSONDecodeError):
        return None


def answers(url: str, seconds: float, **request: Any) -> bool:
    """Whether a GET of a URL returns JSON in time."""
    return get_json(url, seconds, **request) is not None


def _has_live_node(settings: LocalServers, seconds: float) -> bool:
    """Whether the head's own node can take tasks and jobs. The dashboard answers seconds before it can."""
    token = _ray_token(root_of(settings))
    if not token.is_file():
        return False
    headers = {"Authorization": f"Bearer {token.read_text()}"}
    answer = get_json(f"{endpoints(settings).ray_dashboard}/api/v0/nodes", seconds, headers=headers)
    return answer is not None and any(node["state"] == "ALIVE" for node in answer["data"]["result"]["result"])


def _reacts(settings: LocalServers, seconds: float) -> bool:
    """Whether Prefect has an automation that reacts to the sweeper."""
    wanted = {"automations": {"name": {"any_": [AUTOMATION]}}}
    url = f"{endpoints(settings).prefect}/api/automations/filter"
    return bool(get_json(url, seconds, json=wanted, **login(settings)))


def _polls(settings: LocalServers, record: ProcessRecord, seconds: float) -> bool:
    """Whether Prefect has had a heartbeat of the worker since this one was started."""
    url = f"{endpoints(settings).prefect}/api/work_pools/{settings.work_pool}/workers/filter"
    return any(
        worker["status"] == "ONLINE"
        and datetime.fromisoformat(worker["last_heartbeat_time"]).timestamp() >= record.started
        for worker in get_json(url, seconds, json={}, **login(settings)) or []
    )
