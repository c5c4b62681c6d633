"""Answers and likelihoods are those of stock transformers, whatever shares a batch."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoProcessor

from vila_ops.artifacts import store
from vila_ops.artifacts.kinds import Pretrained
from vila_ops.artifacts.store import content
from vila_ops.config import Model, Resources
from vila_ops.config.images import Webp
from vila_ops.data.images import square
from vila_ops.data.records import Image
from vila_ops.generate.engine import Generator, Prompt
from vila_ops.generate.load import load_generator
from vila_ops.model import folder as model_folder
from vila_ops.model.assemble import assemble
from vila_ops.model.change import Change
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
def generator(request: pytest.FixtureRequest, sealed: tuple[Pretrained, Path]) -> Generator:
    """Of a plain model, and of one with a visual expert that differs from the text weights."""
    base, folder = sealed
    if request.param:
        base = _with_expert(base, folder)
    made = load_generator(base, feature_root=folder / "features", threads=1, precision="fp32")
    made.slots = 3  # fewer than there are prompts: rows have to join and leave
    return made


@pytest.fixture(scope="module")
def prompts(generator: Generator, tiny: Path) -> list[Prompt]:
    """Text only, one image, two images, of mixed lengths."""
    images = [
        square(path.read_bytes(), size=generator.image_size, fit=generator.image_aspect_ratio, encoding=Webp())
        for path in sorted((tiny / "pairs").glob("*.png"))[:3]
    ]
    made = [Prompt(generator.tokenizer.prompt([("user", (question,))])) for question in QUESTIONS]
    for used in (images[:1], images[1:], images):
        parts = (*(Image(data) for data in used), "What is this?")
        made.append(Prompt(generator.tokenizer.prompt([("user", parts)]), tuple(used)))
    return made


def test_states_are_those_that_transformers_gives_layer_by_layer(generator: Generator, prompts: list[Prompt]) -> None:
    said = generator.tokenizer.text_ids("A dog.")
    for prompt in (prompts[0], prompts[-1]):
        states = generator.states(prompt, said)
        ids = torch.tensor([[*prompt.input_ids, *said]])
        values = torch.from_numpy(generator.features.pixels(list(prompt.images))) if prompt.images else None  # type: ignore[attr-defined]
        with torch.no_grad():
            stock = generator.model(input_ids=ids, pixel_values=values, output_hidden_states=True).hidden_states
        assert len(states) == len(stock) == 3  # the embeddings and two layers
        for ours, theirs in zip(states, stock, strict=True):
            assert torch.allclose(torch.from_numpy(ours).float(), theirs[0], atol=1e-5)


def _with_expert(base: Pretrained, root: Path) -> Pretrained:
    model = model_folder.load(content(base), change=Change(visual_expert=True))
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


def _stock_logits(generator: Generator, ids: list[int], images: tuple[bytes, ...]) -> torch.Tensor:
    """(T, V) of the whole row at once, from pixels, through transformers' own forward."""
    values = torch.from_numpy(generator.features.pixels(list(images))) if images else None  # type: ignore[attr-defined]
    with torch.no_grad():
        out: torch.Tensor = generator.model(input_ids=torch.tensor([ids]), pixel_values=values).logits[0]
    return out


def test_greedy_answers_are_those_of_one_full_forward_a_token(generator: Generator, prompts: list[Prompt]) -> None:
    answers = generator.generate(prompts, max_new_tokens=6)
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = list(prompt.input_ids)
        expected: list[int] = []
        for _ in range(6):
            logits = _stock_logits(generator, ids, prompt.images)[-1]
            logits[generator.tokenizer.image_id] = -torch.inf
            token = int(logits.argmax())
            if token == generator.tokenizer.eos_id:
                break
            expected.append(token)
            ids.append(token)
        assert answer.ids == expected
        assert answer.finished == (len(expected) < 6)


def test_an_answer_ends_at_any_token_that_stops_it(
    generator: Generator, prompts: list[Prompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    (whole,) = generator.generate(prompts[:1], max_new_tokens=4)
    stop = whole.ids[2]
    monkeypatch.setitem(vars(generator.tokenizer), "stop_ids", frozenset({stop}))
    (answer,) = generator.generate(prompts[:1], max_new_tokens=4)
    assert answer.finished
    assert answer.ids == whole.ids[: whole.ids.index(stop)]


def test_scores_are_those_of_each_continuation_alone(generator: Generator, prompts: list[Prompt]) -> None:
    tokenizer = generator.tokenizer
    continuations = [tokenizer.text_ids(text) for text in ("A dog.", "A red apple on a table.", "No")]
    scored = generator.score([(prompt, continuations) for prompt in prompts])
    for prompt, scores in zip(prompts, scored, strict=True):
        for tokens, score in zip(continuations, scores, strict=True):
            logits = _stock_logits(generator, prompt.input_ids + tokens, prompt.images).log_softmax(-1)
            start = len(prompt.input_ids) - 1
            expected = -sum(float(logits[start + place, token]) for place, token in enumerate(tokens))
            assert score.nll == pytest.approx(expected, abs=2e-4)
            assert score.tokens == len(tokens)


def test_questions_of_text_alone_run_neither_tower_nor_projector(generator: Generator, prompts: list[Prompt]) -> None:
    seen: list[str] = []
    parts = (generator.model.model.vision_tower, generator.model.model.multi_modal_projector)
    hooks = [part.register_forward_pre_hook(lambda part, _: seen.append(type(part).__name__)) for part in parts]
    try:
        generator.generate(prompts[:4], max_new_tokens=3)
        generator.score([(prompt, [[5, 6, 7]]) for prompt in prompts[:4]])
        assert seen == []
        generator.generate(prompts[-1:], max_new_tokens=1)
        assert seen  # guards the line above
    finally:
        for hook in hooks:
            hook.remove()


def test_another_image_gives_another_score(generator: Generator, prompts: list[Prompt]) -> None:
    """Guards the tests above: the image is not ignored."""
    one, two = prompts[5], Prompt(prompts[5].input_ids, prompts[6].images[:1])
    (first,), (second,) = generator.score([(prompt, [[5, 6, 7]]) for prompt in (one, two)])
    assert abs(first.nll - second.nll) > 1e-4


def test_what_does_not_fit_is_refused(generator: Generator) -> None:
    with pytest.raises(ValueError, match="context of 2048"):
        generator.generate([Prompt([1] * 2048)], max_new_tokens=1)
    with pytest.raises(ValueError, match="at least one token"):
        generator.score([(Prompt([1]), [[]])])
    assert generator.generate([], max_new_tokens=4) == []
