"""What every request passes first: an id, the Host, Origin and content type, and the key. Around all routes."""

import logging
import re
import time
import uuid
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Send
from starlette.types import Scope as AsgiScope

from vila_ops import logs, tracing
from vila_ops.artifacts.kinds import ModelVersion
from vila_ops.config.resources import ServeResources
from vila_ops.errors import CorruptArtifact
from vila_ops.serve.app.audit import AuditLog
from vila_ops.serve.app.errors import ApiError, internal_error
from vila_ops.serve.app.keys import ApiKey, Keyring, Scope
from vila_ops.serve.app.metrics import Metrics
from vila_ops.serve.page.files import PATHS

PUBLIC = ("/health", "/ready")
"""For load balancers: neither a key nor a Host name is asked for, and nothing but the state is shown."""
REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
log = logging.getLogger(__name__)


@dataclass
class Caller:
    """Who sent a request."""

    request_id: str
    """Given by the client, or made."""
    key: ApiKey | None = None
    trusted: bool = False
    """Whether more than the state of the endpoint may be shown."""
    facts: dict[str, Any] = field(default_factory=dict)
    """What the audit log says besides."""


class Guard:
    """ASGI middleware. It puts a `Caller` into the request's state, or answers with an error."""

    def __init__(self, app: ASGIApp, *, capacity: ServeResources, audit: AuditLog | None, metrics: Metrics) -> None:
        self._app, self._access, self._audit, self._metrics = app, capacity.access, audit, metrics
        self._keyring = None if self._access.key_file is None else Keyring(Path(self._access.key_file))
        own = (*LOOPBACK, capacity.host.lower())
        self._hosts = (*own, *self._access.hosts) if self._access.hosts or not self._keyring else None

    async def __call__(self, scope: AsgiScope, receive: Receive, send: Send) -> None:
        """Pass the request on with its caller, or answer with an error."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        stated = headers.get("x-request-id", "")
        caller = Caller(stated if REQUEST_ID.fullmatch(stated) else uuid.uuid4().hex)
        logs.REQUEST.set(caller.request_id)
        started, status = time.monotonic(), 499

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                extra = MutableHeaders(scope=message)
                extra["x-request-id"] = caller.request_id
                extra["x-content-type-options"] = "nosniff"
            await send(message)

        scope.setdefault("state", {})["caller"] = caller
        with tracing.span(_span_name(scope), parent=headers.get("traceparent"), server=True) as note:
            try:
                self._check(scope, headers, caller)
            except ApiError as error:
                await JSONResponse(error.body(), error.status, error.headers)(scope, receive, send_with_id)
            else:
                await self._pass_on(scope, receive, send_with_id)
            finally:
                self._record(scope, caller, status, time.monotonic() - started)
                note({**_of_answer(caller), "http.response.status_code": status, "vila.request": caller.request_id})

    async def _pass_on(self, scope: AsgiScope, receive: Receive, send: Send) -> None:
        """The answer of the app, or a neutral one if it fails before it answers.

        HEAD, with which monitors ask, gets the headers of GET; the server sends no body.
        """
        started = False
        asked = {**scope, "method": "GET"} if scope["method"] == "HEAD" else scope

        async def noting(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self._app(asked, receive, noting)
        except Exception:
            if started:
                raise
            log.exception("request %s failed", scope["state"]["caller"].request_id)
            await JSONResponse(internal_error().body(), 500)(scope, receive, send)

    def _check(self, scope: AsgiScope, headers: Headers, caller: Caller) -> None:
        """Raise ApiError for a request that may not reach its route."""
        public = scope["path"] in PUBLIC
        try:
            self._check_host(headers)
            self._check_origin(scope, headers)
            self._check_key(scope, headers, caller)
        except ApiError:
            if not public:
                raise
        else:
            caller.trusted = True
        if scope["method"] == "POST":
            _check_content(headers)

    def _check_host(self, headers: Headers) -> None:
        hosts = [re.sub(r":[0-9]*$", "", host).lower() for host in headers.getlist("host")]
        if self._hosts is not None and (len(hosts) != 1 or hosts[0] not in self._hosts):
            text = "this endpoint is not served under that Host name; serve.access.hosts lists names"
            raise ApiError(403, text, code="host_not_allowed")

    def _check_origin(self, scope: AsgiScope, headers: Headers) -> None:
        origin = headers.get("origin")
        own = f"{scope['scheme']}://{headers.get('host', '')}"
        if origin is not None and origin not in (own, *self._access.origins):
            text = "pages of this origin may not call the endpoint; serve.access.origins lists those that may"
            raise ApiError(403, text, code="origin_not_allowed")

    def _check_key(self, scope: AsgiScope, headers: Headers, caller: Caller) -> None:
        if self._keyring is None or scope["path"] in PATHS:
            return
        kind, _, presented = headers.get("authorization", "").partition(" ")
        try:
            key = self._keyring.of(presented.strip(), now=datetime.now(UTC)) if kind.lower() == "bearer" else None
        except (OSError, CorruptArtifact) as error:
            log.error("the file of API keys cannot be read, so nobody gets in: %s", error)
            raise ApiError(503, "keys cannot be checked at the moment", code="keys_unavailable") from None
        if key is None:
            text = "send a valid API key as `Authorization: Bearer KEY`; there is none, or it is unknown or has ended"
            raise ApiError(401, text, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        caller.key = key
        wanted = _scope_of(scope["path"])
        if wanted is not None and wanted not in key.scopes:
            raise ApiError(403, f"this key may not be used here; it needs the scope {wanted!r}", code="missing_scope")

    def _record(self, scope: AsgiScope, caller: Caller, status: int, seconds: float) -> None:
        self._metrics.responded(status)
        if self._audit is None or (scope["path"] in PUBLIC and status == 200):
            return
        event = {
            "event": "request", "request_id": caller.request_id, "key": caller.key.id if caller.key else None,
            "client": (scope.get("client") or (None,))[0], "method": scope["method"], "path": scope["path"][:200],
            "status": status, "seconds": round(seconds, 3), **caller.facts,
        }  # fmt: skip
        try:
            self._audit.write(event)
        except OSError as error:
            log.error("the audit log lacks request %s: %s", caller.request_id, error)


def audit_log(capacity: ServeResources, version: ModelVersion, *, service: str, host: str) -> AuditLog | None:
    """The log of a service on this host, with the start of a replica; None where nothing is recorded."""
    if capacity.access.audit is None:
        return None
    audit = AuditLog(Path(capacity.access.audit) / f"{service}-{host}.jsonl")
    model = {"model": version.name, "version": version.version, "digest": version.checkpoint.digest}
    audit.write({"event": "start", "service": service, **model})
    return audit


def _scope_of(path: str) -> Scope | None:
    """The scope that a path needs; None: any key will do."""
    if path == "/metrics":
        return "metrics"
    return "chat" if path.startswith("/v1/") else None


def _span_name(scope: AsgiScope) -> str:
    """The method and, of a path that is ours, the path: names that clients choose would be too many."""
    ours = scope["path"] in ("/v1/chat/completions", "/v1/models", "/v1/feedback", "/metrics", *PUBLIC)
    return f"{scope['method']} {scope['path']}" if ours else str(scope["method"])


def _of_answer(caller: Caller) -> dict[str, str | int]:
    """What OpenTelemetry's conventions for generative AI say of an answer; never what was said."""
    if "completion" not in caller.facts:
        return {}
    return {
        "gen_ai.operation.name": "chat",
        "gen_ai.response.id": caller.facts["completion"],
        "gen_ai.usage.input_tokens": caller.facts["prompt_tokens"],
        "gen_ai.usage.output_tokens": caller.facts["completion_tokens"],
    }


def _check_content(headers: Headers) -> None:
    if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        text = "send the body as JSON, with the header `Content-Type: application/json`"
        raise ApiError(415, text, code="unsupported_content_type")
    if headers.get("content-encoding", "identity").lower() != "identity":
        text = "send the body as it is: no Content-Encoding is read"
        raise ApiError(415, text, code="unsupported_content_encoding")
