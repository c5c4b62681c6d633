"""Each benchmark against numbers calculated in the comments; the responses of the model are given."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocoevalcap.cider.cider import Cider as Official

from vila_ops.config import load
from vila_ops.config.eval import (
    Alignment,
    CaptionCider,
    CaptionLoss,
    HeldOutPope,
    MeasureSettings,
    MultipleChoice,
    TextLoss,
    TextMultipleChoice,
)
from vila_ops.data.preprocess.prepare import prepare
from vila_ops.data.records import Image, Record, Turn
from vila_ops.data.text.conversation import Tokenizer
from vila_ops.data.text.questions import YES_NO
from vila_ops.eval.benchmark import GenerateRequest, Request, ScoreRequest, StatesRequest, benchmark_of
from vila_ops.eval.benchmarks.held_out.items import CaptionItem, EvalInputs, ImageItem, WordItem, image_items
from vila_ops.eval.engine_target import scored
from vila_ops.eval.prompts import request_hash, tokenised
from vila_ops.eval.report import ItemAnswer, LayerPoint, Metric
from vila_ops.eval.rows import ItemRow, Response
from vila_ops.eval.runner import row_of
from vila_ops.eval.scoring import score
from vila_ops.generate.request import Loglikelihood, Prompt

ROOT = Path(__file__).parents[4]

CAPTIONS = {
    "cat": "a red cat sits on a mat",
    "dog": "a dog runs after two birds",
    "car": "an old car in the rain",
    "boat": "a boat with a white sail",
    "tree": "a tall tree on the hill",
}
OBJECT = {caption: name for name, caption in CAPTIONS.items()}
NAMES = list(CAPTIONS)
AFTER = dict(zip(NAMES, [*NAMES[1:], NAMES[0]], strict=True))
"""Whose image is the control's, and the first of the three distractors."""
ABSENT = {"cat": "car", "dog": "boat", "car": "dog", "boat": "tree", "tree": "cat"}
"""POPE asks the second (dog) and the fourth (boat) for it; the control of the boat shows the tree."""

Scores = Callable[[str, str, str], Loglikelihood]
"""A function of the image's name ("" for none), the text of the prompt, and that of the continuation."""
MakeMeasure = Callable[..., "Measured"]


def known_states(image: str, prompt: list[int], caption: list[int], image_id: int) -> np.ndarray:
    """Three layers of two dimensions: the image's tokens turn towards the caption's, each image's its own way."""
    turn = NAMES.index(image) * 0.1
    visual = np.array(prompt) == image_id
    layers = []
    for angle in (np.pi / 2, np.pi / 3 + turn, turn):
        states = np.tile([0.0, 7.0], (len(prompt), 1))
        states[visual] = 3 * np.array([np.cos(angle), np.sin(angle)])
        layers.append(np.concatenate([states, np.tile([2.0, 0.0], (len(caption), 1))]))
    return np.stack(layers)


def _image(prompt: Prompt) -> str:
    return b"".join(prompt.images).decode("latin-1")


def respond(request: Request, tokenizer: Tokenizer, scores: Scores, captions: Mapping[str, str]) -> Response:
    """A known response: `scores` for likelihoods, `captions` of the images, or `known_states`."""
    prompt = prompt_of(request, tokenizer)
    image, text = _image(prompt), tokenizer.decode
    match request:
        case ScoreRequest(continuations=continuations):
            given = [scores(image, text(prompt.input_ids), text(ids)) for ids in continuations]  # type: ignore[arg-type]
            return scored(request, prompt, given, 0.0)
        case GenerateRequest(max_new_tokens=length):
            return Response(answer=text(tokenizer.text_ids(f" {captions[image]}\n")[:length]).strip())
    assert isinstance(request, StatesRequest)
    states = known_states(image, prompt.input_ids, request.continuation, tokenizer.image_id)
    visual = np.flatnonzero(np.array(prompt.input_ids) == tokenizer.image_id)
    return Response(values=tuple(request.reduce(states, visual, len(request.continuation))))


