"""What Ray Serve's HTTP proxy leaves to us: its own routes and the headers by which clients would lift its limits."""

from starlette.middleware import Middleware
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from vila_ops.serve.app.errors import ApiError

LIFTED = frozenset({b"x-request-timeout-seconds", b"x-request-disconnect-disabled"})
"""Headers that the proxy obeys: no time limit, and no end of the work for a client that has left."""
HEALTH = "/-/healthz"
"""For load balancers: it shows no more than that the proxy runs."""


class ProxyRules:
    """ASGI middleware around the proxy, before it reads a request."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on without these headers, or answer that there is no such route."""
        if scope["type"] == "http":
            if scope["path"].startswith("/-/") and scope["path"] != HEALTH:
                error = ApiError(404, "there is no such route; /openapi.json lists them", code="not_found")
                await JSONResponse(error.body(), error.status)(scope, receive, send)
                return
            headers = [(name, value) for name, value in scope["headers"] if name.lower() not in LIFTED]
            scope = {**scope, "headers": headers}
        await self._app(scope, receive, send)


def middleware() -> list[Middleware]:
    """The middleware of the proxy; `ray_serve.CONTROLLER_ENV` names this function."""
    return [Middleware(ProxyRules)]
