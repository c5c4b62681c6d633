"""A model in this process as the target: what cannot be answered is a status, and batches change no clear answer."""

import math
from collections.abc import Iterator

import pytest

from tests.eval.benchmarks.sample import SAMPLES, config_of
from vila_ops.artifacts.kinds import Pretrained
from vila_ops.config.benchmarks import Pope
from vila_ops.config.engine import TorchEngine
from vila_ops.config.images import Webp
from vila_ops.data.images import square
from vila_ops.eval.benchmark import GenerateRequest, ScoreRequest, SealedImage, TextPrompt
from vila_ops.eval.benchmarks import pope
from vila_ops.eval.engine_target import EngineTarget, cut, scored
from vila_ops.eval.prompts import tokenised
from vila_ops.generate.engine import EngineOptions, generate_all, score_all
from vila_ops.generate.request import Loglikelihood, Prompt, Sampling
from vila_ops.generate.torch_engine.engine import InProcessEngine
from vila_ops.generate.torch_engine.scheduler import Scheduler

FILE = (SAMPLES / "pope/val2014/COCO_val2014_000000000001.jpg").read_bytes()
IMAGE = SealedImage("k")


@pytest.fixture(scope="module")
def target(model: Pretrained, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineTarget]:
    options = EngineOptions(feature_root=tmp_path_factory.mktemp("features"), device="cpu", keep_prefixes=True)
    made = EngineTarget(model, TorchEngine(), options)
    yield made
    made.close()


def question(text: str, **changes: object) -> GenerateRequest:
    prompt = TextPrompt((("user", (IMAGE, text)),))
    return GenerateRequest(**{"item": text, "prompt": prompt, "max_new_tokens": 3, **changes})  # type: ignore[arg-type]


def test_what_cannot_be_asked_has_its_status_and_the_others_their_answers(target: EngineTarget) -> None:
    damaged = TextPrompt((("user", (SealedImage("damaged"), "?")),))
    requests = [
        question("What is this?"),
        question("Why? " * 3000),
        question("x", prompt=damaged),
        ScoreRequest(item="s", prompt=question("Which?").prompt, continuations=(" A", " B"), labels=("A", "B")),
    ]
    responses = target.answer(requests, lambda image: FILE if image == IMAGE else FILE[:300])
    assert [response.status for response in responses] == ["ok", "too_long", "unreadable", "ok"]
    assert [response.answer is None for response in responses] == [False, True, True, False]
    assert "tokens with the answer, and the model's context has" in responses[1].detail
    generated, letter = responses[0], responses[3]
    assert generated.answer_tokens is not None
    assert generated.answer_tokens <= 3
    assert generated.finish_reason in ("stop", "length")
    assert letter.answer == "AB"[letter.nats.index(min(letter.nats))]
    assert len({response.prompt_hash for response in (generated, letter)}) == 2


def test_what_is_kept_of_prompts_is_for_one_call_alone(target: EngineTarget) -> None:
    engine = target.engine
    assert isinstance(engine, InProcessEngine)
    before = {kept.salt for kept, _ in engine.scheduler.prefixes._kept}
    for _ in range(2):
        assert [one.status for one in target.answer([question("Which?"), question("Why?")], lambda _: FILE)] == [
            "ok"
        ] * 2
    assert len({kept.salt for kept, _ in engine.scheduler.prefixes._kept} - before) == 2


def test_likelihoods_that_are_not_finite_are_a_failure_and_never_a_choice() -> None:
    request = ScoreRequest(item="1", prompt=Prompt([1]), continuations=([1], [2]), labels=("A", "B"))
    for bad in (math.nan, math.inf):
        response = scored(request, Prompt([1]), [Loglikelihood(bad, 1), Loglikelihood(1.0, 1)], 0.0)
        assert (response.status, response.answer, response.nats) == ("not_finite", None, ())


def test_the_likeliest_label_is_by_the_sum_or_by_the_mean() -> None:
    scores = [Loglikelihood(3.0, 1), Loglikelihood(4.0, 4)]
    for per_token, label in ((False, "A"), (True, "B")):
        request = ScoreRequest(
            item="1", prompt=Prompt([1]), continuations=([1], [2, 2, 2, 2]), labels=("A", "B"), per_token=per_token
        )
        assert scored(request, Prompt([1]), scores, 0.0).answer == label


def test_an_answer_ends_at_the_first_stop_text() -> None:
    assert [cut("a\nb.c", stop) for stop in ((), ("#",))] == [("a\nb.c", False)] * 2
    assert [cut("a\nb.c", stop) for stop in (("\n",), (".", "\n"))] == [("a", True)] * 2


@pytest.mark.slow
def test_the_size_of_batches_changes_only_answers_that_are_near_ties(
    target: EngineTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At batches of 1, 2 and 16, and with what is kept of prompts, in fp32: 24 answers of 4 tokens each."""
    engine = target.engine
    assert isinstance(engine, InProcessEngine)
    folder, side, fit = SAMPLES / "pope/val2014", engine.image_size, engine.image_aspect_ratio
    prompts = [
        tokenised(
            TextPrompt((("user", (SealedImage(item.group), *item.parts["question"])),)),
            engine.tokenizer,
            lambda image: square((folder / image.key).read_bytes(), size=side, fit=fit, encoding=Webp()),
        )
        for item in list(pope.read(SAMPLES / "pope", config_of(Pope, version=None)))[:24]
    ]
    answers = []
    for slots, kept in ((1, 0), (2, 0), (16, 0), (2, 4096)):
        scheduler = Scheduler(engine.loaded, slots=slots, cache_tokens=65_536, prefill_tokens=4096, prefix_tokens=kept)
        monkeypatch.setattr(engine, "scheduler", scheduler)
        outputs = generate_all(engine, prompts, Sampling(4, engine.tokenizer.stop_ids))
        answers.append([output.ids for output in outputs])
    for others in answers[1:]:
        for prompt, one, other in zip(prompts, answers[0], others, strict=True):
            if one == other:
                continue
            places = (place for place, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
            same = next(places, min(len(one), len(other)))
            stop = min(engine.tokenizer.stop_ids)
            tokens = [[ids[same]] if same < len(ids) else [stop] for ids in (one, other)]
            before = Prompt([*prompt.input_ids, *one[:same]], prompt.images)
            first, second = score_all(engine, [(before, tokens)])[0]
            assert first.nll == pytest.approx(second.nll, abs=1e-3), "another answer that is no near-tie"
