"""What this machine lacks, and how to fix it."""

import shutil
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import psutil

from vila_ops import local
from vila_ops.artifacts.store import probe
from vila_ops.cluster import cluster_gpus
from vila_ops.config import Config, Resources
from vila_ops.config.local import LocalServers
from vila_ops.device import device_of
from vila_ops.errors import VilaError

DISK_BYTES = 10 * 2**30
MEMORY_BYTES = 8 * 2**30
CLIENTS = {"npm": "apt-get install nodejs npm", "dpkg-deb": "apt-get install dpkg", "apt-get": "use Debian or Ubuntu"}


class Finding(Config):
    """The result of one check."""

    ok: bool
    text: str
    """What is there; where it is not ok, also how to fix it."""


def examine(settings: LocalServers, resources: Resources) -> list[Finding]:
    """All checks, whatever fails."""
    store = resources.storage.store
    return [*_software(), *_capacity(), *gpu_findings(resources), *_store(store), *_servers(settings)]


def _software() -> Iterator[Finding]:
    python = sys.version_info[:2]
    yield Finding(ok=python == (3, 11), text=f"Python {python[0]}.{python[1]}; 3.11 is needed")
    fastapi = tuple(int(part) for part in version("fastapi").split(".")[:2])
    yield Finding(
        ok=fastapi < (0, 151),
        text=f"fastapi {version('fastapi')}; Prefect's server needs one below 0.151; `make setup` installs that",
    )
    for client, way in CLIENTS.items():
        place = shutil.which(client)
        yield Finding(ok=place is not None, text=f"{client}: {place or f'missing; {way}'}")


def _capacity() -> Iterator[Finding]:
    free = shutil.disk_usage(Path.cwd()).free
    yield Finding(
        ok=free >= DISK_BYTES, text=f"{free / 2**30:.0f} GiB free on disk; {DISK_BYTES / 2**30:.0f} are needed"
    )
    memory = psutil.virtual_memory().total
    yield Finding(
        ok=memory >= MEMORY_BYTES, text=f"{memory / 2**30:.0f} GiB of memory; {MEMORY_BYTES / 2**30:.0f} are needed"
    )


def gpu_findings(resources: Resources) -> Iterator[Finding]:
    """The GPUs that the resources ask for: of this process with launch inline, else of the cluster."""
    train = [resources.train, *(resources.train.for_stage(name) for name in resources.train.stages)]
    needed = max(*(one.num_workers * one.gpus_per_worker for one in train), resources.evaluate.gpus_per_worker)
    if not needed:
        return
    try:
        if resources.launch == "inline":
            yield Finding(ok=True, text=f"GPU: {device_of(1)}")
            return
        there = cluster_gpus(resources)
    except (ValueError, VilaError) as error:
        yield Finding(ok=False, text=f"GPU: {error}")
        return
    yield Finding(ok=there >= needed, text=f"{there:g} GPUs in the cluster; the resources ask for {needed}")


def _store(store: str) -> Iterator[Finding]:
    try:
        yield Finding(ok=True, text=probe(store))
    except (VilaError, OSError) as error:
        yield Finding(ok=False, text=str(error))


def _servers(settings: LocalServers) -> Iterator[Finding]:
    for server in local.status(settings):
        ok = server.state != "unhealthy"
        yield Finding(ok=ok, text=f"{server.name}: {server.state}" + ("" if ok else "; `vila-ops up` starts it again"))
