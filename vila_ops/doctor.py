"""What this machine lacks, and how to fix it."""

import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import version
from pathlib import Path

import psutil

from vila_ops import local, tracking
from vila_ops.artifacts.store import probe
from vila_ops.cluster import cluster_gpus, device_on
from vila_ops.config import Config, Resources, Run
from vila_ops.config.local import LocalServers
from vila_ops.device import describe, device_of
from vila_ops.errors import VilaError
from vila_ops.serve.credentials import check_key
from vila_ops.tracking.outbox import shown

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
    return [*_software(), *_capacity(), *device_findings(resources), *services(resources), *_servers(settings)]


def refuse(run: Run, findings: Iterable[Finding]) -> None:
    """Raise ValueError with every lack among the findings, and its way out."""
    if lacks := [finding.text for finding in findings if not finding.ok]:
        raise ValueError(f"recipe {run.recipe.name!r} cannot run with these resources:\n" + "\n".join(lacks))


def services(resources: Resources) -> Iterator[Finding]:
    """What every run needs: the store, and where there is a registry, MLflow and the key of the endpoint."""
    yield from _store(resources.storage.store)
    if resources.tracking.uri is not None:
        yield from _tried(f"MLflow: {shown(resources.tracking.uri)} answers", lambda: tracking.ask(resources))
        yield from _tried("the endpoint's key is valid", lambda: check_key(resources.serve.access))


def _tried(text: str, check: Callable[[], None]) -> Iterator[Finding]:
    """A check that says by an error what is wrong."""
    try:
        check()
        yield Finding(ok=True, text=text)
    except (ValueError, VilaError, OSError) as error:
        yield Finding(ok=False, text=str(error))


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


def device_findings(resources: Resources) -> Iterator[Finding]:
    """The device that the resources ask for: of this process with launch inline, else the GPUs of the cluster."""
    try:
        device = device_on(resources, resources.device)
        if resources.launch == "inline":
            yield Finding(ok=True, text=f"device {resources.device}: {describe(device_of(device))}")
            return
        there = cluster_gpus(resources)
    except (ValueError, VilaError) as error:
        yield Finding(ok=False, text=f"device: {error}")
        return
    if device == "cpu":
        yield Finding(ok=True, text=f"device {resources.device}: workers compute on the CPUs of the cluster")
        return
    usable = there[resources.accelerator_type] if resources.accelerator_type else sum(there.values())
    stages = [resources.train, *(resources.train.for_stage(name) for name in resources.train.stages)]
    needed = max(one.num_workers for one in stages)
    text = f"device {resources.device}: {usable:g} GPUs in the cluster; the resources ask for {needed}"
    yield Finding(ok=usable >= needed, text=text)


def _store(store: str) -> Iterator[Finding]:
    try:
        yield Finding(ok=True, text=probe(store))
    except (VilaError, OSError) as error:
        yield Finding(ok=False, text=str(error))


def _servers(settings: LocalServers) -> Iterator[Finding]:
    for server in local.status(settings):
        ok = server.state != "unhealthy"
        yield Finding(ok=ok, text=f"{server.name}: {server.state}" + ("" if ok else "; `vila-ops up` starts it again"))
