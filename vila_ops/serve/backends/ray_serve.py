"""Launch ray: Ray Serve applications on a running cluster; its controller and replicas outlive this process.

Light at import: a service that already serves the spec is left alone without Ray.
"""

import logging
import secrets
import time
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import TYPE_CHECKING, Any

import httpx

from vila_ops import __version__
from vila_ops.artifacts.store import root_of
from vila_ops.cluster import connect, device_on, gpu_options, take_own_gpu
from vila_ops.config import Resources
from vila_ops.device import Device
from vila_ops.serve.backends.backend import METRICS_SECONDS
from vila_ops.serve.backends.proxy_notes import Routed, is_of_this_release, route, routed
from vila_ops.serve.router.scrape import Headers
from vila_ops.serve.router.state import Register, Track
from vila_ops.serve.spec import Spec

if TYPE_CHECKING:
    from ray.serve import Application
    from starlette.types import ASGIApp, Receive, Scope, Send

MAX_ONGOING = 1000
"""Requests that a replica may hold. The app limits answers by itself; an upload counts here as well, so that with a low
number a few unfinished ones would stop everybody."""
PROXY_SECONDS = 120.0
"""How long Serve's HTTP proxy may take to start."""
CONTROLLER_ENV = {
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
    "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "30",
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "vila_ops.serve.backends.proxy_rules:middleware",
}
"""Serve's controller kills a proxy after three checks of 5 s by default; on a busy machine it may still import then.
The proxies, which it starts, inherit these variables."""

log = logging.getLogger(__name__)


class Replica:
    """One process with the weights; Ray Serve sends HTTP to the app that it builds."""

    def __init__(self, spec: str, device: Device, prefix: str) -> None:
        import ray
        from ray import serve

        from vila_ops.serve.app.load import load_app  # torch and transformers: in the replica only

        take_own_gpu()
        context = ray.get_runtime_context()
        replica = {
            "node_id": context.get_node_id(),
            "actor_id": context.get_actor_id(),
            "replica_id": serve.get_replica_context().replica_id.unique_id,
        }
        app = load_app(Spec.model_validate_json(spec), device, replica=replica)
        self._app, self._metrics = Below(prefix, app), app.state.metrics

    def __serve_build_asgi_app__(self) -> Any:
        return self._app

    def counted(self) -> bytes:
        """What /metrics of this replica shows; Serve's proxy would ask any of them."""
        text: bytes = self._metrics.text()
        return text


class Below:
    """An app whose routes Serve's proxy has below a prefix, which the app does not know."""

    def __init__(self, prefix: str, app: "ASGIApp") -> None:
        self._prefix, self._app = prefix, app

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        if scope["type"] == "http":
            path, raw_path = scope["path"], scope.get("raw_path") or scope["path"].encode()
            own, raw_own = path.removeprefix(self._prefix) or "/", raw_path.removeprefix(self._prefix.encode()) or b"/"
            scope = {**scope, "path": own, "raw_path": raw_own, "root_path": ""}
        await self._app(scope, receive, send)


class RayServe:
    """Implements `ServiceBackend` by applications of Ray Serve, one for each track, and the router in its proxy."""

    def __init__(self, name: str, resources: Resources) -> None:
        self.name, self.resources = name, resources
        cluster = str(resources.ray_address).replace(":", "-")
        self.register = Register(f"{root_of(resources.storage.store)}/services/{name}@{cluster}")

    def locked(self) -> AbstractContextManager[None]:
        """As in `ServiceBackend`: the register orders changes."""
        return nullcontext()

    def url(self) -> str:
        """The address of Serve's proxy, which is fixed. Raises ValueError for port 0."""
        if not self.resources.serve.port:
            raise ValueError(
                f"launch {self.resources.launch} needs a fixed serve.port: Ray Serve keeps its port for as long as it "
                f"runs"
            )
        return f"http://{self.resources.serve.host}:{self.resources.serve.port}"

    def open(self) -> str:
        """As in `ServiceBackend`: note the service for Serve's proxy, in which its router runs."""
        url = self.url()
        self._connect()
        route(Routed(name=self.name, register_uri=self.register.uri))
        return url

    def start(self, spec: Spec) -> Track:
        """As in `ServiceBackend`."""
        url = self.url()
        device = device_on(self.resources, spec.device)
        self._connect()
        number = f"{spec.version.version}-{secrets.token_hex(4)}"
        name, prefix = f"{self.name}-version-{number}", f"/{self.name}@{number}"
        _run(replicas(spec, self.resources, device, prefix), name=name, prefix=prefix)
        return Track(spec=spec, url=f"{url}{prefix}", application=name)

    def running(self, track: Track) -> bool:
        """As in `ServiceBackend`: whether the application is RUNNING, as Serve calls it."""
        application = self._application(track.application)
        return application is not None and application.status == "RUNNING"

    def failure(self, track: Track) -> str | None:
        """Serve's status of an application that failed; None for any other."""
        application = self._application(track.application)
        if application is None:
            return "Ray Serve does not have it any more"
        return str(application.status.value) if application.status in ("DEPLOY_FAILED", "UNHEALTHY") else None

    def state(self, track: Track) -> str:
        """Status and message of the application and of its deployments, in Serve's words."""
        application = self._application(track.application)
        if application is None:
            return f"no application {track.application!r}"
        states = [f"{key}: {state.status.value} {state.message}" for key, state in application.deployments.items()]
        return "\n".join([f"{application.status.value} {application.message}", *states])

    def metrics(self, track: Track, headers: Headers) -> list[bytes]:
        """As in `ServiceBackend`, once the track itself has answered a request with these headers."""
        from ray import serve
        from ray.exceptions import RayError
        from ray.serve.exceptions import RayServeException

        connect(self.resources)
        try:
            asked = serve.get_app_handle(str(track.application)).broadcast("counted")
            answers = asked.results(timeout_s=METRICS_SECONDS, return_exceptions=True)
        except (RayError, RayServeException) as error:
            raise OSError(f"{error!r}") from error
        for failed in (one for one in answers if isinstance(one, BaseException)):
            log.warning("a replica of %s shows no metrics: %r", track.application, failed)
        return [text for text in answers if isinstance(text, bytes)]

    def stop(self, track: Track) -> None:
        """As in `ServiceBackend`."""
        from ray import serve

        if self._application(track.application) is not None:
            serve.delete(str(track.application))

    def close(self) -> None:
        """End the router; Serve itself stays."""
        connect(self.resources)
        if (service := routed()) is not None and service.name == self.name:
            route(None)

    def _application(self, name: str | None) -> Any:
        from ray import serve

        connect(self.resources)
        return serve.status().applications.get(str(name))

    def _connect(self) -> None:
        """Connect to the cluster with Serve's proxy. Raises ValueError where that is of another address or service."""
        from ray import serve

        connect(self.resources)
        _start_proxy(self.resources.serve.host, self.resources.serve.port)
        other, running = routed(), serve.status().applications
        if other and other.name != self.name and any(one.startswith(f"{other.name}-version-") for one in running):
            raise ValueError(
                f"{self.url()} is the address of the service {other.name}, and Ray Serve has one; end that service "
                f"(`vila-ops undeploy`), or serve {self.name} on another cluster"
            )


