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
from vila_ops.config import Model, Resources, Service
from vila_ops.config.engine import VllmEngine
from vila_ops.config.resources import ServeResources, StorageResources
from vila_ops.config.serve import Golden
from vila_ops.model.assemble import assemble
from vila_ops.serve.deploy import deploy, undeploy

pytestmark = [pytest.mark.ray, pytest.mark.slow]

QUESTION = {"type": "text", "text": "What is this?"}


@pytest.fixture(scope="module")
def image(tiny: Path) -> Path:
    return tiny / "pairs/dog.png"


@pytest.fixture(scope="module")
def url(
    ray_cluster: str,
    image: Path,
    make_model: Callable[..., Model],
    make_resources: Callable[..., Resources],
    tiny: Path,
    free_ports: Callable[[int], list[int]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[str]:
    """A service whose replica has answered the golden image."""
    language_model = {"kind": "random", "tokenizer": str(tiny / "tokenizer"), "num_heads": 2}
    sealed = assemble(make_model("siglip", language_model=language_model), make_resources(tmp_path_factory.mktemp("m")))
    checkpoint = Checkpoint(uri=sealed.uri, digest=sealed.digest, parents=sealed.parents, stage="sft", step=1)
    version = ModelVersion(name="tiny-vila", version=1, checkpoint=checkpoint, promoted=True)
    engine = VllmEngine(cache_bytes=2**28, compiled=False)
    own = ServeResources(port=free_ports(1)[0], cpus_per_replica=1, engine=engine)
    storage = StorageResources(store=str(tmp_path_factory.mktemp("ray")))
    resources = Resources(launch="ray", ray_address=ray_cluster, device="cpu", serve=own, storage=storage)
    golden = Golden(image=str(image), question="What is this?", answer="(?s).*")
    service = Service(name="vllm", max_new_tokens=1500, request_timeout_seconds=300, golden=golden)
    yield deploy(service, version, resources).url
    undeploy(service, resources)


def running(url: str) -> int:
    """Requests that the front has under way."""
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    return sum(float(line.split()[-1]) > 0 for line in lines if line.startswith("vila:answers_under_way"))


def test_chats_with_an_image_stream_and_what_a_client_leaves_ends(url: str, image: Path) -> None:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=300)
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
