"""Launch ray: a Ray Serve application on a running cluster; its controller and replicas outlive this process.

Light at import: a service that already serves the spec is left alone without Ray.
"""

import time
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any

import httpx

from vila_ops.cluster import connect, device_on, gpu_options, take_own_gpu
from vila_ops.config import Resources
from vila_ops.device import Device
from vila_ops.serve.backends.proxy_rules import CALLBACK
from vila_ops.serve.spec import Spec

MAX_ONGOING = 1000
"""Requests that a replica may hold. The app limits answers by itself; an upload counts here as well, so that with a low
number a few unfinished ones would stop everybody."""
PROXY_SECONDS = 120.0
"""How long Serve's HTTP proxy may take to start."""
CONTROLLER_ENV = {
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
    "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "30",
    CALLBACK: "vila_ops.serve.backends.proxy_rules:middleware",
}
"""Serve's controller kills a proxy after three checks of 5 s by default; on a busy machine it may still import then.
The proxies, which it starts, inherit these variables."""


class Replica:
    """One process with the weights; Ray Serve sends HTTP to the app that it builds."""

    def __init__(self, spec: str, device: Device) -> None:
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
        self.loaded = load_app(Spec.model_validate_json(spec), device, replica=replica)

    def __serve_build_asgi_app__(self) -> Any:
        return self.loaded


class RayServe:
    """Implements `ServiceBackend` by one application of Ray Serve, named after the service."""

    def __init__(self, name: str, resources: Resources) -> None:
        self.name, self.resources = name, resources

    def locked(self) -> AbstractContextManager[None]:
        """As in `ServiceBackend`: Serve's controller orders changes itself."""
        return nullcontext()

    def url(self) -> str:
        """The address of Serve's proxy, which is fixed. Raises ValueError for port 0."""
        if not self.resources.serve.port:
            raise ValueError(
                f"launch {self.resources.launch} needs a fixed serve.port: Ray Serve keeps its port for as long as it "
                f"runs"
            )
        return f"http://{self.resources.serve.host}:{self.resources.serve.port}"

    def apply(self, spec: Spec) -> str:
        """As in `ServiceBackend`; Serve starts new replicas before it stops old ones, which finish their requests."""
        from ray import serve

        url = self.url()
        device = device_on(self.resources, spec.device)
        connect(self.resources)
        _start_proxy(self.resources.serve.host, self.resources.serve.port)
        capacity, timeout_seconds = spec.capacity, spec.service.request_timeout_seconds
        deployment = serve.deployment(
            name=self.name,
            num_replicas=capacity.replicas,
            ray_actor_options={"num_cpus": capacity.cpus_per_replica, **gpu_options(self.resources, device)},
            max_ongoing_requests=MAX_ONGOING,
            max_surge_percent=100,  # with Ray's default of 0 an update removes capacity before it adds any
            rolling_update_percentage=1.0,
            graceful_shutdown_timeout_s=timeout_seconds,
            graceful_shutdown_wait_loop_s=0.5,
            max_constructor_retry_count=2,
        )(serve.ingress()(Replica))
        target = serve.RunTarget(deployment.bind(spec.model_dump_json(), device), name=self.name, route_prefix="/")
        serve.run_many([target], wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)
        return url

    def running(self) -> bool:
        """Whether the application has reached the state that was last applied."""
        application = self._application()
        return application is not None and application.status == "RUNNING"

    def failure(self) -> str | None:
        """Serve's status of an application that failed; None for any other."""
        application = self._application()
        if application is None or application.status not in ("DEPLOY_FAILED", "UNHEALTHY"):
            return None
        return str(application.status.value)

    def state(self) -> str:
        """Status and message of the application and of its deployments, in Serve's words."""
        application = self._application()
        if application is None:
            return f"no application {self.name!r}"
        states = [f"{key}: {state.status.value} {state.message}" for key, state in application.deployments.items()]
        return "\n".join([f"{application.status.value} {application.message}", *states])

    def remove(self) -> None:
        """End the application; Serve itself stays."""
        from ray import serve

        connect(self.resources)
        if self._application() is not None:
            serve.delete(self.name)

    def _application(self) -> Any:
        from ray import serve

        return serve.status().applications.get(self.name)


def _start_proxy(host: str, port: int) -> None:
    """Start Serve with its HTTP proxy. Raises ValueError where Serve already runs with another address."""
    from ray import serve
    from ray.exceptions import RayActorError

    options = {"runtime_env": {"env_vars": CONTROLLER_ENV}}
    with suppress(TimeoutError, RayActorError):  # the controller starts another proxy where one did not come up
        serve.start(proxy_location="HeadOnly", http_options={"host": host, "port": port}, controller_options=options)
    deadline = time.monotonic() + PROXY_SECONDS
    while "HEALTHY" not in serve.status().proxies.values() and time.monotonic() < deadline:
        time.sleep(0.1)
    try:
        answer = httpx.get(f"http://{host}:{port}/-/healthz", trust_env=False)
        if answer.status_code in (httpx.codes.OK, httpx.codes.SERVICE_UNAVAILABLE):  # 503: no application yet
            return
    except httpx.TransportError:
        pass
    raise ValueError(
        f"Ray Serve of this cluster does not listen on {host}:{port}: it was started with another address, which "
        f"cannot be changed while it runs; set serve.host and serve.port to it, or end Serve (`serve shutdown`)"
    )
