"""The servers of one box (MLflow, Prefect, its worker, a Ray head): started, adopted and ended by what was recorded."""

import fcntl
import hashlib
import json
import logging
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import httpx
import psutil
import yaml

from vila_ops.config.base import Config, fingerprint
from vila_ops.config.local import LocalServers

log = logging.getLogger(__name__)

Name = Literal["mlflow", "prefect", "ray", "worker"]
NAMES: tuple[Name, ...] = ("mlflow", "prefect", "ray", "worker")

TELEMETRY_OFF = {
    "DO_NOT_TRACK": "1",
    "DVC_NO_ANALYTICS": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "RAY_USAGE_STATS_ENABLED": "0",
}
QUICK_SECONDS = 5.0
"""How long a server that is up may take to answer; MLflow's first answer, which makes its tables, takes longer."""
START_TIME_SLACK_SECONDS = 1.0
"""The kernel's start times shift a little when the clock is set."""


class Endpoints(Config):
    """Where the servers of this box listen."""

    mlflow: str
    prefect: str
    """The page; the API is below it at /api."""
    ray: str
    """host:port, for `ray_address`."""
    ray_dashboard: str
    serve: str
    """Where `deploy` will listen."""


class ServerStatus(Config):
    """One server, as it is now."""

    name: Name
    state: Literal["healthy", "unhealthy", "stopped"]
    url: str
    pid: int | None
    """None: it does not run."""
    memory_bytes: int
    """Of its whole process tree; pages that processes share are counted once."""


class Record(Config):
    """A server that `up` started, as kept in root/pids/NAME.json."""

    name: Name
    pid: int
    started: float
    """The leader's start time by the kernel; with the pid it names one process for good."""
    command: tuple[str, ...]
    env: dict[str, str]
    directory: str
    """Working directory: two checkouts may not share one root."""


@dataclass(frozen=True)
class _Server:
    """What should run: how to start it, what it listens on, and how to see that it works."""

    name: Name
    command: tuple[str, ...]
    env: dict[str, str]
    ports: dict[str, int]
    """By the name of the setting, so that an error can say what to change."""
    url: str
    healthy: Callable[[Record, float], bool]
    """Record, seconds to wait for an answer."""


def up(settings: LocalServers, *, only: Collection[Name] = NAMES) -> Endpoints:
    """The servers run, answer and are as configured; those that were so already were left alone.

    What became healthy stays up when another fails, so that the next call continues from there.
    """
    root = _root(settings)
    servers = {name: server for name, server in _servers(settings).items() if name in only}
    with _lock(root), ThreadPoolExecutor() as pool:
        _refuse_foreigners(settings, servers.values())
        # All endings come before any start: a port may pass from one server to another.
        up_already = dict(
            zip(servers, pool.map(lambda server: _adopt(settings, server), servers.values()), strict=True)
        )
        missing = {name: server for name, server in servers.items() if not up_already[name]}
        starts = {name: pool.submit(_start, settings, server) for name, server in missing.items() if name != "worker"}
        pending = list(starts.values())
        if "prefect" in servers and ("prefect" not in starts or starts["prefect"].exception() is None):
            _make_work_pool(settings)
            pending.append(pool.submit(_deploy, settings))
            if "worker" in missing:
                pending.append(pool.submit(_start, settings, missing["worker"]))
        errors = [error for future in pending if (error := future.exception())]
    if errors:
        raise RuntimeError("\n\n".join(str(error) for error in errors)) from errors[0]
    return endpoints(settings)


def down(settings: LocalServers) -> None:
    """No process that `up` started is left, nor anything outside root; what they stored below root is kept."""
    root = _root(settings)
    with _lock(root):
        records = [record for name in NAMES if (record := _read_record(root, name))]
        with ThreadPoolExecutor() as pool:
            for future in [pool.submit(_end, settings, record) for record in records]:
                future.result()
        shutil.rmtree(_ray_folder(settings), ignore_errors=True)


def status(settings: LocalServers) -> list[ServerStatus]:
    """Every server as it is now; changes nothing."""
    root = _root(settings)
    return [_status(server, _read_record(root, name)) for name, server in _servers(settings).items()]


