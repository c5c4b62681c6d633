"""The task `deploy`: ask what is served, change only what differs, and wait until it answers. Light at import."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import httpx

from vila_ops.artifacts.kinds import Deployment, ModelVersion
from vila_ops.artifacts.store import verify
from vila_ops.cluster import connect
from vila_ops.config import NO_CONTEXT, Resources, RunContext, Service
from vila_ops.errors import NotReady
from vila_ops.serve.backends.local_process import ProcessManager, ServiceRecord, free_port
from vila_ops.serve.spec import Spec

START_SECONDS = 300.0
"""How long a new replica may take until it answers."""
POLL_SECONDS = 0.2
ANSWER_SECONDS = 60.0
"""How long the first answer may take."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Watch:
    """How something that was launched is doing."""

    up: Callable[[], bool]
    """Whether it can be asked by HTTP yet."""
    failure: Callable[[], str | None]
    """Why it will never be up; None while it still may."""
    state: Callable[[], str]
    """What it said last."""


def deploy(
    service: Service, version: ModelVersion, resources: Resources, context: RunContext = NO_CONTEXT
) -> Deployment:
    """The service answering with the weights of a registered version; nothing is touched where it does already.

    Raises CorruptArtifact before anything changes, NotReady, and ValueError for a port that another process holds.
    """
    spec = Spec.of(service, version, resources)
    url = _deploy_inline(spec, resources) if resources.launch == "inline" else _deploy_on_ray(spec, resources)
    return Deployment(url=url, model=version.checkpoint.digest, version=version.version)


def undeploy(service: Service, resources: Resources) -> None:
    """End what serves a service; a service that does not run is fine."""
    if resources.launch != "inline":
        from vila_ops.serve.backends import ray_serve as replicas

        connect(resources)
        replicas.remove(service.name)
        return
    desk = ProcessManager(resources.storage.scratch(), service.name)
    with desk.locked():
        if record := desk.read():
            desk.stop(record)


def _deploy_inline(spec: Spec, resources: Resources) -> str:
    desk = ProcessManager(resources.storage.scratch(), spec.service.name)
    with desk.locked():
        record = desk.read()
        if record is not None and _fits(record, spec, resources) and _adopted(record, spec, desk):
            log.info("%s already serves version %d", record.url(), spec.version.version)
            return record.url()
        verify(spec.version.checkpoint)
        if record is not None:
            desk.stop(record)
        port = free_port(resources.serve.host, resources.serve.port)
        record = desk.start(spec, host=resources.serve.host, port=port)
        _await_process(record, spec, desk)
        return record.url()


def _fits(record: ServiceRecord, spec: Spec, resources: Resources) -> bool:
    wanted = (spec.identity(), resources.serve.host, resources.serve.port or record.port)
    return (record.identity, record.host, record.port) == wanted


def _adopted(record: ServiceRecord, spec: Spec, desk: ProcessManager) -> bool:
    """Whether a process that should serve the spec does; one that still loads is waited for."""
    if _identities(record.url()) == [spec.identity()]:
        return True
    try:
        _await_process(record, spec, desk)
    except NotReady as error:
        log.warning("%s; it is started anew", error)
        return False
    return True


def _await_process(record: ServiceRecord, spec: Spec, desk: ProcessManager) -> None:
    def failure() -> str | None:
        return None if record.alive() else f"process {record.pid} ended"

    _await(record.url(), spec, _Watch(up=lambda: True, failure=failure, state=desk.tail))


def _deploy_on_ray(spec: Spec, resources: Resources) -> str:
    if not resources.serve.port:
        raise ValueError(
            f"launch {resources.launch} needs a fixed serve.port: Ray Serve keeps its port for as long as it runs"
        )
    url, name = f"http://{resources.serve.host}:{resources.serve.port}", spec.service.name
    if _identities(url) == [spec.identity()]:  # it says so itself, so Ray need not be asked
        log.info("%s already serves version %d", url, spec.version.version)
        return url
    from vila_ops.serve.backends import ray_serve as replicas

    connect(resources)
    verify(spec.version.checkpoint)
    replicas.apply(spec, host=resources.serve.host, port=resources.serve.port)
    watch = _Watch(
        up=partial(replicas.running, name),
        failure=partial(replicas.failure, name),
        state=partial(replicas.describe, name),
    )
    _await(url, spec, watch)
    return url


def _await(url: str, spec: Spec, watch: _Watch) -> None:
    """Wait until every replica is of the spec and a real question is answered."""
    deadline = time.monotonic() + START_SECONDS
    agreeing = 0
    while agreeing < 2 * spec.capacity.replicas:  # requests go round: an old replica would show up among these
        if problem := watch.failure():
            raise NotReady(f"{spec.service.name} did not come up: {problem}\n{watch.state()}")
        if time.monotonic() > deadline:
            raise NotReady(f"{spec.service.name} was not ready after {START_SECONDS:.0f} seconds\n{watch.state()}")
        if watch.up() and _identities(url) == [spec.identity()]:
            agreeing += 1
        else:
            agreeing = 0
            time.sleep(POLL_SECONDS)
    _ask(url, spec, watch)


def _ask(url: str, spec: Spec, watch: _Watch) -> None:
    question = {"model": spec.version.name, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1}
    try:
        answer = httpx.post(f"{url}/v1/chat/completions", json=question, timeout=ANSWER_SECONDS, trust_env=False)
        fingerprint = answer.raise_for_status().json()["system_fingerprint"]
    except (httpx.HTTPError, ValueError, LookupError) as error:
        raise NotReady(f"{url} does not answer a question: {error!r}\n{watch.state()}") from error
    if fingerprint != spec.version.checkpoint.digest:
        raise NotReady(f"{url} answers with model {fingerprint}, not {spec.version.checkpoint.digest}")


def _identities(url: str) -> list[str] | None:
    """What the live endpoint says that it serves; None where nothing of ours answers."""
    try:
        answer: Any = httpx.get(f"{url}/v1/models", timeout=5, trust_env=False).raise_for_status().json()
        return [model["identity"] for model in answer["data"]]
    except (httpx.HTTPError, ValueError, KeyError, TypeError):
        return None
