"""Prompts of a YAML template by hand, and the token ids that a model reads of them."""

import json
from pathlib import Path
from typing import Any

import pytest

from vila_ops.config.benchmarks import PromptTemplate
from vila_ops.config.load import read
from vila_ops.data.records import Image
from vila_ops.data.text.conversation import Tokenizer
from vila_ops.eval.benchmark import GenerateRequest, Item, ScoreRequest, SealedImage, TextPrompt, Unreadable
from vila_ops.eval.few_shot import with_demonstrations
from vila_ops.eval.prompts import request_hash, requests_of, rotated, tokenised, unreadable, written
from vila_ops.packages.tokenizer import read_tokenizer, with_image_token

ROOT = Path(__file__).parents[2]
GENERATE = {"kind": "generate", "max_new_tokens": 8}
CHOICE = PromptTemplate.model_validate(
    {"user": "{image}\n{context}\n{question}\n{options}\n{hint}", "hint": "One letter.", "answer": GENERATE}
)
DOG, CAT = SealedImage("dog"), SealedImage("cat")
ITEM = Item(
    id="1",
    group="a",
    parts={
        "image": (DOG,),
        "context": ("",),
        "question": (
            "Which ",
            CAT,
            " is it?",
        ),
    },
    options=("a dog", "a cat", "a cow"),
    answer="A",
)


def template(**changes: Any) -> PromptTemplate:
    return PromptTemplate.model_validate({**CHOICE.model_dump(), **changes})


def test_lines_without_content_are_left_out_and_images_stand_where_they_are_named() -> None:
    expected = (DOG, "\nWhich ", CAT, " is it?\nA. a dog\nB. a cat\nC. a cow\nOne letter.")
    assert written(ITEM, CHOICE) == expected
    with_context = Item("2", "a", {**ITEM.parts, "context": ("It barks.",)}, ITEM.options)
    assert written(with_context, CHOICE)[1] == "\nIt barks.\nWhich "
    no_options = Item("3", "a", ITEM.parts)
    assert written(no_options, CHOICE)[-1] == " is it?\nOne letter."


def test_options_rotate_by_places() -> None:
    assert [rotated(("a", "b", "c"), rotation) for rotation in range(3)] == [
        ("a", "b", "c"), ("c", "a", "b"), ("b", "c", "a"),
    ]  # fmt: skip
    requests = requests_of([ITEM], CHOICE, rotations=lambda item: len(item.options))
    assert [request.rotation for request in requests] == [0, 1, 2]
    assert len({request_hash(request) for request in requests}) == 3


def test_the_likeliest_letter_is_asked_for_by_likelihoods() -> None:
    (request,) = requests_of([ITEM], template(answer={"kind": "score"}))
    assert isinstance(request, ScoreRequest)
    assert (request.continuations, request.labels) == ((" A", " B", " C"), ("A", "B", "C"))
    (request,) = requests_of([ITEM], CHOICE)
    assert isinstance(request, GenerateRequest)
    assert request.max_new_tokens == 8


def test_a_request_with_an_image_that_cannot_be_read_says_why() -> None:
    item = Item("1", "a", {**ITEM.parts, "image": (Unreadable("a.jpg is missing"),)}, ITEM.options)
    assert [unreadable(request) for request in requests_of([item, ITEM], CHOICE)] == ["a.jpg is missing", None]


def test_equal_questions_of_two_items_are_one_request_and_another_image_is_another() -> None:
    twin = Item("2", "b", ITEM.parts, ITEM.options)
    other = Item("3", "a", {**ITEM.parts, "image": (CAT,)}, ITEM.options)
    first, second, third = (request_hash(request) for request in requests_of([ITEM, twin, other], CHOICE))
    assert first == second != third


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hint": ""}, "write {hint} there if there is a hint"),
        ({"user": "{question}"}, "write {hint} there if there is a hint"),
    ],
)
def test_a_hint_that_is_not_written_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        template(**changes)


def test_a_part_that_an_item_lacks_is_named() -> None:
    with pytest.raises(
        ValueError, match=r"names \{passage\}, but item '1' has \['context', 'hint', 'image', 'options'"
    ):
        written(ITEM, template(user="{passage}\n{hint}"))


@pytest.fixture(scope="module")
def vicuna(tiny: Path) -> Tokenizer:
    """A tokenizer with LLaVA's and VILA's chat template, which begins with bos."""
    fast = read_tokenizer(tiny / "tokenizer")
    fast.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
    return Tokenizer(with_image_token(fast, chat_template="vicuna_v1", folder=tiny), image_tokens=4, after_image="")


def prompt_of(kind: str, tokenizer: Tokenizer) -> list[int]:
    """The token ids of a benchmark's prompt on an item with one image, after as many demonstrations as it says."""
    settings = read(ROOT / f"configs/benchmarks/{kind}.yaml")
    own = PromptTemplate.model_validate(settings["prompt"])
    parts: dict[str, Any] = {name: (f"Some {name}?",) for name in own.fields() if name not in ("hint", "options")}
    item = Item("1", "a", {**parts, **({"image": (Image(b"square"),)} if "image" in parts else {})}, ("one", "two"))
    requests = requests_of([item], own)
    if shots := settings.get("few_shot", {}).get("shots"):
        question = written(item, own)
        ids = [f"s{number}" for number in range(1, shots + 1)]
        shown = {id_: (question, f"answer {number}") for number, id_ in enumerate(ids, 1)}
        requests = with_demonstrations(requests, {"1": ids}, shown)
    return tokenised(requests[0].prompt, tokenizer, lambda image: b"").input_ids


KINDS = sorted(path.stem for path in (ROOT / "configs/benchmarks").glob("*.yaml"))
GOLDEN = ROOT / "tests/golden/prompts.json"


def test_the_token_ids_of_every_benchmarks_prompt_are_the_golden_ones_with_one_bos(vicuna: Tokenizer) -> None:
    """`text` was written by hand from the benchmark's own prompt in LLaVA's template; an image counts as one token."""
    golden = json.loads(GOLDEN.read_text())
    assert sorted(golden) == KINDS
    for kind in KINDS:
        ids = prompt_of(kind, vicuna)
        once = [id_ for place, id_ in enumerate(ids) if id_ != vicuna.image_id or ids[place - 1] != id_]
        assert vicuna.fast.decode(once) == golden[kind]["text"]
        assert once == golden[kind]["ids"]
        assert ids.count(vicuna.image_id) == golden[kind]["text"].count("<image>") * vicuna.image_tokens
        assert ids.count(vicuna.bos[0]) == 1


def test_a_second_bos_is_refused(vicuna: Tokenizer) -> None:
    prompt = TextPrompt((("user", ("a",)),), is_chat=False)
    assert tokenised(prompt, vicuna, lambda image: b"").input_ids.count(vicuna.bos[0]) == 1

    class Twice:
        bos, context, text_ids = vicuna.bos, [*vicuna.bos, *vicuna.bos], vicuna.text_ids

    with pytest.raises(ValueError, match="the prompt begins with two bos tokens; it needs one"):
        tokenised(prompt, Twice(), lambda image: b"")  # type: ignore[arg-type]
