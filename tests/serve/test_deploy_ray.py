"""A service on a running Ray cluster outlives its deployer and is changed without a failed request, behind its keys."""

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from http.client import HTTPResponse
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample
from ray import serve
from ray.experimental import internal_kv
from ray.serve.schema import ServeDeploySchema

from tests.serve.app.live import HELLO, MODEL, upload, wait_until
from tests.serve.app.test_access import ROUTES, key_id, made, status
from tests.serve.commands import TINY, Commands, tiny_run
from vila_ops.artifacts.kinds import ModelVersion
from vila_ops.cluster import connect
from vila_ops.config import Resources, Service
from vila_ops.config.resources import ServeResources, StorageResources
from vila_ops.config.serve import Access, RequestLimits, Samples
from vila_ops.generate.load import tokenizer_of
from vila_ops.registry.alias_register import move
from vila_ops.serve.app.keys import revoke_key
from vila_ops.serve.backends.backend import START_SECONDS
from vila_ops.serve.backends.proxy_notes import NAMESPACE, RELEASE, announce_release
from vila_ops.serve.backends.ray_serve import RayServe
from vila_ops.serve.credentials import KEY_VARIABLE, authorization
from vila_ops.serve.deploy import deploy, undeploy
from vila_ops.serve.router.state import Canary, ServiceState

pytestmark = [pytest.mark.ray, pytest.mark.slow]

LONG = 1900
"""Tokens of an answer that is under way long enough to be seen; the tiny model's context has 2,048."""
SERVICE = Service(name="tiny-ray", max_new_tokens=LONG, request_timeout_seconds=600)
RAY_SERVICE = Path(__file__).parents[2] / "infra/kubernetes/base/ray-service.yaml"
LIMITS = RequestLimits(upload_seconds=3 * START_SECONDS)
"""For a busy machine, on which the uploads of a test take long to begin; one of them lasts as long as a deployment."""
SHORT = 8
"""Tokens of an answer that begins after a deployment."""
UPLOADS = 33
"""Bodies of which half arrives. By default Ray's proxy sends a replica five requests at a time."""
AUTOSCALE = "resources.serve.autoscale={max_replicas: 2, requests_per_replica: 1, up_seconds: 0.1}"
LIFTING = {b"x-request-disconnect-disabled": b"?1", b"x-request-timeout-seconds": b"0"}
"""By which Ray's proxy would go on for a client that has left, for as long as it takes."""
STRANGE = (
    (b"x-request-timeout-seconds", b"0.001"),
    (b"x-request-timeout-seconds", b"\xff"),
    (b"x-request-disconnect-disabled", b"\xff"),
    (b"x-request-id", b"\xff"),
    (b"x-request-id", b"a b"),
    (b"x-session-id", b"\xff"),
    (b"X_Session_Id", b"one"),
    (b"serve_multiplexed_model_id", b"another"),
    (b"Serve-Multiplexed-Model-Id", b"\xff"),
)
"""Headers that Ray's proxy reads, with values that it would obey or fail on."""
RAY_ROUTES = ("/-/routes", "/-/", "/-/healthz/", "/%2d/routes", "/-/anything")


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A file of keys; the environment has one of them."""
    path = tmp_path_factory.mktemp("keys") / "keys.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(KEY_VARIABLE, made(path))
        yield path


@pytest.fixture(scope="module")
def resources(
    ray_cluster: str, keys: Path, free_ports: Callable[[int], list[int]], tmp_path_factory: pytest.TempPathFactory
) -> Resources:
    """Resources of a cluster of this test."""
    access, samples = Access(key_file=str(keys)), Samples(share=1)
    own = ServeResources(port=free_ports(1)[0], cpus_per_replica=1, access=access, samples=samples, limits=LIMITS)
    storage = StorageResources(store=str(tmp_path_factory.mktemp("ray")))
    return Resources(launch="ray", ray_address=ray_cluster, device="cpu", serve=own, storage=storage)


def query(url: str) -> str | None:
    """The model that answers one short request."""
    client = openai.OpenAI(base_url=f"{url}/v1", api_key=os.environ[KEY_VARIABLE], max_retries=0, timeout=1200)
    return client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=2).system_fingerprint


def replica(url: str) -> dict[str, Any]:
    """What /health says about the replica."""
    health: dict[str, Any] = httpx.get(f"{url}/health", headers=authorization()).json()
    return {**health["replica"], "model": health["model"]}


@contextmanager
def clients(url: str, *, number: int = 2) -> Iterator[set[str | None]]:
    """The models that answer clients during the body; no request of theirs fails."""
    done, seen, failed = threading.Event(), set(), []

    def keep_querying() -> None:
        while not done.is_set():
            try:
                seen.add(query(url))
            except openai.OpenAIError as error:
                failed.append(error)
            time.sleep(0.05)

    with ThreadPoolExecutor() as threads:
        for _ in range(number):
            threads.submit(keep_querying)
        try:
            yield seen
        finally:
            done.set()
    assert not failed


def long_answer(version: ModelVersion) -> dict[str, Any]:
    """A request whose answer has as many tokens as it may have."""
    no_end = {str(token): -100 for token in tokenizer_of(version.checkpoint).stop_ids}
    return {"model": MODEL, "messages": HELLO, "max_tokens": LONG, "logit_bias": no_end}


def state(resources: Resources) -> ServiceState:
    """The register of the service."""
    return RayServe(SERVICE.name, resources).register.load()


def check_bodies(url: str) -> None:
    """A body that is too long and a route that is not there are refused in OpenAI's form."""
    headers = {"Content-Type": "application/json", **authorization()}
    content = b"{" + b" " * SERVICE.max_body_bytes
    assert httpx.post(f"{url}/v1/chat/completions", content=content, headers=headers).status_code == 413
    assert httpx.get(f"{url}/v1/nothing", headers=headers).json()["error"]["type"] == "invalid_request_error"


