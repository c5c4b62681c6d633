"""Connect to a Ray cluster that is already up, and what a process of ours is in it."""

import logging
import os
import signal
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from vila_ops import logs, tracing
from vila_ops.config import Resources
from vila_ops.config.secrets import PASSWORD
from vila_ops.device import Device, choose, device_named, device_of
from vila_ops.errors import ClusterFull, ClusterUnreachable

ALLOCATOR = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**33)}
"""Settings with which glibc keeps freed memory for the next step, in the threads of Ray Train too. Without them a
training step of a 135M model on a CPU takes 1.7 times as long, mostly in page faults (measured)."""
ACCELERATOR_TYPE = "ray.io/accelerator-type"
"""Ray's label of a node's GPUs."""
UNLABELLED = "unnamed"
"""The kind of GPUs without that label."""
NODE_GROUP = "ray.io/node-group"
"""Ray's label of a node that KubeRay or Ray's cluster launcher started. Ray does not tell which other groups there are,
nor whether an autoscaler adds nodes to them."""
CONNECT_SECONDS = 10.0
"""How long the head of a cluster may take to accept a connection."""
STOP_SECONDS = 12.0
"""How long a process whose node is dead may take to end by itself before it is killed."""
log = logging.getLogger(__name__)


def connect(resources: Resources) -> None:
    """Connect this process to the cluster of the resources, until the process ends or connects to another cluster.

    Tasks of one flow share the connection, so that Ray reuses worker processes that have imported our modules. Raises
    ClusterUnreachable.
    """
    import ray

    if ray.is_initialized():
        if ray.get_runtime_context().gcs_address == resources.ray_address:
            return
        ray.shutdown()
    _check_listens(str(resources.ray_address))
    os.environ.setdefault("RAY_COLOR_PREFIX", "0")  # workers' lines go into files and pages, not to a terminal alone
    with _kept_handler():
        try:
            ray.init(
                address=resources.ray_address,
                runtime_env={"env_vars": {**ALLOCATOR, "HF_HUB_DISABLE_PROGRESS_BARS": "1", **passed_on()}},
                logging_level=logging.WARNING,
                log_to_driver=True,
            )
        except ConnectionError as error:
            raise _unreachable(str(resources.ray_address)) from error
    _end_with_node()


def _end_with_node() -> None:
    """Let this process end, as by SIGTERM, when the raylet of the node that it is connected through is dead.

    What it waits for never comes then. Ray ends a driver that has lost the head for a minute. Where a new head listens
    at the same address before, it refuses each of the driver's calls, which Ray repeats for ever.
    """
    import ray

    node = ray.get_runtime_context().get_node_id()
    (path,) = (one["RayletSocketName"] for one in ray.nodes() if one["NodeID"] == node)  # type: ignore[no-untyped-call]
    raylet = socket.socket(socket.AF_UNIX)
    raylet.connect(path)
    threading.Thread(target=_outlive, args=(raylet, node), name="node of Ray", daemon=True).start()


def _outlive(raylet: socket.socket, node: str) -> None:
    """Wait until a raylet has closed its end, and end this process if it is still connected through this node."""
    import ray

    with raylet, suppress(ConnectionError):
        raylet.recv(1)
    if not (ray.is_initialized() and ray.get_runtime_context().get_node_id() == node):
        return
    log.error("the Ray node of this process has ended, and so does it; what was finished is kept: run it again")
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(STOP_SECONDS)
    os.kill(os.getpid(), signal.SIGKILL)


@contextmanager
def _kept_handler() -> Iterator[None]:
    """Keep what this process does on SIGTERM, if it has decided that: `ray.init` makes it a SystemExit.

    A flow run could not tell then that it was cancelled, and its job on the cluster would go on.
    """
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if callable(before) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


def passed_on() -> dict[str, str]:
    """The variables by which a process on a cluster logs and sends spans as this one does.

    Raises ValueError for one with a password in a URL, since Ray shows variables.
    """
    variables = {**logs.environment(), **tracing.environment()}
    for name, value in variables.items():
        if PASSWORD.search(value):
            raise ValueError(
                f"{name} has a password in its URL, which Ray's dashboard would show; leave it out, and set "
                f"OTEL_EXPORTER_OTLP_HEADERS where a node starts"
            )
    return variables


def _check_listens(address: str) -> None:
    """Raise ClusterUnreachable where nothing accepts a connection, since `ray.init` would wait for minutes."""
    host, _, port = address.rpartition(":")
    if not (host and port.isdecimal()):
        raise ValueError(f"ray_address {address!r} is not host:port, such as 127.0.0.1:6379")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_SECONDS).close()
    except OSError as error:
        raise _unreachable(address) from error


