"""Outputs and likelihoods are those of stock transformers, whatever shares a batch."""

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoProcessor

from vila_ops.artifacts import store
from vila_ops.artifacts.kinds import Pretrained
from vila_ops.artifacts.store import content
from vila_ops.config import Model, Resources
from vila_ops.config.engine import TorchEngine
from vila_ops.config.images import Webp
from vila_ops.data.images import square
from vila_ops.data.records import Image
from vila_ops.generate.engine import (
    EngineOptions,
    generate_all,
    generate_output,
    hidden_states_of,
    image_features_of,
    score_all,
)
from vila_ops.generate.request import Delta, Output, Prompt, Sampling
from vila_ops.generate.torch_engine import engine as torch_engine
from vila_ops.generate.torch_engine.engine import InProcessEngine
from vila_ops.generate.torch_engine.image_features import RecentFeatures, SaltedImage
from vila_ops.generate.torch_engine.loaded_model import read_model
from vila_ops.model import folder as model_folder
from vila_ops.model.assemble import assemble
from vila_ops.model.features import BATCH
from vila_ops.model.modify import Modifications
from vila_ops.model.trainable import EXPERT

QUESTIONS = (
    "What is this?",
    "Is there a dog?",
    "Name three colours, please.",
    "Why?",
    "Hello there, how are you today?",
)


@pytest.fixture(scope="module")
def sealed(
    make_model: Callable[..., Model], make_resources: Callable[..., Resources], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Pretrained, Path]:
    folder = tmp_path_factory.mktemp("generate")
    return assemble(make_model(), make_resources(folder)), folder


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "expert"])
def engine(request: pytest.FixtureRequest, sealed: tuple[Pretrained, Path]) -> InProcessEngine:
    """With a plain model, and with one whose visual expert differs from the text weights."""
    base, folder = sealed
    if request.param:
        base = _with_expert(base, folder)
    loaded = read_model(content(base), EngineOptions(folder / "features"))
    opened = InProcessEngine(loaded, max_batch=None)
    opened.scheduler.slots = 3  # fewer than there are prompts: rows have to join and leave
    return opened


def greedy(engine: InProcessEngine, max_new_tokens: int) -> Sampling:
    """Greedy decoding up to the tokenizer's stop tokens."""
    return Sampling(max_new_tokens, engine.tokenizer.stop_ids)


@pytest.fixture(scope="module")
def prompts(engine: InProcessEngine, tiny: Path) -> list[Prompt]:
    """Text only, one image, two images, of mixed lengths."""
    images = [
        square(path.read_bytes(), size=engine.image_size, fit=engine.image_aspect_ratio, encoding=Webp())
        for path in sorted((tiny / "pairs").glob("*.png"))[:3]
    ]
    made = [Prompt(engine.tokenizer.prompt([("user", (question,))])) for question in QUESTIONS]
    for used in (images[:1], images[1:], images):
        parts = (*(Image(data) for data in used), "What is this?")
        made.append(Prompt(engine.tokenizer.prompt([("user", parts)]), tuple(used)))
    return made


def test_hidden_states_are_those_of_transformers_layer_by_layer(engine: InProcessEngine, prompts: list[Prompt]) -> None:
    caption = engine.tokenizer.text_ids("A dog.")
    for prompt in (prompts[0], prompts[-1]):
        states = hidden_states_of(engine, prompt, caption)
        ids = torch.tensor([[*prompt.input_ids, *caption]])
        values = engine.loaded.features.pixels(prompt.images) if prompt.images else None  # type: ignore[attr-defined]
        with torch.no_grad():
            stock = engine.loaded.model(input_ids=ids, pixel_values=values, output_hidden_states=True).hidden_states
        assert len(states) == len(stock) == 3  # the embeddings and two layers
        for ours, theirs in zip(states, stock, strict=True):
            assert torch.allclose(torch.from_numpy(ours).float(), theirs[0], atol=1e-5)


def test_image_features_are_means_over_patches_of_the_tower_whatever_shares_a_pass(
    engine: InProcessEngine, prompts: list[Prompt]
) -> None:
    squares = list(prompts[-1].images)
    features = image_features_of(engine, [*squares, *[squares[0]] * BATCH, squares[1]])
    with torch.no_grad():
        pixels = engine.loaded.features.pixels(squares)  # type: ignore[attr-defined]
        states = engine.loaded.model.model.vision_tower(pixels, output_hidden_states=True).hidden_states
    stock = states[engine.loaded.model.config.vision_feature_layer][:, 1:].mean(dim=1)  # CLIP's first token is no patch
    assert torch.allclose(torch.from_numpy(features[: len(squares)]).float(), stock, atol=1e-6)
    assert (features[len(squares) : -1] == features[0]).all()
    assert (features[-1] == features[1]).all()


