"""From a spec to a track that answers right, and from there to the router. Light at import."""

import base64
import re
import time
from pathlib import Path

import httpx

from vila_ops.config import Resources
from vila_ops.config.serve import Golden
from vila_ops.errors import NotReady
from vila_ops.serve import endpoint
from vila_ops.serve.backends.backend import START_SECONDS, ServiceBackend
from vila_ops.serve.backends.local_process import LocalProcess
from vila_ops.serve.backends.ray_serve import RayServe
from vila_ops.serve.credentials import authorization
from vila_ops.serve.router.state import ServiceState, Track
from vila_ops.serve.spec import Spec

POLL_SECONDS = 0.2
ANSWER_SECONDS = 60.0
"""How long the first answer may take."""
GREY = (
    "data:image/png;base64,"
    "iVBORw0KGgoAAAANSUhEUgAAACAAAAAgCAAAAABWESUoAAAAFklEQVR42mNoIAAYRhWMKhhVMFIVAABCAAAfN5c2AA"
    "AAAABJRU5ErkJggg=="
)
"""An image of 32 × 32 grey pixels."""


def backend_of(name: str, resources: Resources) -> ServiceBackend:
    """What runs a service with these resources. Raises ValueError where an operator starts its replicas."""
    if resources.serve.started_by == "operator":
        raise ValueError(
            f"serve.started_by is operator, so {name} is changed where its operator reads what to serve, such as "
            f"`version` in serveConfigV2 of a RayService; or set serve.started_by to deploy"
        )
    return LocalProcess(name, resources) if resources.launch == "inline" else RayServe(name, resources)


def started(spec: Spec, backend: ServiceBackend) -> Track:
    """A new track that has answered its golden question, beside the others; no request reaches it yet.

    One that another command left while it loaded the same spec is used. A track that fails is ended, and one that still
    loads after a while is left. Raises NotReady.
    """
    left = backend.register.load().starting
    if left is not None and (left.spec.identity() != spec.identity() or backend.failure(left)):
        backend.stop(left)
        left = None
    track = left or backend.start(spec)
    backend.register.change(lambda state: state.with_changes({"starting": track}))
    try:
        ready = _is_ready_in_time(track, backend)
        if ready:
            _check_golden(track, backend)
    except NotReady:
        backend.register.change(lambda state: state.with_changes({"starting": None}))
        backend.stop(track)
        raise
    if not ready:
        raise NotReady(
            f"{spec.service.name} was not ready after {START_SECONDS:.0f} seconds. It has not failed and may still "
            f"load: run the same command again to go on waiting for it; a deployment of another version, or "
            f"`vila-ops undeploy`, ends it\n{backend.state(track)}"
        )
    return track


def with_stable(state: ServiceState, track: Track) -> ServiceState:
    """The state in which a track has taken the place of the stable one; a canary that is another track ends."""
    old, canary = state.stable, state.canary.track if state.canary else None
    retired = [one for one in (old, canary) if one is not None and one.url != track.url]
    previous = old.spec if old is not None and old.spec.identity() != track.spec.identity() else state.previous
    return state.with_changes(
        {"stable": track, "starting": None, "canary": None, "previous": previous, "retired": (*state.retired, *retired)}
    )


def open_router(track: Track, backend: ServiceBackend) -> str:
    """The URL of the service, as soon as its router sends requests to a stable track. Raises NotReady."""
    url, deadline = backend.open(), time.monotonic() + START_SECONDS
    while identities(url) != [track.spec.identity()]:
        if time.monotonic() > deadline or backend.url() is None:
            name = track.spec.service.name
            raise NotReady(f"the router of {name} at {url} does not reach version {track.spec.version.version}")
        time.sleep(POLL_SECONDS)
    return url


def identities(url: str) -> list[str] | None:
    """Identities that a live endpoint lists; None where no endpoint of ours answers."""
    try:
        answer = endpoint.client(url).get(f"{url}/v1/models", headers=authorization())
        return [model["identity"] for model in answer.raise_for_status().json()["data"]]
    except (httpx.HTTPError, ValueError, KeyError, TypeError):
        return None


def _is_ready_in_time(track: Track, backend: ServiceBackend) -> bool:
    """Wait until all replicas of a track have its spec; False where they still load. Raises NotReady for a failure."""
    deadline = time.monotonic() + START_SECONDS
    while not (backend.running(track) and identities(track.url) == [track.spec.identity()]):
        if problem := backend.failure(track):
            raise NotReady(f"{track.spec.service.name} did not start: {problem}\n{backend.state(track)}")
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_SECONDS)
    return True


def _check_golden(track: Track, backend: ServiceBackend) -> None:
    """Ask about the golden image. Raises NotReady unless the model of the spec answers, and as it should."""
    version, golden = track.spec.version, track.spec.service.golden
    try:
        response = endpoint.client(track.url).post(
            f"{track.url}/v1/chat/completions",
            json={"model": version.name, **_question(golden)},
            headers=authorization(),
            timeout=ANSWER_SECONDS,
        )
        completion = response.raise_for_status().json()
        fingerprint, text = completion["system_fingerprint"], completion["choices"][0]["message"]["content"]
    except (httpx.HTTPError, ValueError, LookupError) as error:
        raise NotReady(f"{track.url} does not answer a chat request: {error!r}\n{backend.state(track)}") from error
    if fingerprint != version.checkpoint.digest:
        raise NotReady(f"{track.url} answers with model {fingerprint}, not {version.checkpoint.digest}")
    if golden is not None and not re.search(golden.answer, text):
        raise NotReady(
            f"version {version.version} answers {golden.question!r} about {golden.image} by {text!r}, which does not "
            f"match {golden.answer!r}; it gets no requests"
        )


def _question(golden: Golden | None) -> dict[str, object]:
    """The golden question as part of a request, which is not kept as one of people's."""
    image, question, tokens = GREY, "What is this?", 1
    if golden is not None:
        data = base64.b64encode(Path(golden.image).read_bytes()).decode()
        image, question, tokens = f"data:;base64,{data}", golden.question, golden.max_tokens
    parts = [{"type": "image_url", "image_url": {"url": image}}, {"type": "text", "text": question}]
    return {"messages": [{"role": "user", "content": parts}], "max_tokens": tokens, "temperature": 0, "store": False}