def check_keys(url: str, keys: Path, below: str) -> None:
    """Every route of the live port wants a valid key of its scope; of Serve's own, only the proxy's health is shown."""
    good, other = os.environ[KEY_VARIABLE], made(keys, scope="metrics")
    expired, revoked = made(keys, lifetime=timedelta(0)), made(keys)
    revoke_key(keys, key_id(revoked))
    routes = [*ROUTES, *((method, below + path) for method, path in ROUTES if path.startswith(("/v1", "/m", "/ver")))]
    for method, path in routes:
        own = path.startswith("/-/")
        answers = {status(url, method, path, key) for key in (None, "x", expired, revoked)}
        assert answers == {404 if own else 401}, path
        route = path.removeprefix(below)
        if route.startswith("/v1/"):
            assert status(url, method, path, other) == 403, path
        elif route in ("/metrics", "/%6detrics"):
            assert (status(url, method, path, good), status(url, method, path, other)) == (403, 200), path
    for path in RAY_ROUTES:
        assert {status(url, "GET", path, key) for key in (None, good, other)} <= {401, 404}, path
    assert httpx.get(f"{url}/-/healthz").text == "success"


def scraped(url: str, key: str, name: str) -> list[Sample]:
    """The samples of a metric, one for each replica."""
    text = httpx.get(f"{url}/metrics", headers={"Authorization": f"Bearer {key}"}).text
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return [sample for sample in samples if sample.name == name]


