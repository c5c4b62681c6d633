"""The task `deploy`: read what is served, change only what differs, and wait until it answers. Light at import."""

import logging

from vila_ops.artifacts.kinds import Deployment, ModelVersion
from vila_ops.artifacts.store import verify
from vila_ops.cluster import device_on
from vila_ops.config import NO_CONTEXT, Resources, RunContext, Service
from vila_ops.serve.backends.backend import ServiceBackend
from vila_ops.serve.credentials import check_key
from vila_ops.serve.router.state import ServiceState, Track
from vila_ops.serve.spec import Spec
from vila_ops.serve.tracks import backend_of, identities, open_router, started, with_stable

log = logging.getLogger(__name__)


def deploy(
    service: Service, version: ModelVersion, resources: Resources, context: RunContext = NO_CONTEXT
) -> Deployment:
    """Serve the weights of a registered version; a service that serves them already stays as it is.

    New replicas start beside the old ones, which get requests until the new ones have answered the golden question, and
    end when their last answer has ended. A canary ends.

    Raises before anything changes: CorruptArtifact, and ValueError or ClusterFull for a device that is not there.
    Raises NotReady, after which the old replicas serve as before, and ValueError for a port that another process holds.
    An endpoint that asks for keys is called with the one in VILA_API_KEY; without a valid one nothing changes.
    """
    spec = Spec.of(service, version, resources)
    check_key(spec.capacity.access)
    backend = backend_of(service.name, resources)
    with backend.locked():
        url = backend.url()
        if url is not None and identities(url) == [spec.identity()]:
            log.info("%s already serves version %d", url, version.version)
        else:
            url = _replace(spec, backend, resources)
    return Deployment(url=url, model=version.checkpoint.digest, version=version.version)


def undeploy(service: Service, resources: Resources) -> None:
    """End a service; one that does not run is fine."""
    backend = backend_of(service.name, resources)
    with backend.locked():
        backend.close()
        for track in backend.register.load().tracks():
            backend.stop(track)
        backend.register.change(lambda state: ServiceState(previous=state.previous, rolled_back=state.rolled_back))


def _replace(spec: Spec, backend: ServiceBackend, resources: Resources) -> str:
    """Serve a spec in place of the stable track, and return the URL."""
    device_on(resources, spec.device)
    verify(spec.version.checkpoint)
    track = _serving(spec, backend) or started(spec, backend)
    backend.register.change(lambda state: with_stable(state, track))
    url = open_router(track, backend)
    log.info("%s: version %d serves at %s", spec.service.name, spec.version.version, url)
    return url


def _serving(spec: Spec, backend: ServiceBackend) -> Track | None:
    """The stable track or the canary, if it is of this spec and answers."""
    state = backend.register.load()
    for track in (state.stable, state.canary.track if state.canary else None):
        identity = spec.identity()
        if track is not None and track.spec.identity() == identity and identities(track.url) == [identity]:
            return track
    return None
