"""What we put around Ray Serve's HTTP proxy: the router, and rules for what the proxy leaves to us.

These hide its own routes, and drop the headers by which clients would lift its limits or make it fail.
"""

from starlette.datastructures import MutableHeaders
from starlette.middleware import Middleware
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vila_ops.serve.app.errors import ApiError
from vila_ops.serve.app.guard import REQUEST_ID
from vila_ops.serve.backends.proxy_notes import announce_release
from vila_ops.serve.backends.proxy_router import HEALTH, ProxyRouter

OBEYED = frozenset(
    b"x-request-timeout-seconds x-request-disconnect-disabled x-session-id serve-multiplexed-model-id".split()
)
"""Headers that the proxy obeys, with `-` or `_`: no time limit, no end of the work for a client that has left, and the
replica that answers. One that is not UTF-8 makes it fail."""


class ProxyRules:
    """ASGI middleware around the proxy, before it reads a request."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on without these headers, or answer that there is no such route.

        The proxy makes an id for a request that has none, or one that we would not take, and adds it to a response that
        has it already.
        """
        if scope["type"] == "http":
            if scope["path"].startswith("/-/") and scope["path"] != HEALTH:
                error = ApiError(404, "there is no such route; /openapi.json lists them", code="not_found")
                await JSONResponse(error.body(), error.status)(scope, receive, send)
                return
            scope = {**scope, "headers": [one for one in scope["headers"] if _may_pass(*one)]}

        async def send_with_one_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                if (made := headers.get("x-request-id")) is not None:
                    headers["x-request-id"] = made
            await send(message)

        await self._app(scope, receive, send_with_one_id)


def _may_pass(name: bytes, value: bytes) -> bool:
    name = name.lower().replace(b"_", b"-")
    return name not in OBEYED and (name != b"x-request-id" or REQUEST_ID.fullmatch(value.decode("latin-1")) is not None)


def middleware() -> list[Middleware]:
    """The middleware of the proxy, which calls this as it starts: `ray_serve.CONTROLLER_ENV` names it.

    The last one is the first that gets a request.
    """
    announce_release()
    return [Middleware(ProxyRouter), Middleware(ProxyRules)]
