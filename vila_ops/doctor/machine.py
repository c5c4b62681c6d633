"""Checks of this machine: its software, capacity, device, store, trackers and servers."""

import shutil
from collections.abc import Iterator

import psutil

from vila_ops import local
from vila_ops.artifacts.store import root_of, throughput
from vila_ops.config import Resources
from vila_ops.config.local import LocalServers
from vila_ops.doctor.finding import Finding, tried
from vila_ops.doctor.services import device_findings, services, serving
from vila_ops.doctor.software import software
from vila_ops.local.deployments import check_work_pools

DISK_BYTES = 10 * 2**30
MEMORY_BYTES = 8 * 2**30


def examine(settings: LocalServers, resources: Resources) -> list[Finding]:
    """All checks, whatever fails."""
    return [
        *software(), *_capacity(resources), *device_findings(resources),
        *dict.fromkeys((*services(resources), *serving(resources))),  # one engine may be asked for twice
        *tried(lambda: _throughput(root_of(resources.storage.store))), *_servers(settings),
    ]  # fmt: skip


def _capacity(resources: Resources) -> Iterator[Finding]:
    scratch = resources.storage.scratch()
    there = next(folder for folder in (scratch, *scratch.parents) if folder.exists())
    free, memory = shutil.disk_usage(there).free, psutil.virtual_memory().total
    yield Finding(
        ok=free >= DISK_BYTES,
        text=f"{free / 2**30:.0f} GiB free on the disk of {scratch}; {DISK_BYTES / 2**30:.0f} are needed",
    )
    yield Finding(
        ok=memory >= MEMORY_BYTES, text=f"{memory / 2**30:.0f} GiB of memory; {MEMORY_BYTES / 2**30:.0f} are needed"
    )


def _throughput(store: str) -> str:
    wrote, read = throughput(store)
    return f"store {store}: writes {wrote / 1e6:.0f} MB/s and reads {read / 1e6:.0f} MB/s, one file at a time"


def _servers(settings: LocalServers) -> Iterator[Finding]:
    for server in local.status(settings):
        ok = server.state != "unhealthy"
        yield Finding(ok=ok, text=f"{server.name}: {server.state}" + ("" if ok else "; `vila-ops up` starts it again"))
        if server.name == "prefect" and server.state == "healthy":
            yield from tried(lambda: check_work_pools(settings))
