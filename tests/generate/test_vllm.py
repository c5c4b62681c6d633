"""Engine vllm gives what engine torch gives. Needs vLLM, which CI has not: docs/serving.md says how it was run."""

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

pytest.importorskip("vllm", reason="vLLM is not installed", exc_type=ImportError)

from vila_ops.artifacts.kinds import Pretrained
from vila_ops.config import Model, Resources
from vila_ops.config.engine import AutoEngine, TorchEngine, VllmEngine
from vila_ops.config.images import Webp
from vila_ops.data.images import square
from vila_ops.data.records import Image
from vila_ops.errors import UnsupportedSetting
from vila_ops.generate.engine import (
    Engine,
    EngineOptions,
    generate_all,
    generate_output,
    hidden_states_of,
    image_features_of,
    score_all,
)
from vila_ops.generate.json_grammar import grammar_of
from vila_ops.generate.load import chosen, load_engine
from vila_ops.generate.request import Delta, Prompt, Sampling
from vila_ops.model.assemble import assemble

pytestmark = pytest.mark.slow

OPTIONS = EngineOptions(device="cpu", max_batch=4, prefill_tokens=256, keep_prefixes=True)
TINY_CACHE = VllmEngine(cache_bytes=2**28, compiled=False)
QUESTIONS = ("What is this?", "Is there a dog?", "Name three colours, please.", "Why?")


@pytest.fixture(scope="module")
def sealed(
    make_model: Callable[..., Model], make_resources: Callable[..., Resources], tiny: Path, tmp_path_factory: Any
) -> Pretrained:
    """A SigLIP tower, a GELU MLP and a Llama with heads of 32 dimensions, the fewest of vLLM's attention on CPUs."""
    language_model = {"kind": "random", "tokenizer": str(tiny / "tokenizer"), "num_heads": 2}
    return assemble(
        make_model("siglip", language_model=language_model), make_resources(tmp_path_factory.mktemp("vllm"))
    )


@pytest.fixture(scope="module")
def torch_engine(sealed: Pretrained) -> Iterator[Engine]:
    engine = load_engine(sealed, TorchEngine(), OPTIONS)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def engine(sealed: Pretrained) -> Iterator[Engine]:
    opened = load_engine(sealed, TINY_CACHE, OPTIONS)
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def prompts(torch_engine: Engine, tiny: Path) -> list[Prompt]:
    """With no image, one, and two side by side and apart."""
    files = sorted((tiny / "pairs").rglob("*.png"))[:3]
    fit, size = torch_engine.image_aspect_ratio, torch_engine.image_size
    squares = [square(file.read_bytes(), size=size, fit=fit, encoding=Webp()) for file in files]
    shown = [Image(one) for one in squares]
    parts = [(QUESTIONS[0],), (shown[0], QUESTIONS[1]), (shown[1], shown[2], QUESTIONS[2]), (shown[0], "and", shown[1])]
    tokenizer = torch_engine.tokenizer
    return [
        Prompt(tokenizer.prompt([("user", one)]), tuple(part.data for part in one if isinstance(part, Image)))
        for one in parts
    ]


def greedy(engine: Engine, tokens: int = 24, **more: Any) -> Sampling:
    """The penalty keeps a random model from one token for ever."""
    return Sampling(tokens, engine.tokenizer.stop_ids, frequency_penalty=1.0, **more)


async def deltas(engine: Engine, prompt: Prompt, sampling: Sampling, *, abort_after: int | None = None) -> list[Delta]:
    """The stream of a request, which is aborted after some deltas."""
    received = []
    async for delta in engine.generate(prompt, sampling, "one"):
        received.append(delta)
        if len(received) == abort_after:
            await engine.abort("one")
    return received


def test_greedy_answers_are_those_of_our_engine(engine: Engine, torch_engine: Engine, prompts: list[Prompt]) -> None:
    expected = generate_all(torch_engine, prompts, greedy(torch_engine))
    assert generate_all(engine, prompts, greedy(engine)) == expected
    assert generate_all(engine, prompts, greedy(engine)) == expected, "from its caches, in another event loop"
    assert all(len(set(one.ids)) > 4 for one in expected)


def test_a_stream_has_tokens_as_they_come_and_our_log_probabilities(
    engine: Engine, torch_engine: Engine, prompts: list[Prompt]
) -> None:
    received, expected = (
        asyncio.run(deltas(one, prompts[1], greedy(one, 8, logprobs=3))) for one in (engine, torch_engine)
    )
    assert [delta.finish_reason for delta in received[:-1]] == [None] * (len(received) - 1), "vLLM joins what waits"
    assert received[-1].finish_reason == "length"
    ids, known = ([one for delta in stream for one in delta.ids] for stream in (received, expected))
    assert ids == known
    tokens = [[one for delta in stream for one in delta.logprobs or ()] for stream in (received, expected)]
    assert len(tokens[1]) == 8
    for theirs, ours in zip(*tokens, strict=True):
        assert theirs.id == ours.id
        assert theirs.logprob == pytest.approx(ours.logprob, abs=1e-4)
        assert [token for token, _ in theirs.top] == [token for token, _ in ours.top]
        assert [nats for _, nats in theirs.top] == pytest.approx([nats for _, nats in ours.top], abs=1e-4)


