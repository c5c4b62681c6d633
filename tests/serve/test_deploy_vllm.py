"""The engine vllm in a replica of Ray Serve, behind our front. Needs vLLM, which CI has not: docs/serving.md."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

pytest.importorskip("vllm", reason="vLLM is not installed", exc_type=ImportError)

from tests.serve.app.live import image_part, wait_until
from vila_ops.artifacts.kinds import Checkpoint, ModelVersion
from vila_ops.config import CanaryRules, Model, Resources, Service
from vila_ops.config.engine import VllmEngine
from vila_ops.config.resources import ServeResources, StorageResources
from vila_ops.config.serve import Golden
from vila_ops.model.assemble import assemble
from vila_ops.release.canary import promote, roll_back, start_canary
from vila_ops.serve.deploy import deploy, undeploy

pytestmark = [pytest.mark.ray, pytest.mark.slow]

QUESTION = {"type": "text", "text": "What is this?"}


@pytest.fixture(scope="module")
def image(tiny: Path) -> Path:
    return tiny / "pairs/dog.png"


@pytest.fixture(scope="module")
def versions(
    make_model: Callable[..., Model],
    make_resources: Callable[..., Resources],
    tiny: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[ModelVersion, ModelVersion]:
    """Two versions that differ in their weights, and that vLLM computes."""
    language_model = {"kind": "random", "tokenizer": str(tiny / "tokenizer"), "num_heads": 2}
    place = make_resources(tmp_path_factory.mktemp("models"))

    def version(number: int) -> ModelVersion:
        sealed = assemble(make_model("siglip", language_model=language_model, seed=number), place)
        checkpoint = Checkpoint(uri=sealed.uri, digest=sealed.digest, parents=sealed.parents, stage="sft", step=number)
        return ModelVersion(name="tiny-vila", version=number, checkpoint=checkpoint, promoted=True)

    return version(1), version(2)


@pytest.fixture(scope="module")
def service(image: Path) -> Service:
    """A service with a golden image."""
    golden = Golden(image=str(image), question="What is this?", answer="(?s).*")
    return Service(name="vllm", max_new_tokens=1500, request_timeout_seconds=300, golden=golden)


@pytest.fixture(scope="module")
def resources(
    ray_cluster: str, free_ports: Callable[[int], list[int]], tmp_path_factory: pytest.TempPathFactory
) -> Resources:
    """Resources of a cluster of this test, whose nodes have the environment of this process."""
    engine = VllmEngine(cache_bytes=2**28, compiled=False)
    own = ServeResources(port=free_ports(1)[0], cpus_per_replica=1, engine=engine, canary=CanaryRules(share=0.5))
    storage = StorageResources(store=str(tmp_path_factory.mktemp("ray")))
    return Resources(launch="ray", ray_address=ray_cluster, device="cpu", serve=own, storage=storage)


@pytest.fixture(scope="module")
def url(service: Service, versions: tuple[ModelVersion, ModelVersion], resources: Resources) -> Iterator[str]:
    """Version 1, whose replica has answered the golden image."""
    yield deploy(service, versions[0], resources).url
    undeploy(service, resources)


def asking(url: str) -> openai.OpenAI:
    """A client that tries once."""
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=300)


def answering(url: str, image: Path) -> list[str | None]:
    """Which model answers each of sixteen conversations about an image."""
    messages: Any = [{"role": "user", "content": [image_part(image.read_bytes()), QUESTION]}]
    ask = asking(url).chat.completions.create
    return [
        ask(model="tiny-vila", messages=messages, max_tokens=2, user=f"{number}").system_fingerprint
        for number in range(16)
    ]


def running(url: str) -> int:
    """Requests that the front has under way."""
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    return sum(float(line.split()[-1]) > 0 for line in lines if line.startswith("vila:answers_under_way"))


def test_chats_with_an_image_stream_and_what_a_client_leaves_ends(url: str, image: Path) -> None:
    client = asking(url)
    asked: dict[str, Any] = {
        "model": "tiny-vila",
        "messages": [{"role": "user", "content": [image_part(image.read_bytes()), QUESTION]}],
    }
    health = httpx.get(f"{url}/health").json()
    assert health["replica"]["engine"] == "vllm"
    whole = client.chat.completions.create(**asked, max_tokens=12)
    chunks = list(client.chat.completions.create(**asked, max_tokens=12, stream=True))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == whole.choices[0].message.content
    assert len(chunks) > 5, "it comes in pieces"
    stream = client.chat.completions.create(**asked, max_tokens=1500, stream=True, logit_bias={"2": -100})
    next(iter(stream))
    wait_until(lambda: running(url) > 0)
    stream.close()
    wait_until(lambda: running(url) == 0)


def test_a_canary_answers_its_share_of_conversations_and_is_promoted(
    url: str, image: Path, service: Service, versions: tuple[ModelVersion, ModelVersion], resources: Resources
) -> None:
    first, second = (version.checkpoint.digest for version in versions)
    canary = start_canary(service, versions[1], resources)
    assert (canary.url, canary.model) == (url, second)
    answered = answering(url, image)
    assert set(answered) == {first, second}
    assert answering(url, image) == answered, "a conversation stays with one version"
    assert promote(service, resources).model == second
    assert set(answering(url, image)) == {second}


def test_a_canary_that_is_rolled_back_answers_no_more(
    url: str, image: Path, service: Service, versions: tuple[ModelVersion, ModelVersion], resources: Resources
) -> None:
    first, second = (version.checkpoint.digest for version in versions)
    assert start_canary(service, versions[0], resources).model == first
    assert set(answering(url, image)) == {first, second}
    roll_back(service, resources)
    assert set(answering(url, image)) == {second}