def env(settings: LocalServers) -> dict[str, str]:
    """The environment of whatever uses these servers: set it before Prefect, MLflow or Ray are imported."""
    root = _root(settings)
    asked = {name: os.environ[name] for name in ("HF_HUB_OFFLINE",) if name in os.environ}
    return {
        **TELEMETRY_OFF,
        **asked,
        "MLFLOW_TRACKING_URI": endpoints(settings).mlflow,
        "PREFECT_API_URL": f"{endpoints(settings).prefect}/api",
        "PREFECT_HOME": str(root / "prefect"),
        "PREFECT_LOGGING_EXTRA_LOGGERS": "vila_ops",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(_ray_token(root)),
        # ray.train.report() waits for the next check: 2.0 s a call at the default of 2 s, 0.1 s at this (measured).
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1",
    }


def endpoints(settings: LocalServers) -> Endpoints:
    """Where the servers listen, whether they run or not."""
    host = settings.host
    return Endpoints(
        mlflow=f"http://{host}:{settings.mlflow_port}",
        prefect=f"http://{host}:{settings.prefect_port}",
        ray=f"{host}:{settings.ray_port}",
        ray_dashboard=f"http://{host}:{settings.ray_dashboard_port}",
        serve=f"http://{host}:{settings.serve_port}",
    )


# What should run


def _servers(settings: LocalServers) -> dict[Name, _Server]:
    servers = (_mlflow(settings), _prefect(settings), _ray(settings), _worker(settings))
    return {server.name: server for server in servers}


def _mlflow(settings: LocalServers) -> _Server:
    """MLflow's application under uvicorn, as `mlflow server` starts it, without the parent that `mlflow server` keeps.

    That parent imports MLflow a second time: 6 s of CPU and 250 MB more (measured).
    """
    root = _root(settings)
    url = endpoints(settings).mlflow
    serve = (sys.executable, "-m", "uvicorn", "--host", settings.host, "--port", str(settings.mlflow_port))
    return _Server(
        name="mlflow",
        command=(*serve, "--log-level", "warning", "mlflow.server.fastapi_app:app"),
        env={
            **env(settings),
            "_MLFLOW_SERVER_FILE_STORE": f"sqlite:///{root / 'mlflow.db'}",
            "_MLFLOW_SERVER_ARTIFACT_ROOT": "mlflow-artifacts:/",
            "_MLFLOW_SERVER_ARTIFACT_DESTINATION": str(root / "mlflow-artifacts"),
            "_MLFLOW_SERVER_SERVE_ARTIFACTS": "true",
            "_MLFLOW_SGI_NAME": "uvicorn",
            # Eight processes more (600 MB), for judges that we do not use, and orphans after SIGTERM (measured).
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        },
        ports={"mlflow_port": settings.mlflow_port},
        url=url,
        healthy=lambda _, seconds: _answers(f"{url}/api/2.0/mlflow/experiments/search?max_results=1", seconds),
    )


def _prefect(settings: LocalServers) -> _Server:
    url = endpoints(settings).prefect
    serve = ("server", "start", "--host", settings.host, "--port", str(settings.prefect_port))
    return _Server(
        name="prefect",
        command=(sys.executable, "-m", "prefect", *serve),
        env=env(settings),
        ports={"prefect_port": settings.prefect_port},
        url=url,
        healthy=lambda _, seconds: _answers(f"{url}/api/health", seconds),
    )


def _worker(settings: LocalServers) -> _Server:
    serve = ("worker", "start", "--type", "process", "--pool", settings.work_pool, "--name", settings.work_pool)
    return _Server(
        name="worker",
        command=(sys.executable, "-m", "prefect", *serve, "--limit", str(settings.max_flow_runs)),
        env={
            **env(settings),
            "PREFECT_WORKER_QUERY_SECONDS": str(settings.worker_poll_seconds),
            "PWD": str(Path.cwd()),  # where prefect.yaml's set_working_directory takes a flow run
        },
        ports={},
        url=f"{endpoints(settings).prefect}/work-pools/work-pool/{settings.work_pool}",
        healthy=lambda record, seconds: _polls(settings, record, seconds),
    )