def prompt_of(request: Request, tokenizer: Tokenizer) -> Prompt:
    """The prompt of a request, whose images are not sealed ones."""

    def none(image: Any) -> bytes:
        raise AssertionError(image)

    return tokenised(request.prompt, tokenizer, none)


@dataclass(frozen=True)
class Measured:
    """What a benchmark made of the responses."""

    requests: list[ScoreRequest]
    """Those for likelihoods."""
    rows: tuple[ItemRow, ...]
    metrics: tuple[Metric, ...]
    layers: tuple[LayerPoint, ...]
    answers: tuple[ItemAnswer, ...]


def _item(name: str) -> ImageItem:
    near = AFTER[name]
    distractors = (CAPTIONS[near], CAPTIONS[AFTER[near]], CAPTIONS[AFTER[AFTER[near]]])
    return ImageItem(
        id=name,
        group=name,
        answer=CAPTIONS[name],
        image=name.encode(),
        shuffled_image=near.encode(),
        caption=CAPTIONS[name],
        distractors=distractors,
        absent=ABSENT[name],
    )


IMAGES = tuple(_item(name) for name in NAMES)
WORDS = tuple(
    WordItem(id=name, group=name, word=name, meaning=f"what a {name} is", distractors=("first", "second", "third"))
    for name in ("cat", "dog", "car")
)
TWICE = (*IMAGES, *(replace(item, id=f"{item.id} again") for item in IMAGES))
"""Two images of each object; POPE asks for the object in one of them and for another object in the other."""


@pytest.fixture(scope="module")
def measure(tokenizer: Tokenizer) -> MakeMeasure:
    """A benchmark on items, with known responses."""

    def make(
        config: Any, scores: Scores, *, items: Sequence[Any] = IMAGES, captions: Mapping[str, str] = CAPTIONS
    ) -> Measured:
        if config.kind == "cider":
            items = [CaptionItem(**vars(item), frequent_caption="a red cat") for item in items]
        requests = list(benchmark_of(config.kind).requests(items, config, lambda: tokenizer))
        by_id = {item.id: item for item in items}
        rows = [
            row_of(by_id[request.item], request, respond(request, tokenizer, scores, captions)) for request in requests
        ]
        of_rows = score(items, rows, config, MeasureSettings())
        likelihoods = [request for request in requests if isinstance(request, ScoreRequest)]
        measurement = of_rows.measurement
        return Measured(likelihoods, of_rows.rows, measurement.metrics, measurement.layers, measurement.answers)

    return make


def values(metrics: Sequence[Metric]) -> dict[tuple[str, str], float]:
    by_name: dict[tuple[str, str], float] = {(metric.name, metric.role): metric.value for metric in metrics}
    assert len(by_name) == len(metrics)
    return by_name


def record(role: Any, *parts: Image | str, answer: str | None = None) -> Record:
    answers = () if answer is None else (Turn("assistant", (answer,)),)
    return Record("id", "object", (Turn(role, parts), *answers), "", "", "")


CAPTION_NATS = {"cat": (2, 10, 4), "dog": (12, 14, 6), "car": (3, 6, 3), "boat": (1, 8, 5), "tree": (9, 12, 2)}
"""Nats of the true caption given the matched image, nats given the shuffled one, tokens."""


def caption_scores(image: str, prompt: str, caption: str) -> Loglikelihood:
    matched, shuffled, tokens = CAPTION_NATS[OBJECT[caption]]
    seen = {OBJECT[caption]: matched, AFTER[OBJECT[caption]]: shuffled}
    return Loglikelihood(seen.get(image, 1000), tokens)


def test_caption_loss_is_all_nats_by_all_tokens_and_the_gap_is_control_minus_model(measure: MakeMeasure) -> None:
    measured = measure(CaptionLoss(), caption_scores)
    metrics = measured.metrics
    # 4 + 6 + 3 + 5 + 2 = 20 tokens. The means of the five ratios would be 1.64 and 2.89.
    matched = (2 + 12 + 3 + 1 + 9) / 20
    shuffled = (10 + 14 + 6 + 8 + 12) / 20
    assert (matched, shuffled) == (1.35, 2.5)
    assert values(metrics) == pytest.approx(
        {("caption_loss", "model"): 1.35, ("caption_loss", "control"): 2.5, ("caption_loss", "gap"): 1.15}
    )
    assert {metric.role: metric.lower_is_better for metric in metrics} == {"model": True, "control": True, "gap": False}
    assert [metric.n for metric in metrics] == [5] * 3
    assert all(metric.low < metric.value < metric.high for metric in metrics)
    assert [(row.item, row.group, row.condition) for row in measured.rows] == [
        (name, name, condition) for condition in ("matched", "shuffled") for name in NAMES
    ]
    assert [row.scores for row in measured.rows[::5]] == [{"nats": 2, "tokens": 4}, {"nats": 10, "tokens": 4}]