def _unreachable(address: str) -> ClusterUnreachable:
    return ClusterUnreachable(
        f"no Ray cluster accepts a connection at {address}; start one with `vila-ops up` or `ray start --head`; if it "
        f"asks for a token, set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH=FILE"
    )


def device_on(resources: Resources, wanted: Device) -> Device:
    """The device that a worker is given, before it works; `auto` on a cluster becomes `cpu`, or what its GPUs are.

    Raises ValueError for a device that this process (inline) does not have, and for a cluster with several kinds of
    GPUs. Raises ClusterFull for a cluster without the GPU, as a node may join; not for one that may grow by itself, as
    Ray adds a node for a worker that waits.
    """
    if wanted == "cpu":
        return wanted
    if resources.launch == "inline":
        device_of(wanted)
        return wanted
    nodes = live_nodes(resources)
    return device_among(gpus_of(nodes), resources, wanted, grows=may_grow(nodes))


def device_among(gpus: Mapping[str, float], resources: Resources, wanted: Device, *, grows: bool) -> Device:
    """The device of a worker on a cluster with these numbers of GPUs by kind. Raises what `device_on` raises."""
    address, kind = resources.ray_address, resources.accelerator_type
    if not gpus and wanted == "auto" and kind is None:
        return "cpu"
    add = f"add a node with one (`ray start --num-gpus N --labels {ACCELERATOR_TYPE}=KIND` says what Ray does not find)"
    if not gpus and not grows:
        asked = f"device is {wanted}" + (f" and accelerator_type {kind}" if kind else "")
        raise ClusterFull(f"{asked}, but the cluster at {address} has no GPU; {add}, or set device to cpu")
    kinds = ", ".join(f"{number:g} of {name}" for name, number in sorted(gpus.items()))
    if kind is not None and kind not in gpus and not grows:
        raise ClusterFull(
            f"accelerator_type is {kind}, but the GPUs of the cluster at {address} are {kinds}; {add}, or set "
            f"accelerator_type to one that is there"
        )
    if kind is None and len(gpus) > 1:
        raise ValueError(
            f"the GPUs of the cluster at {address} are of several kinds, and workers of one stage need one: {kinds}; "
            f"set accelerator_type to one of them"
        )
    return device_named(kind or next(iter(gpus), UNLABELLED)) if wanted in ("auto", "gpu") else wanted


def live_nodes(resources: Resources) -> list[Mapping[str, Any]]:
    """The cluster's live nodes, as `ray.nodes` describes them. Raises ClusterUnreachable."""
    import ray

    connect(resources)
    return [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]


def gpus_of(nodes: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The GPUs of nodes, in use or not, by Ray's name of their kind."""
    there: Counter[str] = Counter()
    for node in nodes:
        if gpus := node["Resources"].get("GPU", 0.0):
            there[node["Labels"].get(ACCELERATOR_TYPE, UNLABELLED)] += gpus
    return dict(there)


def may_grow(nodes: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the cluster of these nodes may get others by itself, as far as Ray tells it: see NODE_GROUP."""
    return any(NODE_GROUP in node["Labels"] for node in nodes)


def gpu_options(resources: Resources, device: Device) -> dict[str, Any]:
    """Ray's options of an actor on a device that `device_on` gave: one GPU, of the kind that the resources name."""
    label = gpu_label(resources, device)
    return {"num_gpus": int(device != "cpu"), **({"label_selector": label} if label else {})}


def gpu_label(resources: Resources, device: Device) -> dict[str, str]:
    """The label of the nodes that workers on a device are placed on; empty for any node."""
    usable = resources.accelerator_type
    return {} if device == "cpu" or usable is None else {ACCELERATOR_TYPE: usable}


def take_own_gpu() -> None:
    """Compute on the GPU that Ray gave this worker, if it has one."""
    import ray

    if names := ray.get_gpu_ids():
        choose(str(names[0]))


def log_to_driver() -> None:
    """Send the log of this Ray worker to its standard output, which Ray forwards to the driver."""
    logs.configure(sys.stdout, text="%(name)s: %(message)s", force=True)


def whoami() -> dict[str, Any]:
    """What this process is, for a manifest: `inline`, or a worker of a Ray node, with ids and pid."""
    if "RAY_RAYLET_PID" not in os.environ:  # a raylet sets it in the workers that it starts
        return {"launch": "inline", "pid": os.getpid()}
    import ray

    context = ray.get_runtime_context()
    ids = {"node": context.get_node_id(), "actor": context.get_actor_id(), "worker": context.get_worker_id()}
    return {"launch": "ray", **{key: value for key, value in ids.items() if value}, "pid": os.getpid()}