def _with_expert(base: Pretrained, root: Path) -> Pretrained:
    model = model_folder.load(content(base), modifications=Modifications(visual_expert=True))
    processor = AutoProcessor.from_pretrained(content(base))
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if EXPERT in name:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=random))
    at = store.address(Pretrained, revision=0, recipe={"expert": True}, parents=(base.digest,))
    attempt = store.begin(at, store=str(root / "store"))
    model_folder.save(model, attempt, processor=processor)
    return store.seal(Pretrained, at, attempt, facts={}, execution={})


def _stock_logits(engine: InProcessEngine, ids: list[int], images: tuple[bytes, ...]) -> torch.Tensor:
    """Logits (T, V) of the whole row in one pass, from pixels, by the forward method of transformers."""
    values = engine.loaded.features.pixels(images) if images else None  # type: ignore[attr-defined]
    with torch.no_grad():
        out: torch.Tensor = engine.loaded.model(input_ids=torch.tensor([ids]), pixel_values=values).logits[0]
    return out


def test_greedy_answers_are_those_of_one_full_forward_a_token(engine: InProcessEngine, prompts: list[Prompt]) -> None:
    outputs = generate_all(engine, prompts, greedy(engine, 6))
    for prompt, output in zip(prompts, outputs, strict=True):
        ids = list(prompt.input_ids)
        expected: list[int] = []
        for _ in range(6):
            logits = _stock_logits(engine, ids, prompt.images)[-1]
            logits[engine.tokenizer.image_id] = -torch.inf
            token = int(logits.argmax())
            if token == engine.tokenizer.eos_id:
                break
            expected.append(token)
            ids.append(token)
        assert output == Output(expected, "stop" if len(expected) < 6 else "length")


def test_an_answer_ends_at_any_stop_token(engine: InProcessEngine, prompts: list[Prompt]) -> None:
    (whole,) = generate_all(engine, prompts[:1], greedy(engine, 4))
    stop = whole.ids[2]
    (output,) = generate_all(engine, prompts[:1], Sampling(4, frozenset({stop})))
    assert output == Output(whole.ids[: whole.ids.index(stop)], "stop")


def test_scores_are_those_of_each_continuation_alone(engine: InProcessEngine, prompts: list[Prompt]) -> None:
    tokenizer = engine.tokenizer
    continuations = [tokenizer.text_ids(text) for text in ("A dog.", "A red apple on a table.", "No")]
    scored = score_all(engine, [(prompt, continuations) for prompt in prompts])
    for prompt, scores in zip(prompts, scored, strict=True):
        for tokens, score in zip(continuations, scores, strict=True):
            logits = _stock_logits(engine, prompt.input_ids + tokens, prompt.images).log_softmax(-1)
            start = len(prompt.input_ids) - 1
            expected = -sum(float(logits[start + place, token]) for place, token in enumerate(tokens))
            assert score.nll == pytest.approx(expected, abs=2e-4)
            assert score.tokens == len(tokens)


def test_text_prompts_run_neither_tower_nor_projector(engine: InProcessEngine, prompts: list[Prompt]) -> None:
    seen: list[str] = []
    parts = (engine.loaded.model.model.vision_tower, engine.loaded.model.model.multi_modal_projector)
    hooks = [part.register_forward_pre_hook(lambda part, _: seen.append(type(part).__name__)) for part in parts]
    try:
        generate_all(engine, prompts[:4], greedy(engine, 3))
        score_all(engine, [(prompt, [[5, 6, 7]]) for prompt in prompts[:4]])
        assert seen == []
        generate_all(engine, prompts[-1:], greedy(engine, 1))
        assert seen  # guards the line above
    finally:
        for hook in hooks:
            hook.remove()


def test_a_different_image_gives_a_different_score(engine: InProcessEngine, prompts: list[Prompt]) -> None:
    """Guards the tests above: the image is not ignored."""
    one, two = prompts[5], Prompt(prompts[5].input_ids, prompts[6].images[:1])
    (first,), (second,) = score_all(engine, [(prompt, [[5, 6, 7]]) for prompt in (one, two)])
    assert abs(first.nll - second.nll) > 1e-4


def test_what_does_not_fit_is_refused(engine: InProcessEngine) -> None:
    with pytest.raises(ValueError, match="context of 2048"):
        generate_all(engine, [Prompt([1] * 2048)], greedy(engine, 1))
    with pytest.raises(ValueError, match="context of 2048"):
        score_all(engine, [(Prompt([1] * 2048), [[5]])])
    with pytest.raises(ValueError, match="at least one token"):
        score_all(engine, [(Prompt([1]), [[]])])
    with pytest.raises(ValueError, match="has no token"):
        generate_all(engine, [Prompt([])], greedy(engine, 1))
    with pytest.raises(ValueError, match=r"logit_bias has the token ids \[-1\]"):
        generate_all(engine, [Prompt([1])], Sampling(1, frozenset(), logit_bias={-1: 1.0}))
    with pytest.raises(ValueError, match="cache_tokens is 100, fewer than the model's context of 2048"):
        InProcessEngine(engine.loaded, max_batch=None, cache_tokens=100)
    assert generate_all(engine, [], greedy(engine, 4)) == []


