"""The task `deploy`: read what is served, change only what differs, and wait until it answers. Light at import."""

import logging
import time

import httpx

from vila_ops.artifacts.kinds import Deployment, ModelVersion
from vila_ops.artifacts.store import verify
from vila_ops.cluster import device_on
from vila_ops.config import NO_CONTEXT, Resources, RunContext, Service
from vila_ops.errors import NotReady
from vila_ops.serve.backends.backend import START_SECONDS, ServiceBackend
from vila_ops.serve.backends.local_process import LocalProcess
from vila_ops.serve.backends.ray_serve import RayServe
from vila_ops.serve.credentials import authorization, check_key
from vila_ops.serve.spec import Spec

POLL_SECONDS = 0.2
ANSWER_SECONDS = 60.0
"""How long the first answer may take."""

log = logging.getLogger(__name__)


def deploy(
    service: Service, version: ModelVersion, resources: Resources, context: RunContext = NO_CONTEXT
) -> Deployment:
    """Serve the weights of a registered version; a service that serves them already stays as it is.

    Raises before anything changes: CorruptArtifact, and ValueError or ClusterFull for a device that is not there.
    Raises NotReady, and ValueError for a port that another process holds. An endpoint that asks for keys is called with
    the one in VILA_API_KEY; without a valid one nothing changes.
    """
    spec = Spec.of(service, version, resources)
    check_key(spec.capacity.access)
    backend = _backend(service.name, resources)
    with backend.locked():
        url = backend.url()
        if url is not None and _identities(url) == [spec.identity()]:
            log.info("%s already serves version %d", url, version.version)
        else:
            device_on(resources, spec.device)
            verify(spec.version.checkpoint)
            url = backend.apply(spec)
            log.info("%s: version %d is starting at %s", service.name, version.version, url)
            _wait_until_ready(url, spec, backend)
    return Deployment(url=url, model=version.checkpoint.digest, version=version.version)


def undeploy(service: Service, resources: Resources) -> None:
    """End a service; one that does not run is fine."""
    backend = _backend(service.name, resources)
    with backend.locked():
        backend.remove()


def _backend(name: str, resources: Resources) -> ServiceBackend:
    if resources.launch == "inline":
        return LocalProcess(name, resources)
    return RayServe(name, resources)


def _wait_until_ready(url: str, spec: Spec, backend: ServiceBackend) -> None:
    """Wait until every replica has the spec and a chat request is answered. Raises NotReady."""
    deadline = time.monotonic() + START_SECONDS
    agreeing = 0
    while agreeing < 2 * spec.capacity.replicas:  # requests go round the replicas, so an old one would answer some
        if problem := backend.failure():
            raise NotReady(f"{spec.service.name} did not start: {problem}\n{backend.state()}")
        if time.monotonic() > deadline:
            raise NotReady(f"{spec.service.name} was not ready after {START_SECONDS:.0f} seconds\n{backend.state()}")
        if backend.running() and _identities(url) == [spec.identity()]:
            agreeing += 1
        else:
            agreeing = 0
            time.sleep(POLL_SECONDS)
    _check_answer(url, spec, backend)


def _check_answer(url: str, spec: Spec, backend: ServiceBackend) -> None:
    """Send one chat request. Raises NotReady unless the model of the spec answers it."""
    request = {"model": spec.version.name, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1}
    try:
        response = httpx.post(
            f"{url}/v1/chat/completions", json=request, headers=authorization(), timeout=ANSWER_SECONDS, trust_env=False
        )
        fingerprint = response.raise_for_status().json()["system_fingerprint"]
    except (httpx.HTTPError, ValueError, LookupError) as error:
        raise NotReady(f"{url} does not answer a chat request: {error!r}\n{backend.state()}") from error
    if fingerprint != spec.version.checkpoint.digest:
        raise NotReady(f"{url} answers with model {fingerprint}, not {spec.version.checkpoint.digest}")


def _identities(url: str) -> list[str] | None:
    """Identities that the live endpoint lists; None where no endpoint of ours answers."""
    try:
        answer = httpx.get(f"{url}/v1/models", headers=authorization(), timeout=5, trust_env=False)
        return [model["identity"] for model in answer.raise_for_status().json()["data"]]
    except (httpx.HTTPError, ValueError, KeyError, TypeError):
        return None