def check_growth(url: str, canary: Canary | None, keys: Path, body: dict[str, Any]) -> None:
    """A version that has more requests at once than one of its replicas should have gets a second one."""
    assert canary is not None
    key, path, enough = made(keys, scope="metrics"), f"{canary.track.url}/v1/chat/completions", threading.Event()
    asked = {"json": {**body, "stream": True}, "headers": authorization(), "timeout": 300}

    def keep_asking() -> None:
        while not enough.is_set():
            with httpx.stream("POST", path, **asked) as response:
                assert response.status_code == 200
                next((line for line in response.iter_lines() if enough.is_set()), None)

    def replicas() -> int:
        counted = scraped(url, key, "vllm:generation_tokens_total")
        return sum(sample.labels["model_version"] == "1" for sample in counted)

    assert replicas() == 1
    began = time.monotonic()
    with ThreadPoolExecutor() as threads:
        asking = [threads.submit(keep_asking) for _ in range(4)]
        try:
            while replicas() == 1:
                assert time.monotonic() < began + START_SECONDS
                time.sleep(0.2)
        finally:
            enough.set()
    for one in asking:
        one.result()


def check_metrics(url: str, keys: Path) -> None:
    """One scrape shows the two replicas of version 1 and the one of version 2."""
    counted = scraped(url, made(keys, scope="metrics"), "vllm:generation_tokens_total")
    assert sorted(sample.labels["model_version"] for sample in counted) == ["1", "1", "2"]
    assert len({sample.labels["replica"] for sample in counted}) == 3
    answered = {sample.labels["model_version"] for sample in counted if sample.value > 0}
    assert answered == {"1", "2"}, "both have answered the question with which they start"


def summed(url: str, key: str, name: str) -> float:
    """The value of a metric over all replicas."""
    return sum(sample.value for sample in scraped(url, key, name))


def check_uploads(url: str, keys: Path, model: str) -> None:
    """Bodies of which half has arrived hold nobody up, and a replica forgets them when their clients leave."""
    key = made(keys, scope="metrics")
    with ExitStack() as stack:
        for _ in range(UPLOADS):
            upload(url, stack, b'{"messages": [' + b" " * 45_000, authorization())
        wait_until(lambda: summed(url, key, "vila:uploads_under_way") == UPLOADS)
        assert query(url) == model
        assert summed(url, key, "vila:uploads_under_way") == UPLOADS
    wait_until(lambda: summed(url, key, "vila:uploads_under_way") == 0)


def check_headers(url: str, below: str, keys: Path, body: dict[str, Any]) -> None:
    """What Ray's proxy would obey changes nothing, at the service's address and below that of a version."""
    key, own = made(keys, scope="metrics"), {name.encode(): value.encode() for name, value in authorization().items()}
    for at in (url, below):
        path, ended = f"{at}/v1/chat/completions", summed(url, key, "vllm:request_success_total")
        asked = {"json": {**body, "stream": True}, "headers": own | LIFTING, "timeout": 300}
        with httpx.stream("POST", path, **asked) as response:
            lines = response.iter_lines()  # the connection is closed with it
            assert next(lines).startswith("data: {")
            wait_until(lambda: summed(url, key, "vila:answers_under_way") == 1)
        wait_until(lambda: summed(url, key, "vila:answers_under_way") == 0)
        assert summed(url, key, "vllm:request_success_total") == ended, "it was given up when its client left"
        short = body | {"max_tokens": 1}
        answers = {one: httpx.post(path, json=short, headers=own | dict([one]), timeout=300) for one in STRANGE}
        assert {one: answer.status_code for one, answer in answers.items()} == dict.fromkeys(STRANGE, 200)


@contextmanager
def requests_across_the_change(url: str, keys: Path, body: dict[str, Any], *, model: str) -> Iterator[None]:
    """A stream that began before the body is read on after it, and a request of which half was sent is sent on.

    The model of before streams both to their end. What it answers to the second one, it computes after the body.
    """
    asked = {**body, "stream": True, "stream_options": {"include_usage": True}}
    short = json.dumps({**asked, "max_tokens": SHORT}).encode().ljust(90_000)
    with ExitStack() as stack:
        path, sent = f"{url}/v1/chat/completions", {"json": asked, "headers": authorization(), "timeout": 300}
        lines = stack.enter_context(httpx.stream("POST", path, **sent)).iter_lines()
        first, key = next(lines), made(keys, scope="metrics")
        connection = upload(url, stack, short[:45_000], authorization())
        wait_until(lambda: summed(url, key, "vila:uploads_under_way") == 1)
        yield
        check_whole([first, *lines], model, tokens=LONG)
        connection.settimeout(300)
        connection.sendall(short[45_000:])
        response = HTTPResponse(connection)
        response.begin()
        check_whole([line.decode().strip() for line in response], model, tokens=SHORT)


