"""Connect to a Ray cluster that is already up, and what a process of ours is in it."""

import logging
import os
import socket
import sys
from typing import Any

from vila_ops.config import Resources
from vila_ops.device import device_of
from vila_ops.errors import ClusterFull, ClusterUnreachable

ALLOCATOR = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**33)}
"""Settings with which glibc keeps freed memory for the next step, in the threads of Ray Train too. Without them a
training step of a 135M model on a CPU takes 1.7 times as long, mostly in page faults (measured)."""
CONNECT_SECONDS = 10.0
"""How long the head of a cluster may take to accept a connection."""


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
    try:
        ray.init(
            address=resources.ray_address,
            runtime_env={"env_vars": {**ALLOCATOR, "HF_HUB_DISABLE_PROGRESS_BARS": "1"}},
            logging_level=logging.WARNING,
            log_to_driver=True,
        )
    except ConnectionError as error:
        raise _unreachable(str(resources.ray_address)) from error


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


def check_gpus(resources: Resources, gpus_per_worker: int) -> None:
    """Before a task works: raise if it needs a GPU and this process (inline) or every node of the cluster has none.

    Raises ValueError for this process. Raises ClusterFull for the cluster, as a node may join.
    """
    if not gpus_per_worker:
        return
    if resources.launch == "inline":
        device_of(gpus_per_worker)
    elif not cluster_gpus(resources):
        raise ClusterFull(
            f"gpus_per_worker is {gpus_per_worker}, but no node of the cluster at {resources.ray_address} has a GPU; "
            f"add one (`ray start --num-gpus` says what Ray does not find itself), or set gpus_per_worker to 0"
        )


def cluster_gpus(resources: Resources) -> float:
    """The GPUs of the cluster's live nodes, in use or not. Raises ClusterUnreachable."""
    import ray

    connect(resources)
    there: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    return there.get("GPU", 0.0)


def log_to_driver() -> None:
    """Send the log of this Ray worker to its standard output, which Ray forwards to the driver."""
    logging.basicConfig(level=logging.WARNING, stream=sys.stdout, format="%(name)s: %(message)s", force=True)
    logging.getLogger("vila_ops").setLevel(logging.INFO)


def whoami() -> dict[str, Any]:
    """What this process is, for a manifest: `inline`, or a worker of a Ray node, with ids and pid."""
    if "RAY_RAYLET_PID" not in os.environ:  # a raylet sets it in the workers that it starts
        return {"launch": "inline", "pid": os.getpid()}
    import ray

    context = ray.get_runtime_context()
    ids = {"node": context.get_node_id(), "actor": context.get_actor_id(), "worker": context.get_worker_id()}
    return {"launch": "ray", **{key: value for key, value in ids.items() if value}, "pid": os.getpid()}