NO_IMAGE_NATS = {"cat": 40, "dog": 50, "car": 45, "boat": 12, "tree": 48}
"""Without an image: the boat's caption is the likeliest, whatever is shown."""
GAINS = {**{(name, name): 10.0 for name in NAMES}, ("dog", "tree"): 15.0, ("car", "dog"): 12.0}
"""Gain of (image, caption) in nats; 1 for any other pair."""


def choice_scores(image: str, prompt: str, caption: str) -> Loglikelihood:
    name = OBJECT[caption]
    gain = GAINS.get((image, name), 1.0) if image else 0.0
    return Loglikelihood(NO_IMAGE_NATS[name] - gain, tokens=20 if name == "cat" else 1)


def test_the_caption_that_gains_most_from_the_image_is_chosen(measure: MakeMeasure) -> None:
    metrics = measure(MultipleChoice(), choice_scores).metrics
    # Model: the true caption gains 10 and the others 1, but the dog's image gives the tree's caption 15: 4 of 5.
    # By likelihood alone the boat's caption would win wherever it is a choice: for the cat it costs 12 - 1 = 11 nats,
    # the true one 40 - 10 = 30. By gain per token the cat would lose too: 10 / 20 against 1 / 1.
    # Control: the caption of the image shown gains 10 and is never the true one; but the car's image, which is the
    # dog's control, gives the dog's caption 12: 1 of 5.
    # Margin: 10 - 1 for four, and for the dog 10 less the mean of 1, 1 and 15. Control: the true caption gains 1, the
    # three others 10, 1 and 1; but the dog's caption gains 12 from the car's image. The tree is no choice for the cat.
    margins = (9 + (10 - 17 / 3) + 9 + 9 + 9) / 5, (4 * (1 - 4) + (12 - 4)) / 5
    assert values(metrics) == pytest.approx(
        {
            ("multiple_choice", "model"): 4 / 5,
            ("multiple_choice", "chance"): 0.25,
            ("multiple_choice", "control"): 1 / 5,
            ("multiple_choice", "gap"): 3 / 5,
            ("multiple_choice_margin", "model"): margins[0],
            ("multiple_choice_margin", "control"): margins[1],
            ("multiple_choice_margin", "gap"): margins[0] - margins[1],
        }
    )
    chance = next(metric for metric in metrics if metric.role == "chance")
    assert (chance.value, chance.low, chance.high) == (0.25, 0.25, 0.25)
    assert not any(metric.lower_is_better for metric in metrics)
    assert [metric.n for metric in metrics] == [5] * 7
    margin = next(metric for metric in metrics if metric.name == "multiple_choice_margin")
    assert (margin.role, margin.unit) == ("model", "nats")
    assert margin.low < margin.value < margin.high


def test_what_all_four_captions_gain_is_no_margin(measure: MakeMeasure) -> None:
    """As in a model that has learned the style of captions, or to expect one after any image."""
    metrics = measure(MultipleChoice(), lambda image, *_: Loglikelihood(7.0 if image else 30.0, tokens=4)).metrics
    assert [metric.value for metric in metrics if metric.name == "multiple_choice_margin"] == [0.0, 0.0, 0.0]


GENERATED = {
    "cat": "a red cat on a mat",
    "dog": CAPTIONS["dog"],
    "car": "a dog runs",
    "boat": "",
    "tree": "a white sail on the hill",
}


