"""Canary, promotion and rollback of a service. Light at import.

The router takes a bad canary back by itself; these functions are for what a person or a flow decides.
"""

import logging
import secrets
from datetime import UTC, datetime

from vila_ops.artifacts.kinds import Deployment, ModelVersion
from vila_ops.artifacts.store import verify
from vila_ops.cluster import device_on
from vila_ops.config import Gate, Resources, Service
from vila_ops.errors import NotReady
from vila_ops.registry.register import champion, set_champion
from vila_ops.serve.credentials import check_key
from vila_ops.serve.router.state import Canary, Rollback, ServiceState, Track
from vila_ops.serve.spec import Spec
from vila_ops.serve.tracks import backend_of, identities, open_router, started, with_stable

log = logging.getLogger(__name__)


def start_canary(service: Service, version: ModelVersion, resources: Resources) -> Deployment:
    """Let a version answer a share of the conversations; another canary ends. Returns once it may get requests.

    Raises ValueError where nothing is served, or this version is, CorruptArtifact, and NotReady for a version that does
    not answer right; nothing has changed then.
    """
    spec = Spec.of(service, version, resources)
    check_key(spec.capacity.access)
    backend = backend_of(service.name, resources)
    with backend.locked():
        state = backend.register.load()
        stable = state.stable
        if stable is None or identities(stable.url) is None:
            raise ValueError(f"{service.name} serves no version that a canary could be compared with; deploy one first")
        if stable.spec.identity() == spec.identity():
            raise ValueError(f"{service.name} serves version {version.version} already; name another one")
        device_on(resources, spec.device)
        verify(version.checkpoint)
        track = started(spec, backend)
        canary = Canary(track=track, rules=resources.serve.canary, salt=secrets.token_hex(16))
        backend.register.change(lambda state: _with_canary(state, canary))
        url = open_router(stable, backend)
    log.info(
        "%s: version %d is a canary with %g of the conversations", service.name, version.version, canary.rules.share
    )
    return Deployment(url=url, model=version.checkpoint.digest, version=version.version)


def promote(service: Service, resources: Resources) -> Deployment:
    """Let the canary answer everything; the version that was stable ends when its last answer has ended.

    Raises ValueError without a canary, with the reason where it was rolled back.
    """
    backend = backend_of(service.name, resources)
    with backend.locked():
        state = backend.register.load()
        if state.canary is None:
            raise ValueError(f"{service.name} has no canary{_last(state)}; start one with `vila-ops canary`")
        track = state.canary.track
        new = backend.register.change(lambda now: with_stable(now, track) if now.canary == state.canary else now)
        if new.stable != track:
            reason = new.rolled_back.reason if new.rolled_back else "another command ended it"
            raise ValueError(f"the canary of {service.name} was rolled back meanwhile: {reason}")
        return _served(track, open_router(track, backend))


def as_champion(gate: Gate, served: Deployment, resources: Resources) -> None:
    """Point the alias `champion` to what was promoted, so that the next `deploy` serves it too."""
    now = champion(gate, resources)
    if now is None or now.version != served.version:
        set_champion(gate.model_name, served.version, resources, reason="promoted after it ran as a canary")


def roll_back(service: Service, resources: Resources) -> Deployment:
    """End the canary; without one, serve the version again that was stable before. Returns what serves then.

    Raises ValueError where neither is there, and NotReady for a former version that does not answer right any more.
    """
    backend = backend_of(service.name, resources)
    with backend.locked():
        state = backend.register.load()
        track = state.stable
        if track is not None and state.canary is not None:
            at = datetime.now(UTC).isoformat(timespec="seconds")
            backend.register.change(lambda now: taken_back(now, at=at))
        elif state.previous is not None:
            check_key(state.previous.capacity.access)
            verify(state.previous.version.checkpoint)
            former = track = started(state.previous, backend)
            backend.register.change(lambda now: with_stable(now, former))
        else:
            none = f"{service.name} has neither a canary nor a former version{_last(state)}"
            raise ValueError(f"{none}; deploy the one to serve")
        return _served(track, open_router(track, backend))


def taken_back(state: ServiceState, *, at: str) -> ServiceState:
    """The state after a person took the canary back, which says so to who waits for it. Pure."""
    if state.canary is None:
        return state
    version = state.canary.track.spec.version
    last = Rollback(version=version.version, digest=version.checkpoint.digest, reason="a person took it back", at=at)
    return _with_canary(state, None).with_changes({"rolled_back": last})


def _last(state: ServiceState) -> str:
    """Why the last canary was taken back, if one was."""
    last = state.rolled_back
    return f"; version {last.version} was rolled back at {last.at}: {last.reason}" if last else ""


def _with_canary(state: ServiceState, canary: Canary | None) -> ServiceState:
    """The state with a canary in place of another, which ends."""
    if canary is not None and state.stable is None:
        raise NotReady("the service was ended while the canary started; deploy a version first")
    ended = () if state.canary is None else (state.canary.track,)
    return state.with_changes({"canary": canary, "starting": None, "retired": (*state.retired, *ended)})


def _served(track: Track, url: str) -> Deployment:
    version = track.spec.version
    return Deployment(url=url, model=version.checkpoint.digest, version=version.version)