def _ray(settings: LocalServers) -> _Server:
    """`ray start --block`: one process tree whose leader ends it all on SIGTERM, and itself when a part of it dies."""
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
    return _Server(
        name="ray",
        command=(sys.executable, *start, *listen, *size, "--temp-dir", str(_ray_folder(settings))),
        env=env(settings),
        ports=ports,
        url=url,
        healthy=lambda _, seconds: _has_live_node(settings, seconds),
    )


def _ray_folder(settings: LocalServers) -> Path:
    """Not below root: Ray puts sockets there, and the path of a socket may have 107 characters."""
    digest = hashlib.sha256(str(_root(settings)).encode()).hexdigest()[:8]
    return Path(tempfile.gettempdir()) / f"vila-ops-ray-{os.getuid()}-{digest}"


def _ray_token(root: Path) -> Path:
    return root / "ray.token"


# Health


def _get(url: str, seconds: float, **request: Any) -> Any:
    """The JSON of an answer, None where there is no good one; proxies are not asked about loopback."""
    try:
        with httpx.Client(timeout=seconds, trust_env=False) as client:
            answer = client.request("POST" if "json" in request else "GET", url, **request)
            return answer.json() if answer.is_success else None
    except (httpx.HTTPError, json.JSONDecodeError):
        return None


def _answers(url: str, seconds: float) -> bool:
    return _get(url, seconds) is not None


def _has_live_node(settings: LocalServers, seconds: float) -> bool:
    """The head's own node is there, so that tasks and jobs can be placed; an answer alone comes seconds earlier."""
    token = _ray_token(_root(settings))
    if not token.is_file():
        return False
    headers = {"Authorization": f"Bearer {token.read_text()}"}
    answer = _get(f"{endpoints(settings).ray_dashboard}/api/v0/nodes", seconds, headers=headers)
    return answer is not None and any(node["state"] == "ALIVE" for node in answer["data"]["result"]["result"])


def _polls(settings: LocalServers, record: Record, seconds: float) -> bool:
    """Prefect hears from our worker, and has since this one was started."""
    url = f"{endpoints(settings).prefect}/api/work_pools/{settings.work_pool}/workers/filter"
    return any(
        worker["status"] == "ONLINE"
        and datetime.fromisoformat(worker["last_heartbeat_time"]).timestamp() >= record.started
        for worker in _get(url, seconds, json={}) or []
    )


# Start, adopt, end


def _adopt(settings: LocalServers, server: _Server) -> bool:
    """Whether it runs as configured and answers; one that does not is ended."""
    record = _read_record(_root(settings), server.name)
    if record is None:
        return False
    if _leader(record) and _as_configured(record, server) and server.healthy(record, QUICK_SECONDS):
        log.info("%s: already up, pid %d, %s", server.name, record.pid, server.url)
        return True
    _end(settings, record)
    return False


def _start(settings: LocalServers, server: _Server) -> None:
    """It runs and answers, or it is ended and the error shows its last words."""
    root = _root(settings)
    if server.name == "ray":
        _prepare_ray(settings)
    began = time.monotonic()
    record = _spawn(root, server)
    while not server.healthy(record, settings.start_timeout_seconds):
        alive = _leader(record)
        if not alive or time.monotonic() - began > settings.start_timeout_seconds:
            _end(settings, record)
            reason = "did not answer in time" if alive else "ended"
            raise RuntimeError(
                f"{server.name} {reason} after {time.monotonic() - began:.0f} s; {_tail(root, server.name)}"
            )
        time.sleep(0.1)
    log.info("%s: up after %.1f s, pid %d, %s", server.name, time.monotonic() - began, record.pid, server.url)