def replicas(spec: Spec, resources: Resources, device: Device, prefix: str) -> "Application":
    """The application of Ray Serve that serves a spec below a prefix, "" for the root."""
    from ray import serve

    deployment = serve.deployment(
        name=spec.service.name,
        ray_actor_options={"num_cpus": spec.capacity.cpus_per_replica, **gpu_options(resources, device)},
        max_ongoing_requests=MAX_ONGOING,
        graceful_shutdown_timeout_s=_longest_seconds(spec),
        graceful_shutdown_wait_loop_s=0.5,
        max_constructor_retry_count=2,
        **_number_of_replicas(spec),
    )(serve.ingress()(Replica))
    return deployment.bind(spec.model_dump_json(), device, prefix)


def _longest_seconds(spec: Spec) -> float:
    """How long a request may take, its upload included; Ray would kill a replica that ends after 20 s."""
    limits, service = spec.capacity.limits, spec.service
    return limits.upload_seconds + service.max_body_bytes / 2**20 + service.request_timeout_seconds


def _number_of_replicas(spec: Spec) -> dict[str, Any]:
    """Options of a deployment: a fixed number of replicas, or as many as the requests under way need."""
    capacity, auto = spec.capacity, spec.capacity.autoscale
    if auto is None:
        return {"num_replicas": capacity.replicas}
    scaling = {
        "min_replicas": capacity.replicas,
        "max_replicas": auto.max_replicas,
        "target_ongoing_requests": auto.requests_per_replica,
        "upscale_delay_s": auto.up_seconds,
        "downscale_delay_s": auto.down_seconds,
    }
    return {"autoscaling_config": scaling}


def _run(application: Any, *, name: str, prefix: str) -> None:
    from ray import serve

    target = serve.RunTarget(application, name=name, route_prefix=prefix)
    serve.run_many([target], wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)


def _start_proxy(host: str, port: int) -> None:
    """Start Serve with its HTTP proxy. Raises ValueError where it runs with another address, or without our router."""
    from ray import serve
    from ray.exceptions import RayActorError

    options = {"runtime_env": {"env_vars": CONTROLLER_ENV}}
    with suppress(TimeoutError, RayActorError):  # the controller starts another proxy where one did not come up
        serve.start(proxy_location="HeadOnly", http_options={"host": host, "port": port}, controller_options=options)
    deadline = time.monotonic() + PROXY_SECONDS
    while "HEALTHY" not in serve.status().proxies.values() and time.monotonic() < deadline:
        time.sleep(0.1)
    try:
        with httpx.Client(base_url=f"http://{host}:{port}/-/", trust_env=False) as client:
            healthy, routes = client.get("healthz").status_code, client.get("routes").status_code
    except httpx.TransportError:
        healthy = routes = 0
    if healthy in (httpx.codes.OK, httpx.codes.SERVICE_UNAVAILABLE):  # 503: no application yet
        if routes == httpx.codes.NOT_FOUND and is_of_this_release():
            return
        raise ValueError(
            f"Ray Serve of this cluster was started without the router of vila-ops {__version__}, which runs in its "
            f"proxy; end Serve (`serve shutdown`) and run this again, which starts it"
        )
    raise ValueError(
        f"Ray Serve of this cluster does not listen on {host}:{port}: it was started with another address, which "
        f"cannot be changed while it runs; set serve.host and serve.port to it, or end Serve (`serve shutdown`)"
    )