def official_cider(captions: Mapping[str, str]) -> float:
    """The official score of captions whose words are separated by single spaces, as all here are."""
    references = {name: [caption] for name, caption in CAPTIONS.items()}
    return float(Official().compute_score(references, {name: [caption] for name, caption in captions.items()})[0])


def test_cider_is_the_official_number_of_model_control_and_most_frequent_caption(measure: MakeMeasure) -> None:
    measured = measure(CaptionCider(max_new_tokens=40), choice_scores, captions=GENERATED)
    metrics = measured.metrics
    own = official_cider(GENERATED)
    control = official_cider({name: GENERATED[AFTER[name]] for name in NAMES})
    chance = official_cider(dict.fromkeys(NAMES, "a red cat"))
    assert own > control > 0
    assert own > chance > 0
    assert values(metrics) == pytest.approx(
        {("cider", "model"): own, ("cider", "chance"): chance, ("cider", "control"): control}
        | {("cider", "gap"): own - control}
    )
    assert [metric.n for metric in metrics] == [5] * 4
    assert measured.answers == tuple(
        ItemAnswer(item=name, object=name, truth=CAPTIONS[name], answer=GENERATED[name], control=GENERATED[AFTER[name]])
        for name in NAMES
    )


def test_captions_are_cut_at_the_configs_length(measure: MakeMeasure, tokenizer: Tokenizer) -> None:
    answers = measure(CaptionCider(max_new_tokens=3), choice_scores).answers
    cut = tokenizer.decode(tokenizer.text_ids(f" {CAPTIONS['cat']}")[:3]).strip()
    assert answers[0].answer == cut != CAPTIONS["cat"]


def yes_where_it_is(image: str, prompt: str, answer: str) -> Loglikelihood:
    is_there = YES_NO.format(name=image) in prompt
    return Loglikelihood(1.0 if (answer == "Yes.") == is_there else 3.0, tokens=1)


def test_pope_asks_for_what_is_there_and_for_what_is_not_by_turns(measure: MakeMeasure) -> None:
    metrics = measure(HeldOutPope(), yes_where_it_is).metrics
    # Cat, car and tree are asked for where they are, a boat on the dog's image and a tree on the boat's: 3 of 5 yes.
    yes = 3 / 5
    # Control: three times no for yes, no for the boat on the car's image, yes for the tree on the tree's.
    assert values(metrics) == pytest.approx(
        {
            ("held_out_pope_accuracy", "model"): 1,
            ("held_out_pope_f1", "model"): 1,
            ("held_out_pope_yes_ratio", "model"): yes,
            ("held_out_pope_accuracy", "chance"): yes,  # always yes
            ("held_out_pope_f1", "chance"): 2 * yes / (1 + yes),
            ("held_out_pope_yes_ratio", "chance"): 1,
            ("held_out_pope_accuracy", "control"): 1 / 5,
            ("held_out_pope_f1", "control"): 0,
            ("held_out_pope_yes_ratio", "control"): 1 / 5,
        }
    )
    assert [metric.n for metric in metrics] == [5] * 9
    assert not any(metric.lower_is_better for metric in metrics)


MEANING_SCORES = {
    "cat": {
        "what a cat is": Loglikelihood(6, 6),
        "first": Loglikelihood(4, 2),
    },  # 1 and 2 nats a token, though 6 and 4 in all
    "dog": {"what a dog is": Loglikelihood(2, 4)},
    "car": {"what a car is": Loglikelihood(10, 2)},  # 5 nats a token
}


def meaning_scores(image: str, prompt: str, continuation: str) -> Loglikelihood:
    word, colon = prompt[:-1], prompt[-1]
    assert (image, colon, continuation[0]) == ("", ":", " ")
    return MEANING_SCORES[word].get(continuation[1:], Loglikelihood(9, 3))


def test_a_words_meaning_is_chosen_by_likelihood_per_token(measure: MakeMeasure) -> None:
    metrics = measure(TextMultipleChoice(), meaning_scores, items=WORDS).metrics
    assert values(metrics) == pytest.approx(
        {("text_multiple_choice", "model"): 2 / 3, ("text_multiple_choice", "chance"): 0.25}
    )
    assert [metric.n for metric in metrics] == [3] * 2


