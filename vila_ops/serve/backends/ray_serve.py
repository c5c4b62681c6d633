"""The endpoint as a Ray Serve application on a running cluster; its controller and replicas outlive this process."""

import time
from contextlib import suppress
from typing import Any

import httpx
import ray
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.schema import ApplicationStatus, ProxyStatus

from vila_ops.serve.spec import Spec

ONGOING_PER_BATCH = 4
"""Requests that a replica may hold, in batches: one is decoded while the next ones are read."""


PROXY_SECONDS = 120.0
"""How long Serve's HTTP proxy may take to come up."""
PATIENCE = {"RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60", "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "30"}
"""Of the controller with its proxy: after three checks of 5 s it kills one that still imports, on a busy machine."""


class Replica:
    """One process with the weights; Ray Serve sends HTTP to the app that it builds."""

    def __init__(self, spec: str) -> None:
        from vila_ops.serve.app.load import load_app  # torch and transformers: in the replica only

        context = ray.get_runtime_context()
        replica = {
            "node_id": context.get_node_id(),
            "actor_id": context.get_actor_id(),
            "replica_id": serve.get_replica_context().replica_id.unique_id,
        }
        self.loaded = load_app(Spec.model_validate_json(spec), replica=replica)

    def __serve_build_asgi_app__(self) -> Any:
        return self.loaded


def apply(spec: Spec, *, host: str, port: int) -> None:
    """Ask for the application; Serve starts new replicas before it stops old ones, and drains those."""
    _start_proxy(host, port)
    service, capacity = spec.service, spec.capacity
    deployed = serve.deployment(
        name=service.name,
        num_replicas=capacity.replicas,
        ray_actor_options={"num_cpus": capacity.cpus_per_replica},
        max_ongoing_requests=ONGOING_PER_BATCH * capacity.max_batch,
        max_surge_percent=100,  # with Ray's default of 0 an update takes capacity away before it adds any
        rolling_update_percentage=1.0,
        graceful_shutdown_timeout_s=service.request_timeout_seconds,
        graceful_shutdown_wait_loop_s=0.5,
        max_constructor_retry_count=2,
    )(serve.ingress()(Replica))
    target = serve.RunTarget(deployed.bind(spec.model_dump_json()), name=service.name, route_prefix="/")
    serve.run_many([target], wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)


def running(name: str) -> bool:
    """Whether the application is in the state that was last asked for."""
    application = serve.status().applications.get(name)
    return application is not None and application.status == ApplicationStatus.RUNNING


def failure(name: str) -> str | None:
    """What went wrong with an application that will not come up; None while it still may."""
    application = serve.status().applications.get(name)
    if application is None or application.status not in (ApplicationStatus.DEPLOY_FAILED, ApplicationStatus.UNHEALTHY):
        return None
    return str(application.status.value)


def describe(name: str) -> str:
    """The state of an application, in Serve's words."""
    application = serve.status().applications.get(name)
    if application is None:
        return f"no application {name!r}"
    states = [f"{key}: {state.status.value} {state.message}" for key, state in application.deployments.items()]
    return "\n".join([f"{application.status.value} {application.message}", *states])


def remove(name: str) -> None:
    """End the application; Serve itself stays."""
    if name in serve.status().applications:
        serve.delete(name)


def _start_proxy(host: str, port: int) -> None:
    options = {"runtime_env": {"env_vars": PATIENCE}}
    with suppress(TimeoutError, RayActorError):  # the controller starts another proxy where one did not come up
        serve.start(proxy_location="HeadOnly", http_options={"host": host, "port": port}, controller_options=options)
    deadline = time.monotonic() + PROXY_SECONDS
    while ProxyStatus.HEALTHY not in serve.status().proxies.values() and time.monotonic() < deadline:
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
