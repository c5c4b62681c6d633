"""The router of a service, an ASGI app at its one address: it passes each request on to the track that it belongs to.

Requests go to the stable track, and a share of the conversations to the canary. What fails on the canary before it
streams is sent to the stable track. A stream that breaks off ends with an error event. The keys, limits and answers are
those of the replicas; the router reads bodies and responses only while there is a canary. `/metrics` shows what all
replicas of all tracks count, to those to whom the stable track shows its own.
"""

import asyncio
import json
import logging
import uuid
from collections.abc import Callable

from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from vila_ops.serve.app.errors import ApiError, ClientGone
from vila_ops.serve.app.guard import REQUEST_ID
from vila_ops.serve.app.stream import unless_gone
from vila_ops.serve.router.keeper import Keeper
from vila_ops.serve.router.outcome import ResponseOutcome
from vila_ops.serve.router.request import Incoming, conversation_of, position_of
from vila_ops.serve.router.scrape import MetricsOf, scrape
from vila_ops.serve.router.state import Register, Track
from vila_ops.serve.router.upstream import ReplicaLost, Reply, Upstream
from vila_ops.serve.router.watch import CanaryWatch

UPLOAD_SECONDS = 20.0
"""Where no track says more."""
POSITIONS = 2**64
log = logging.getLogger(__name__)