def test_text_loss_is_all_nats_by_all_tokens(measure: MakeMeasure) -> None:
    running = {"cat": Loglikelihood(2, 4), "dog": Loglikelihood(12, 6), "car": Loglikelihood(6, 2)}
    known = {("", "", f"{name}: what a {name} is"): score for name, score in running.items()}
    metrics = measure(TextLoss(), lambda *what: known[what], items=WORDS).metrics
    # The mean of the three ratios would be 5.5 / 3.
    assert values(metrics) == pytest.approx({("text_loss", "model"): (2 + 12 + 6) / (4 + 6 + 2)})
    assert [(metric.n, metric.lower_is_better) for metric in metrics] == [(3, True)]


@pytest.mark.parametrize(
    "config",
    [CaptionLoss(control="none"), MultipleChoice(control="none"), CaptionCider(control="none"),
     HeldOutPope(control="none"), Alignment(control="none")],
    ids=lambda config: config.kind,
)  # fmt: skip
def test_without_a_control_there_is_no_control_and_no_gap(config: Any, measure: MakeMeasure) -> None:
    metrics = measure(config, lambda *what: Loglikelihood(1.0, 1)).metrics
    assert "model" in {metric.role for metric in metrics} <= {"model", "chance"}


@pytest.mark.parametrize(
    ("scores", "config"),
    [
        (caption_scores, CaptionLoss()),
        (choice_scores, MultipleChoice()),
        (choice_scores, CaptionCider(max_new_tokens=40)),
    ],
    ids=["caption_loss", "multiple_choice", "cider"],
)
def test_two_images_of_an_object_are_two_items_of_one_cluster(
    scores: Scores, config: Any, measure: MakeMeasure
) -> None:
    """The same image twice says nothing new: the interval is that of the object once, not a narrower one."""
    once, twice = (measure(config, scores, items=items).metrics for items in (IMAGES, TWICE))
    assert any(metric.low < metric.high for metric in once)
    for one, two in zip(once, twice, strict=True):
        assert (one.n, two.n) == (5, 10)
        assert (two.value, two.low, two.high) == pytest.approx((one.value, one.low, one.high))


def test_pope_draws_the_questions_of_an_object_together(measure: MakeMeasure) -> None:
    metrics = measure(HeldOutPope(), yes_where_it_is, items=TWICE).metrics
    # One question of each object is a yes, so that always yes is right on half of any draw of objects.
    (chance,) = [m for m in metrics if (m.name, m.role) == ("held_out_pope_accuracy", "chance")]
    assert (chance.n, chance.value, chance.low, chance.high) == (10, 0.5, 0.5, 0.5)


def test_captions_are_scored_as_the_pairs_are_trained(measure: MakeMeasure, tokenizer: Tokenizer) -> None:
    shown = {False: 0, True: 0}
    for request in measure(MultipleChoice(), choice_scores).requests:
        prompt, caption = prompt_of(request, tokenizer), request.continuations[0]
        assert isinstance(caption, list)
        parts: list[Image | str] = [*map(Image, prompt.images), tokenizer.decode(caption)]
        assert prompt.input_ids + caption == tokenizer.document(record("document", *parts)).input_ids
        shown[bool(prompt.images)] += 1
    assert shown == {False: 5, True: 10}


def test_caption_loss_and_multiple_choice_read_each_image_once(tokenizer: Tokenizer) -> None:
    hashes = [
        [request_hash(one) for one in benchmark_of(config.kind).requests(IMAGES, config, lambda: tokenizer)]
        for config in (CaptionLoss(), MultipleChoice())
    ]
    assert [len(set(one)) for one in hashes] == [10, 15]
    assert hashes[0] == hashes[1][:10]


def test_pope_asks_as_the_questions_are_trained(measure: MakeMeasure, tokenizer: Tokenizer) -> None:
    request = measure(HeldOutPope(control="none"), yes_where_it_is).requests[0]
    asked = prompt_of(request, tokenizer).input_ids
    for ids, answer in zip(request.continuations, ("Yes.", "No."), strict=True):
        assert isinstance(ids, list)
        trained = record("user", Image(b"cat"), YES_NO.format(name="cat"), answer=answer)
        whole = tokenizer.chat(trained)
        assert whole.input_ids[: len(asked + ids)] == asked + ids
        assert whole.is_target.index(True) == len(asked)


