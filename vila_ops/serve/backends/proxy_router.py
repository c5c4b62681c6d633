"""The router of a service within Ray Serve's HTTP proxy, so that a request passes the proxy once."""

import asyncio
import json
import logging

import ray
from starlette.types import ASGIApp, Receive, Scope, Send

from vila_ops.config import Resources
from vila_ops.serve.backends.proxy_notes import Routed, routed
from vila_ops.serve.backends.ray_serve import RayServe
from vila_ops.serve.router.app import Router
from vila_ops.serve.router.asgi_upstream import AsgiUpstream
from vila_ops.serve.router.state import Register
from vila_ops.serve.router.upstream import Upstream

FOLLOW_SECONDS = 0.5
"""Between two looks at what is routed."""
ROUTES_SECONDS = 5.0
"""How long the proxy may take to list the routes of Serve, which it has at hand."""
HEALTH = "/-/healthz"
"""The proxy's own, for load balancers: it shows no more than that the proxy runs."""
log = logging.getLogger(__name__)


class ProxyRouter:
    """ASGI middleware around the proxy: the router has all paths that are of no application of Serve."""

    def __init__(self, app: ASGIApp) -> None:
        self._app, self._upstream = app, AsgiUpstream(app)
        self._routed: Routed | None = None
        self._router: Router | None = None
        self._keeping: asyncio.Task[None] | None = None
        self._prefixes: tuple[str, ...] = ()
        self._following = asyncio.get_running_loop().create_task(self._follow())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request to the router or to the proxy."""
        router = self._router
        if router is None or scope["type"] != "http" or self._is_serves(scope["path"]):
            await self._app(scope, receive, send)
        else:
            await router(scope, receive, send)

    def _is_serves(self, path: str) -> bool:
        return path == HEALTH or any(path == one or path.startswith(f"{one}/") for one in self._prefixes)

    async def _follow(self) -> None:
        """Follow the applications of Serve and the service that is routed, for as long as the proxy runs."""
        while True:
            try:
                routes = await self._upstream.get("/-/routes", seconds=ROUTES_SECONDS)
                if routes.status == 200 and isinstance(routes.content, bytes):  # else the proxy is not ready
                    self._prefixes = tuple(prefix.rstrip("/") for prefix in json.loads(routes.content))
                await self._adopt(await asyncio.to_thread(routed))
            except Exception:  # the cluster or the store may be back soon
                log.exception("the router does not follow what is served")
            await asyncio.sleep(FOLLOW_SECONDS)

    async def _adopt(self, service: Routed | None) -> None:
        """Have the router of a service, and no other one."""
        if service == self._routed and not (self._keeping is not None and self._keeping.done()):
            return
        router = None if service is None else await asyncio.to_thread(_router, service, self._upstream)
        if self._keeping is not None:
            self._keeping.cancel()
            for ended in await asyncio.gather(self._keeping, return_exceptions=True):
                log.warning("the router of %s ended: %r", self._routed and self._routed.name, ended)
        self._routed, self._router = service, router
        self._keeping = None if router is None else asyncio.create_task(router.keep())


def _router(service: Routed, upstream: Upstream) -> Router:
    """The router of a service. Raises CorruptArtifact, and errors of the store."""
    here = Resources(launch="ray", ray_address=ray.get_runtime_context().gcs_address)
    backend = RayServe(service.name, here)
    return Router(Register(service.register_uri), backend.stop, backend.metrics, upstream)