def test_keys_values_and_features_take_a_share_of_the_free_memory(
    sealed: tuple[Pretrained, Path], tiny: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = content(sealed[0])

    def opened(free: int) -> tuple[InProcessEngine, RecentFeatures]:
        monkeypatch.setattr(torch_engine, "free_bytes", lambda _: free)
        made = torch_engine.open_engine(TorchEngine(), folder, EngineOptions(device="cpu", keep_prefixes=True))
        assert isinstance(made, InProcessEngine)
        assert isinstance(made.loaded.features, RecentFeatures)
        return made, made.loaded.features

    engine, features = opened(2**50)
    assert engine.scheduler.cache.max_tokens == torch_engine.CACHE_TOKENS
    assert features.max_images == EngineOptions.max_cached_images
    png = next((tiny / "pairs").glob("*.png")).read_bytes()
    shown = square(png, size=engine.image_size, fit=engine.image_aspect_ratio, encoding=Webp())
    image = features.first([SaltedImage(shown, "")])[0].untyped_storage().nbytes()
    text = engine.loaded.model.config.text_config
    one = 4 * 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim  # keys and values in fp32

    half = 8000 * one + 500 * image
    engine, features = opened(2 * half)
    tokens, kept = engine.scheduler.cache.max_tokens, engine.scheduler.prefixes.max_tokens
    images = features.max_images + 2 * tokens / engine.tokenizer.image_tokens  # kept, of rows, and ahead of them
    assert 0.9 * half < (tokens + kept) * one + images * image <= half
    assert 0 < features.max_images * image <= half / 8
    assert "more than the" not in caplog.text
    assert opened(10 * one)[0].scheduler.cache.max_tokens == engine.context_length
    assert "more than the 0 MiB of memory_share" in caplog.text


def test_requests_of_one_batch_have_their_own_sampling(engine: InProcessEngine, prompts: list[Prompt]) -> None:
    wholes = generate_all(engine, prompts, greedy(engine, 6))
    limits = range(1, len(prompts) + 1)

    async def together() -> list[Output]:
        requests = [
            generate_output(engine, prompt, greedy(engine, limit), f"{limit}")
            for prompt, limit in zip(prompts, limits, strict=True)
        ]
        return await asyncio.gather(*requests)

    for limit, whole, output in zip(limits, wholes, asyncio.run(together()), strict=True):
        assert output.ids[:6] == whole.ids[:limit]
        assert output.finish_reason == "stop" or len(output.ids) == limit


def test_a_stream_brings_its_tokens_one_by_one(engine: InProcessEngine, prompts: list[Prompt]) -> None:
    (whole,) = generate_all(engine, prompts[:1], Sampling(4, frozenset()))

    async def deltas() -> list[Delta]:
        return [delta async for delta in engine.generate(prompts[0], Sampling(4, frozenset()), "a")]

    first, second, third, last = whole.ids
    assert asyncio.run(deltas()) == [Delta([first]), Delta([second]), Delta([third]), Delta([last], "length")]


def test_an_aborted_request_ends_and_the_others_go_on(engine: InProcessEngine, prompts: list[Prompt]) -> None:
    endless = Sampling(500, frozenset())
    (expected,) = generate_all(engine, prompts[:1], Sampling(8, frozenset()))

    async def abort_two() -> tuple[list[Delta], Output, Output]:
        waiting = asyncio.create_task(generate_output(engine, prompts[1], endless, "waiting"))
        other = asyncio.create_task(generate_output(engine, prompts[0], Sampling(8, frozenset()), "other"))
        deltas = []
        async for delta in engine.generate(prompts[2], endless, "running"):
            deltas.append(delta)
            if len(deltas) == 2:
                await engine.abort("running")
                late = asyncio.create_task(generate_output(engine, prompts[3], endless, "late"))
                await asyncio.sleep(0)  # it waits now, behind the batch that runs
                await engine.abort("late")
                await engine.abort("waiting")
                await engine.abort("unknown")
        assert (await waiting).finish_reason == "abort"
        return deltas, await late, await other

    deltas, late, other = asyncio.run(abort_two())
    assert 2 < len(deltas) < 10
    assert [delta.finish_reason for delta in deltas[:-1]] == [None] * (len(deltas) - 1)
    assert deltas[-1].finish_reason == "abort"
    assert late == Output([], "abort")
    assert other == expected


def test_a_request_id_names_one_unfinished_request(engine: InProcessEngine, prompts: list[Prompt]) -> None:
    async def twice() -> None:
        await asyncio.gather(*(generate_output(engine, prompts[0], greedy(engine, 2), "same") for _ in range(2)))

    with pytest.raises(ValueError, match="'same' is not finished"):
        asyncio.run(twice())
    assert len(generate_all(engine, prompts[:1], greedy(engine, 2))) == 1