def test_a_stop_token_ends_an_answer_and_is_not_in_it(engine: Engine, prompts: list[Prompt]) -> None:
    (whole,) = generate_all(engine, prompts[1:2], greedy(engine, 12))
    stop = next(token for token in whole.ids[1:] if token != whole.ids[0])
    (cut,) = generate_all(engine, prompts[1:2], Sampling(12, frozenset({stop}), frequency_penalty=1.0))
    assert (cut.ids, cut.finish_reason) == (whole.ids[: whole.ids.index(stop)], "stop")


def test_an_aborted_stream_ends_with_that_reason_and_leaves_its_name_free(
    engine: Engine, prompts: list[Prompt]
) -> None:
    received = asyncio.run(deltas(engine, prompts[0], Sampling(60, frozenset()), abort_after=2))
    assert received[-1].finish_reason == "abort"
    assert sum(len(delta.ids) for delta in received) < 60
    assert len(asyncio.run(deltas(engine, prompts[0], Sampling(3, frozenset())))) == 3


def test_a_draw_depends_on_seed_and_choice(engine: Engine, prompts: list[Prompt]) -> None:
    def drawn(**settings: int) -> list[int]:
        sampling = Sampling(16, frozenset(), temperature=1.0, **settings)
        return asyncio.run(generate_output(engine, prompts[1], sampling, "one")).ids

    assert drawn(seed=7) == drawn(seed=7)
    assert len({tuple(drawn(seed=seed, choice=choice)) for seed in (7, 8) for choice in (0, 1)}) == 4


def test_likelihoods_are_those_of_our_engine(engine: Engine, torch_engine: Engine, prompts: list[Prompt]) -> None:
    ids = engine.tokenizer.text_ids
    items = [(prompt, [ids("A dog."), ids("Two cats and a red circle.")]) for prompt in prompts]
    received, expected = score_all(engine, items), score_all(torch_engine, items)
    for got, ours in zip(received, expected, strict=True):
        assert [one.tokens for one in got] == [one.tokens for one in ours]
        assert [one.nll for one in got] == pytest.approx([one.nll for one in ours], abs=1e-3)


def test_an_answer_follows_a_json_schema_in_our_form(engine: Engine, prompts: list[Prompt]) -> None:
    schema = {
        "type": "object",
        "properties": {"dog": {"type": "boolean"}, "legs": {"enum": [3, 4]}},
        "required": ["dog", "legs"],
        "additionalProperties": False,
    }
    (answer,) = generate_all(engine, prompts[1:2], greedy(engine, 64, json_schema=json.dumps(schema)))
    text = engine.tokenizer.decode(answer.ids)
    assert answer.finish_reason == "stop"
    jsonschema.validate(json.loads(text), schema)
    assert text == json.dumps(json.loads(text)), "one line, with the blanks of Python's json"


def test_other_answers_go_on_while_a_schema_is_checked(
    engine: Engine, prompts: list[Prompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    checking, end = threading.Event(), threading.Event()

    def held_up(schema: str) -> str:
        checking.set()
        assert end.wait(60)
        return grammar_of(schema)

    async def both() -> str:
        schema = json.dumps({"type": "boolean"})
        held = asyncio.create_task(
            generate_output(engine, prompts[0], greedy(engine, 8, json_schema=schema), "with a schema")
        )
        assert await asyncio.to_thread(checking.wait, 60)
        assert len(await deltas(engine, prompts[0], Sampling(3, frozenset()))) > 0
        end.set()
        return engine.tokenizer.decode((await held).ids)

    monkeypatch.setattr("vila_ops.generate.vllm.grammar_of", held_up)
    assert asyncio.run(both()) in ("true", "false")


def test_the_image_token_is_never_drawn_and_a_bias_holds(engine: Engine, prompts: list[Prompt]) -> None:
    image = engine.tokenizer.image_id
    (answer,) = generate_all(engine, prompts[:1], Sampling(4, frozenset(), logit_bias={image: 1e4, 40: 1e3}))
    assert answer.ids == [40] * 4


def test_what_vllm_cannot_do_is_refused_by_name(engine: Engine, sealed: Pretrained, prompts: list[Prompt]) -> None:
    with pytest.raises(UnsupportedSetting, match=r"0\.005 is below 0\.01") as refused:
        generate_all(engine, prompts[:1], Sampling(4, frozenset(), temperature=0.005))
    assert refused.value.name == "temperature"
    with pytest.raises(ValueError, match="gives no hidden states"):
        hidden_states_of(engine, prompts[0], [1])
    with pytest.raises(ValueError, match="gives no features"):
        image_features_of(engine, prompts[1].images)
    with pytest.raises(ValueError, match="precision int8 is of our own engine"):
        load_engine(sealed, TINY_CACHE, EngineOptions(device="cpu", precision="int8"))


def test_auto_takes_vllm_only_where_it_loads_the_model(
    sealed: Pretrained, make_model: Callable[..., Model], make_resources: Callable[..., Resources], tmp_path: Path
) -> None:
    assert chosen(sealed, AutoEngine(), OPTIONS) == VllmEngine()
    assert chosen(sealed, AutoEngine(), EngineOptions(device="cpu", precision="int4")) == TorchEngine()
    narrow = assemble(make_model("siglip"), make_resources(tmp_path))
    assert chosen(narrow, AutoEngine(), OPTIONS) == TorchEngine(), "its heads have 16 dimensions"
    with pytest.raises(ValueError, match="this model's have 16"):
        load_engine(narrow, TINY_CACHE, OPTIONS)
    other = assemble(make_model("dinov2"), make_resources(tmp_path))
    assert chosen(other, AutoEngine(), OPTIONS) == TorchEngine()