def _spawn(root: Path, server: _Server) -> Record:
    """Start it in a session of its own and record it; the log of its last life is kept beside the new one."""
    logs = root / "logs"
    logs.mkdir(exist_ok=True)
    if (last := logs / f"{server.name}.log").exists():
        last.replace(logs / f"{server.name}.last.log")
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)))
    output = os.open(logs / f"{server.name}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        pid = os.posix_spawn(
            server.command[0],
            server.command,
            {**os.environ, "PATH": path, **server.env},
            file_actions=[
                (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                (os.POSIX_SPAWN_DUP2, output, 1),
                (os.POSIX_SPAWN_DUP2, output, 2),
            ],
            setsid=True,
        )
    finally:
        os.close(output)
    record = Record(
        name=server.name,
        pid=pid,
        started=psutil.Process(pid).create_time(),
        command=server.command,
        env=server.env,
        directory=str(Path.cwd()),
    )
    _write(_record_path(root, server.name), record.model_dump_json(indent=2))
    return record


def _end(settings: LocalServers, record: Record) -> None:
    """End the recorded server and everything that it started; forget it."""
    began = time.monotonic()
    leader = _leader(record)
    # The leader first: Ray's head takes its parts down in order (5 s), while some of them ignore SIGTERM.
    for end, processes in (
        (psutil.Process.terminate, [leader] if leader else []),
        (psutil.Process.terminate, None),
        (psutil.Process.kill, None),
        (psutil.Process.kill, None),
    ):
        targets = _processes(record) if processes is None else processes
        for process in targets:
            with suppress(psutil.NoSuchProcess):
                end(process)
        psutil.wait_procs(targets, timeout=settings.stop_grace_seconds)
    if left := _processes(record):
        raise RuntimeError(f"{record.name}: processes {[process.pid for process in left]} survive SIGKILL")
    _record_path(_root(settings), record.name).unlink(missing_ok=True)
    log.info("%s: ended after %.1f s", record.name, time.monotonic() - began)


def _leader(record: Record) -> psutil.Process | None:
    """The recorded process, if it still lives; a later owner of its pid is not it."""
    try:
        process = psutil.Process(record.pid)
        same = abs(process.create_time() - record.started) < START_TIME_SLACK_SECONDS
        return process if same and process.status() != psutil.STATUS_ZOMBIE else None
    except psutil.NoSuchProcess:
        return None


def _processes(record: Record) -> list[psutil.Process]:
    """The recorded process, the rest of its session, and their descendants in sessions of their own.

    A session outlives its leader (Ray's agents do when their head is killed), and as long as it does the kernel gives
    the leader's pid to nobody else: a stranger under that pid means that the session is gone.
    """
    if psutil.pid_exists(record.pid) and not _leader(record) and not _is_zombie(record.pid):
        return []
    children: dict[int, list[psutil.Process]] = {}
    found: dict[int, psutil.Process] = {}
    for process in psutil.process_iter():
        try:
            if process.status() == psutil.STATUS_ZOMBIE:
                continue
            children.setdefault(process.ppid(), []).append(process)
            recent = process.create_time() >= record.started - START_TIME_SLACK_SECONDS
            if recent and os.getsid(process.pid) == record.pid:
                found[process.pid] = process
        except (psutil.NoSuchProcess, ProcessLookupError):
            continue
    pending = list(found)
    while pending:
        new = [child for child in children.get(pending.pop(), []) if child.pid not in found]
        found.update({child.pid: child for child in new})
        pending += [child.pid for child in new]
    return list(found.values())


def _is_zombie(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def _as_configured(record: Record, server: _Server) -> bool:
    return (record.command, record.env, record.directory) == (server.command, server.env, str(Path.cwd()))


def _prepare_ray(settings: LocalServers) -> None:
    """A token that only we can read, and an empty folder that is only ours.

    Ray listens on every interface whatever it is told (`--node-ip-address 127.0.0.1` becomes the outer address), so
    the token is what keeps others out.
    """
    token = _ray_token(_root(settings))
    if not token.exists():
        _write(token, secrets.token_hex(32))
    folder = _ray_folder(settings)
    if folder.is_dir() and not folder.is_symlink() and folder.stat().st_uid == os.getuid():
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.is_symlink() or folder.stat().st_uid != os.getuid():
        raise RuntimeError(f"{folder} belongs to another user; set TMPDIR to a folder of your own")


def _refuse_foreigners(settings: LocalServers, servers: Iterable[_Server]) -> None:
    """No port that we need is held by a process that `up` did not start."""
    records = [record for name in NAMES if (record := _read_record(_root(settings), name))]
    ours = {process.pid for record in records for process in _processes(record)}
    listeners = {
        connection.laddr.port: connection.pid
        for connection in psutil.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN and connection.laddr
    }
    wanted = {key: port for server in servers for key, port in server.ports.items()}
    faults = [
        f"port {port} is held by {_describe(listeners[port])}, which `vila-ops up` did not start; "
        f"end it, or set {key} in configs/local.yaml to a free port"
        for key, port in {**wanted, "serve_port": settings.serve_port}.items()
        if port in listeners and listeners[port] not in ours
    ]
    if faults:
        raise RuntimeError("\n".join(faults))


def _describe(pid: int | None) -> str:
    if pid is None:
        return "a process of another user"
    try:
        return f"process {pid} ({' '.join(psutil.Process(pid).cmdline())})"
    except psutil.Error:
        return f"process {pid}"


def _status(server: _Server, record: Record | None) -> ServerStatus:
    if record is None or not _leader(record):
        return ServerStatus(name=server.name, state="stopped", url=server.url, pid=None, memory_bytes=0)
    return ServerStatus(
        name=server.name,
        state="healthy" if server.healthy(record, QUICK_SECONDS) else "unhealthy",
        url=server.url,
        pid=record.pid,
        memory_bytes=sum(_memory_bytes(process) for process in _processes(record)),
    )


def _memory_bytes(process: psutil.Process) -> int:
    try:
        return int(process.memory_full_info().pss)
    except psutil.Error:
        return 0


# Prefect's pool and deployments


def _make_work_pool(settings: LocalServers) -> None:
    """The pool is there; the worker fills in the rest of it when it starts."""
    pools = f"{endpoints(settings).prefect}/api/work_pools"
    if not _answers(f"{pools}/{settings.work_pool}", QUICK_SECONDS):
        _get(f"{pools}/", settings.start_timeout_seconds, json={"name": settings.work_pool, "type": "process"})


def _deploy(settings: LocalServers) -> None:
    """Prefect's deployments are those of prefect_file, with the parameters that their flows have now."""
    file = Path(settings.prefect_file)
    if not file.is_file():
        raise RuntimeError(f"no such file: {file}; run this in the checkout, or set prefect_file in configs/local.yaml")
    wanted = yaml.safe_load(file.read_text())["deployments"]
    digest = _flows_digest(file, wanted)
    url = f"{endpoints(settings).prefect}/api/deployments/filter"
    live = {found["name"]: found["version"] for found in _get(url, QUICK_SECONDS, json={}) or []}
    if all(live.get(deployment["name"]) == digest for deployment in wanted):
        return
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all", "--prefect-file", str(file)],
        env={**os.environ, **env(settings), "PWD": str(Path.cwd()), "VILA_OPS_FLOWS": digest},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=settings.start_timeout_seconds,
    )
    if done.returncode:
        raise RuntimeError(f"prefect deploy of {file} failed:\n{done.stdout[-4000:]}")
    log.info("deployments: made from %s in %.1f s", file, time.monotonic() - began)


def _flows_digest(file: Path, deployments: list[dict[str, Any]]) -> str:
    """Changes when the file or the Python beside a flow does."""
    folders = {Path(deployment["entrypoint"].partition(":")[0]).parent for deployment in deployments}
    sources = sorted(source for folder in folders for source in folder.glob("*.py"))
    return fingerprint([str(Path.cwd()), file.read_text(), *(source.read_text() for source in sources)])[:16]


# Files below root


def _root(settings: LocalServers) -> Path:
    return Path(settings.root).expanduser().absolute()


@contextmanager
def _lock(root: Path) -> Iterator[None]:
    """One `up` or `down` of a root at a time; the kernel frees it when the holder ends."""
    (root / "pids").mkdir(parents=True, exist_ok=True)
    with (root / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _record_path(root: Path, name: Name) -> Path:
    return root / "pids" / f"{name}.json"


def _read_record(root: Path, name: Name) -> Record | None:
    path = _record_path(root, name)
    try:
        return Record.model_validate_json(path.read_text())
    except FileNotFoundError:
        return None


def _write(path: Path, text: str) -> None:
    """All or nothing, and readable by us alone."""
    draft = path.with_suffix(".draft")
    with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(text)
    draft.replace(path)


def _tail(root: Path, name: Name) -> str:
    path = root / "logs" / f"{name}.log"
    lines = path.read_text(errors="replace").splitlines()[-30:]
    return "\n".join([f"the end of {path}:", *lines])