def check_whole(lines: list[str], model: str, *, tokens: int) -> None:
    """A stream of one model had all its tokens, its usage and its last event."""
    events = [line.removeprefix("data: ") for line in lines if line]
    *texts, usage = [json.loads(event) for event in events[:-1]]
    assert events[-1] == "[DONE]"
    assert {chunk["system_fingerprint"] for chunk in (*texts, usage)} == {model}
    assert texts[-1]["choices"][0]["finish_reason"] == "length"
    assert usage["usage"]["completion_tokens"] == tokens


def check_grace() -> None:
    """Ray gives replicas that end the time of an upload and of the longest answer; by default that is over 40 s."""
    assert Service(name="any").request_timeout_seconds > 40
    needed = LIMITS.upload_seconds + SERVICE.request_timeout_seconds
    applications = serve.context._get_global_client().get_serve_details()["applications"].values()
    assert applications
    for application in applications:
        config = application["deployments"][SERVICE.name]["deployment_config"]
        assert config["graceful_shutdown_timeout_s"] >= needed


def check_lost_replica(url: str, keys: Path, body: dict[str, Any]) -> None:
    """What a killed replica answered ends in OpenAI's form, as a stream and as a whole; Ray starts another one."""
    key, before = made(keys, scope="metrics"), replica(url)
    pid, path = before["pid"], f"{url}/v1/chat/completions"
    with ThreadPoolExecutor() as threads:
        asked = {"json": {**body, "stream": True}, "headers": authorization(), "timeout": 300}
        with httpx.stream("POST", path, **asked) as response:
            lines = response.iter_lines()
            assert next(lines).startswith("data: {")
            whole = threads.submit(httpx.post, path, json=body, headers=authorization(), timeout=300)
            wait_until(lambda: [one.value for one in scraped(url, key, "vila:answers_under_way")] == [2])
            os.kill(pid, signal.SIGKILL)
            last = [line for line in lines if line][-1]
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "replica_lost"
    assert (whole.result().status_code, whole.result().json()["error"]["code"]) == (503, "no_replica")
    assert whole.result().headers["x-request-id"]
    assert query(url) == before["model"], "which waits for the other one"
    assert replica(url)["actor_id"] != before["actor_id"]


def check_refusals(resources: Resources, version: ModelVersion, *, other_port: int) -> None:
    """Before a replica is started: another address, another service, and a proxy of another release."""
    with pytest.raises(ValueError, match="does not listen on"):
        deploy(SERVICE, version, resources.with_changes({"serve.port": other_port}))
    with pytest.raises(ValueError, match="is the address of the service tiny-ray"):
        deploy(Service(name="another"), version, resources)
    internal_kv._internal_kv_put(RELEASE, "0.0", namespace=NAMESPACE)
    with pytest.raises(ValueError, match="was started without the router of vila-ops"):
        deploy(SERVICE, version, resources)
    announce_release()
    assert len(serve.status().applications) == 1