def test_alignment_is_between_the_image_and_the_caption_alone_and_deepens_as_the_states_do(
    measure: MakeMeasure,
) -> None:
    measured = measure(Alignment(max_images=4), choice_scores, items=IMAGES[:4])
    shown = NAMES[:4]
    own, other = ([0.1 * NAMES.index(name) for name in names] for names in (shown, [AFTER[name] for name in shown]))
    # the caption's states all point along x: a similarity is the cosine of the angle between them and the image's
    expected = {
        role: [np.cos(np.pi / 2), np.mean(np.cos(np.pi / 3 + np.array(turns))), np.mean(np.cos(turns))]
        for role, turns in (("model", own), ("control", other))
    }
    for role, values_by_layer in expected.items():
        line = [point for point in measured.layers if point.role == role]
        assert [point.layer for point in line] == [0, 1, 2]
        assert [point.value for point in line] == pytest.approx(values_by_layer)
        assert all(point.low <= point.value + 1e-12 and point.value <= point.high + 1e-12 for point in line)
    deep = {role: np.mean(line[1:]) for role, line in expected.items()}  # layers 1 and 2 of 0, 1, 2
    assert values(measured.metrics) == pytest.approx(
        {
            ("alignment", "model"): deep["model"],
            ("alignment", "control"): deep["control"],
            ("alignment", "gap"): deep["model"] - deep["control"],
            ("alignment_margin", "model"): deep["model"] - deep["control"],
        }
    )
    assert {metric.n for metric in measured.metrics} == {4}


@pytest.fixture(scope="module")
def tiny_items(tmp_path_factory: pytest.TempPathFactory) -> tuple[ImageItem, ...]:
    """The image items of the tiny recipe."""
    folder = tmp_path_factory.mktemp("items")
    where = (f"resources.storage.store={folder}/store", f"resources.storage.cache={folder}/cache")
    run = load(ROOT / "configs/recipes/tiny.yaml", resources=ROOT / "configs/resources/inline.yaml", overrides=where)
    suite = run.recipe.final_suite
    data = prepare(suite.mixture, run.recipe.text(max_tokens=suite.max_tokens), run.resources)
    return image_items(EvalInputs.of(suite, data), "new")


def test_a_model_that_knows_every_image_is_perfect_and_its_control_never_sees_the_object(
    measure: MakeMeasure, tiny_items: tuple[ImageItem, ...]
) -> None:
    shown = {item.image.decode("latin-1"): item for item in tiny_items}
    assert len(shown) == len(tiny_items) == 12

    def knows(image: str, prompt: str, text: str) -> Loglikelihood:
        return Loglikelihood(1.0 if image and text == shown[image].caption else 5.0, tokens=1)

    assert values(measure(CaptionLoss(), knows, items=tiny_items).metrics) == {
        ("caption_loss", "model"): 1,
        ("caption_loss", "control"): 5,
        ("caption_loss", "gap"): 4,
    }
    assert values(measure(MultipleChoice(), knows, items=tiny_items).metrics)["multiple_choice", "model"] == 1
    captions = {image: item.caption for image, item in shown.items()}
    answers = measure(CaptionCider(max_new_tokens=100), knows, items=tiny_items, captions=captions).answers
    assert all(answer.answer == answer.truth != answer.control for answer in answers)
    assert sorted(answer.answer for answer in answers) == sorted(str(answer.control) for answer in answers)
    for item in tiny_items:
        assert shown[item.shuffled_image.decode("latin-1")].group != item.group

    def sees(image: str, prompt: str, answer: str) -> Loglikelihood:
        is_there = YES_NO.format(name=shown[image].group) in prompt
        return Loglikelihood(1.0 if (answer == "Yes.") == is_there else 3.0, tokens=1)

    by_name = values(measure(HeldOutPope(), sees, items=tiny_items).metrics)
    assert [by_name[f"held_out_pope_{name}", "model"] for name in ("accuracy", "f1", "yes_ratio")] == [1, 1, 0.5]
