"""What we put around Ray Serve's HTTP proxy: the router, and rules for what the proxy leaves to us.

These hide its own routes, and drop the headers by which clients would lift its limits.
"""

from starlette.middleware import Middleware
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from vila_ops.serve.app.errors import ApiError
from vila_ops.serve.backends.proxy_notes import announce_release
from vila_ops.serve.backends.proxy_router import HEALTH, ProxyRouter

LIFTED = frozenset({b"x-request-timeout-seconds", b"x-request-disconnect-disabled"})
"""Headers that the proxy obeys: no time limit, and no end of the work for a client that has left."""


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
    """The middleware of the proxy, which calls this as it starts: `ray_serve.CONTROLLER_ENV` names it.

    The last one is the first that gets a request.
    """
    announce_release()
    return [Middleware(ProxyRouter), Middleware(ProxyRules)]