def test_a_service_is_deployed_updated_and_released_under_load(
    resources: Resources,
    keys: Path,
    free_ports: Callable[[int], list[int]],
    versions: tuple[ModelVersion, ModelVersion],
    deploy_elsewhere: Callable[..., str],
    empty_database: Path,
    tmp_path: Path,
) -> None:
    one, two = (version.checkpoint.digest for version in versions)
    url = deploy_elsewhere(SERVICE, versions[0], resources)
    assert query(url) == one
    before = replica(url)
    assert before["model"] == before["digest"] == one
    assert psutil.pid_exists(before["pid"])
    assert len(before["node_id"]) == 56
    assert len(before["actor_id"]) == 32

    first = deploy(SERVICE, versions[0], resources)
    assert (first.url, first.model) == (url, one)
    assert replica(url)["actor_id"] == before["actor_id"]

    stable = state(resources).stable
    assert stable is not None
    long = long_answer(versions[0])
    check_bodies(url)
    check_keys(url, keys, stable.url.removeprefix(url))
    check_uploads(url, keys, one)
    check_headers(url, stable.url, keys, long)

    with requests_across_the_change(url, keys, long, model=one), clients(url) as seen:
        second = deploy(SERVICE, versions[1], resources)
        assert query(url) == two
    assert seen >= {one}
    assert second.url == url
    check_grace()
    after = replica(url)
    assert after["actor_id"] != before["actor_id"]
    wait_until(lambda: len(serve.status().applications) == 1)

    commands = Commands(tmp_path, empty_database, versions, tiny_run(SERVICE, resources))
    with clients(url) as seen:
        canary = commands.said("canary", "--version", "1", "--share", "0.5", "-s", AUTOSCALE)
        assert canary == {"url": url, "model": one, "version": 1}
        check_growth(url, state(resources).canary, keys, long)
        assert query(url) in (one, two)
        check_metrics(url, keys)
        assert commands.said("promote") == canary
        assert query(url) == one
        assert commands.said("rollback") == {"url": url, "model": two, "version": 2}
    assert query(url) == two
    assert seen == {one, two}
    assert commands.aliases() == {"champion": 1}
    wait_until(lambda: state(resources).tracks() == (state(resources).stable,))

    check_lost_replica(url, keys, long)

    check_refusals(resources, versions[0], other_port=free_ports(1)[0])

    undeploy(SERVICE, resources)
    undeploy(SERVICE, resources)
    connect(resources)
    assert not serve.status().applications
    assert state(resources).tracks() == ()


def test_a_ray_service_of_kuberay_serves_the_champion_and_then_a_version_under_load(
    resources: Resources, versions: tuple[ModelVersion, ModelVersion], tmp_path: Path
) -> None:
    """The manifest's own configuration, with files of this test, sent as Ray's dashboard sends it for the operator."""
    one, two = versions
    changes = {"service": SERVICE.model_dump(mode="json"), "gate": {"model_name": MODEL}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"extends": [str(TINY)], **changes}))
    (tmp_path / "resources.yaml").write_text(yaml.safe_dump(resources.model_dump(mode="json")))
    for version, before in ((one, None), (two, 1)):
        move(MODEL, {"champion": version}, over=before, reason="better", store=resources.storage.store)
    config = yaml.safe_load(yaml.safe_load(RAY_SERVICE.read_text())["spec"]["serveConfigV2"])
    url = f"http://127.0.0.1:{resources.serve.port}"
    connect(resources)
    # as `deploy` has started it, where that test ran before
    serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": resources.serve.port})
    client = serve.context._get_global_client()

    def serve_version(version: str | int) -> None:
        files = {name: str(tmp_path / f"{name}.yaml") for name in ("recipe", "resources")}
        config["applications"][0]["args"] = {**files, "version": version}
        client.deploy_apps(ServeDeploySchema.model_validate(config))
        deadline = time.monotonic() + START_SECONDS
        while (application := serve.status().applications["vila"]).status != "RUNNING":
            assert application.status != "DEPLOY_FAILED", application.message
            assert time.monotonic() < deadline
            time.sleep(0.2)

    serve_version("champion")
    assert query(url) == two.checkpoint.digest
    with clients(url, number=1) as seen:
        serve_version(1)
        assert query(url) == one.checkpoint.digest
    assert seen >= {two.checkpoint.digest}
    serve.delete("vila")
