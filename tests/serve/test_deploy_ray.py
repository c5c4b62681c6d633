"""A service on a running Ray cluster outlives its deployer and is updated without a failed request."""

import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import httpx
import openai
import psutil
import pytest
from ray import serve

from tests.serve.app.live import wait_until
from vila_ops.artifacts.kinds import ModelVersion
from vila_ops.cluster import connect
from vila_ops.config import Resources, Service
from vila_ops.config.resources import ServeResources, StorageResources
from vila_ops.serve.backends.ray_serve import RayServe
from vila_ops.serve.deploy import deploy, undeploy

pytestmark = [pytest.mark.ray, pytest.mark.slow]

SERVICE = Service(name="tiny-ray", max_new_tokens=8, request_timeout_seconds=30)


@pytest.fixture(scope="module")
def resources(
    ray_cluster: str, free_ports: Callable[[int], list[int]], tmp_path_factory: pytest.TempPathFactory
) -> Resources:
    """Resources of a cluster of this test."""
    own = ServeResources(port=free_ports(1)[0], cpus_per_replica=1)
    storage = StorageResources(store=str(tmp_path_factory.mktemp("ray")))
    return Resources(launch="ray", ray_address=ray_cluster, serve=own, storage=storage)


def query(url: str) -> openai.types.chat.ChatCompletion:
    """The answer to one short request."""
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=1200)
    return client.chat.completions.create(
        model="tiny-vila", messages=[{"role": "user", "content": "Hello"}], max_tokens=2
    )


def replica(url: str) -> dict[str, Any]:
    """What /health says about the replica."""
    health: dict[str, Any] = httpx.get(f"{url}/health").json()
    return {**health["replica"], "model": health["model"]}


def test_deploy_again_and_another_version_under_load(
    resources: Resources,
    free_ports: Callable[[int], list[int]],
    versions: tuple[ModelVersion, ModelVersion],
    deploy_elsewhere: Callable[..., str],
) -> None:
    url = deploy_elsewhere(SERVICE, versions[0], resources)
    assert query(url).system_fingerprint == versions[0].checkpoint.digest
    before = replica(url)
    assert before["model"] == before["digest"] == versions[0].checkpoint.digest
    assert psutil.pid_exists(before["pid"])
    assert len(before["node_id"]) == 56
    assert len(before["actor_id"]) == 32

    first = deploy(SERVICE, versions[0], resources)
    assert (first.url, first.model) == (url, versions[0].checkpoint.digest)
    assert replica(url)["actor_id"] == before["actor_id"]

    body = httpx.post(
        f"{first.url}/v1/chat/completions",
        content=b"{" + b" " * SERVICE.max_body_bytes,
        headers={"Content-Type": "application/json"},
    )
    assert body.status_code == 413
    assert httpx.get(f"{first.url}/v1/nothing").json()["error"]["type"] == "invalid_request_error"

    hidden = httpx.get(f"{first.url}/-/routes")
    assert (hidden.status_code, hidden.json()["error"]["code"]) == (404, "not_found")
    assert httpx.get(f"{first.url}/-/healthz").status_code == 200

    done, seen, failed = threading.Event(), [], []

    def keep_querying() -> None:
        while not done.is_set():
            try:
                seen.append(query(first.url).system_fingerprint)
            except openai.OpenAIError as error:
                failed.append(error)
            time.sleep(0.05)

    with ExitStack() as stack:
        clients = [threading.Thread(target=keep_querying) for _ in range(2)]
        for one in clients:
            one.start()
            stack.callback(one.join)
        stack.callback(done.set)
        second = deploy(SERVICE, versions[1], resources)
    assert not failed
    assert set(seen) >= {versions[0].checkpoint.digest}
    assert second.url == first.url
    assert query(second.url).system_fingerprint == versions[1].checkpoint.digest
    after = replica(second.url)
    assert after["actor_id"] != before["actor_id"]
    wait_until(lambda: len(serve.status().applications) == 2)

    elsewhere = resources.with_changes({"serve.port": free_ports(1)[0]})
    with pytest.raises(ValueError, match="does not listen on"):
        deploy(SERVICE, versions[1], elsewhere)
    assert replica(second.url)["actor_id"] == after["actor_id"]

    undeploy(SERVICE, resources)
    undeploy(SERVICE, resources)
    connect(resources)
    assert not serve.status().applications
    assert RayServe(SERVICE.name, resources).register.load().tracks() == ()