class Router:
    """Passes requests on."""

    def __init__(
        self, register: Register, stop: Callable[[Track], None], metrics: MetricsOf, upstream: Upstream
    ) -> None:
        self._keeper = Keeper(register, stop)
        self._upstream, self._metrics = upstream, metrics
        self._held = 0

    async def keep(self) -> None:
        """Follow the register and the canary until this task is cancelled."""
        try:
            await self._keeper.keep(self._upstream)
        finally:
            await self._upstream.close()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, or the life of the app."""
        if scope["type"] == "lifespan":
            await self._live(receive, send)
        elif scope["type"] == "http":
            await self._respond(scope, receive, send)

    async def _live(self, receive: Receive, send: Send) -> None:
        await receive()
        keeping = asyncio.create_task(self.keep())
        await send({"type": "lifespan.startup.complete"})
        await receive()
        keeping.cancel()
        await asyncio.gather(keeping, return_exceptions=True)
        await send({"type": "lifespan.shutdown.complete"})

    async def _respond(self, scope: Scope, receive: Receive, send: Send) -> None:
        stable = self._keeper.stable
        seconds = UPLOAD_SECONDS if stable is None else stable.spec.capacity.limits.upload_seconds
        request = Incoming(scope, receive, upload_seconds=seconds)
        try:
            await self._route(request, send)
        except ClientGone:
            pass
        except ApiError as error:
            stated = request.headers.get("x-request-id", "")
            headers = {**error.headers, "x-request-id": stated if REQUEST_ID.fullmatch(stated) else uuid.uuid4().hex}
            await JSONResponse(error.body(), error.status, headers)(scope, receive, send)

    async def _route(self, request: Incoming, send: Send) -> None:
        """Answer a request by the canary or by the stable track. Raises ApiError, and ClientGone."""
        canary, watch = self._keeper.canary, self._keeper.watch
        if canary is None or watch is None or not request.is_chat():
            await self._by_stable(request, send, ResponseOutcome(read=False))
            return
        limits, service = canary.track.spec.capacity.limits, canary.track.spec.service
        size = min(request.stated_length() or service.max_body_bytes, service.max_body_bytes)
        if self._held + size > limits.held_bytes:
            await self._by_stable(request, send, ResponseOutcome(read=False))
            return
        self._held += size
        try:
            body = await request.read_whole(most=service.max_body_bytes)
            conversation = None if body is None else await conversation_of(body, request.headers)
            if conversation is None:
                await self._by_stable(request, send, ResponseOutcome(read=False))
            else:
                await self._by_share(request, watch, send, position=position_of(conversation, canary.salt))
        finally:
            self._held -= size

    async def _by_share(self, request: Incoming, watch: CanaryWatch, send: Send, *, position: int) -> None:
        """Answer by the track of a conversation, and note what comes of it."""
        canary, counts = watch.canary, watch.first(position)
        chosen = position < canary.rules.share * POSITIONS
        outcome = ResponseOutcome(read=counts)
        try:
            if not chosen:
                await self._by_stable(request, send, outcome)
                return
            served = await self._pass_on(canary.track, request, send, outcome, final=False)
        finally:
            watch.responded(outcome, canary=chosen, counts=counts)
        if not served:
            await self._by_stable(request, send, ResponseOutcome(read=False))

    async def _by_stable(self, request: Incoming, send: Send, outcome: ResponseOutcome) -> None:
        """Answer by the track that is stable now, or by the one that has just taken its place. Raises ApiError."""
        track = self._stable()
        if await self._pass_on(track, request, send, outcome, final=True):
            return
        await self._keeper.refresh()
        if not await self._pass_on(self._stable(), request, send, outcome, final=True):
            raise _unavailable()

    def _stable(self) -> Track:
        """The stable track. Raises ApiError 503 without one."""
        if self._keeper.stable is None:
            raise _unavailable()
        return self._keeper.stable

    async def _pass_on(
        self, track: Track, request: Incoming, send: Send, outcome: ResponseOutcome, *, final: bool
    ) -> bool:
        """Send the response of a track; False where there is none and another track may be asked.

        `final`: a response that says 5xx is sent as it is, and no other track is asked once a replica has the request.
        Raises ApiError where there is no response and no other track may be asked, and ClientGone.
        """
        sender = _Sender(send, outcome)
        with self._keeper.using(track):
            try:
                return await unless_gone(request.client_left(), self._respond_by(track, request, sender, final=final))
            except ReplicaLost as error:
                log.warning("version %d at %s: %s", track.spec.version.version, track.url, error)
                if final and not error.reached and request.replayable:
                    return False
                outcome.failed = True
                if sender.started:
                    await sender.break_off()
                    return True
                if not final and request.replayable:
                    return False
                raise _unavailable() from error
            except ClientGone:
                outcome.left = True
                raise
            finally:
                outcome.ended()

    async def _respond_by(self, track: Track, request: Incoming, sender: "_Sender", *, final: bool) -> bool:
        async with self._upstream.ask(track, request) as reply:
            if reply.status >= 500 and not final:
                sender.outcome.answered(reply.status)
                return False
            if reply.status >= 500 and not reply.is_json():  # of Ray Serve's proxy, which lost the replica
                sender.outcome.answered(reply.status)
                raise _unavailable()
            if reply.status == 200 and request.is_for_metrics():
                reply.content = await scrape(self._keeper.tracks, request.upstream_headers(), self._metrics)
            await sender.send_all(reply)
            return True


class _Sender:
    """Sends a response to the client while its outcome is read."""

    def __init__(self, send: Send, outcome: ResponseOutcome) -> None:
        self._send, self.outcome, self.started = send, outcome, False

    async def send_all(self, reply: Reply) -> None:
        """Send a response. Raises ReplicaLost where a stream breaks off."""
        self.outcome.answered(reply.status)
        if isinstance(reply.content, bytes):
            self.outcome.whole(reply.content)
            headers = reply.headers
            if reply.content:  # without, it may be the answer to HEAD, which has the length of that to GET
                length = [(b"content-length", str(len(reply.content)).encode())]
                headers = [one for one in headers if one[0].lower() != b"content-length"] + length
            await self._send({"type": "http.response.start", "status": reply.status, "headers": headers})
            await self._send({"type": "http.response.body", "body": reply.content})
            return
        await self._send({"type": "http.response.start", "status": reply.status, "headers": reply.headers})
        self.started = True
        async for chunk in reply.content:
            self.outcome.streamed(chunk)
            await self._send({"type": "http.response.body", "body": chunk, "more_body": True})
        await self._send({"type": "http.response.body", "body": b""})

    async def break_off(self) -> None:
        """End a stream with an error event."""
        event = b"\n\ndata: " + json.dumps(_lost().body()).encode() + b"\n\n"
        await self._send({"type": "http.response.body", "body": event})


def _unavailable() -> ApiError:
    text = "no replica of this service answers at the moment; try again"
    return ApiError(503, text, code="no_replica", headers={"Retry-After": "1"})


def _lost() -> ApiError:
    return ApiError(503, "the replica that answered was lost; ask again", code="replica_lost")
