"""Which demonstrations come before an item, by hand: draws, nearest images, own images, controls, order, copies."""

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tests.eval.benchmarks.sample import config_of, rows_of, sample_items
from vila_ops.config.benchmarks import Mmlu, OkVqa
from vila_ops.config.eval import MeasureSettings, OfficialSuite
from vila_ops.config.few_shot import FewShot
from vila_ops.data.records import Image
from vila_ops.eval.benchmark import GenerateRequest, Item, SealedImage, TextPrompt, Unreadable
from vila_ops.eval.few_shot import candidates_of, demonstrations, is_copy, with_demonstrations
from vila_ops.eval.scoring import score

SETTINGS = MeasureSettings(bootstrap_resamples=20)


def item(name: str, *images: str, answer: str = "yes") -> Item:
    shown = tuple(SealedImage(key) for key in images) or ("",)
    return Item(name, name, {"image": shown, "question": (f"{name}?",)}, answer=answer)


def settings(**changes: Any) -> FewShot:
    return FewShot.model_validate({"shots": 2, **changes})


def digest(image: Image | SealedImage) -> str:
    assert isinstance(image, SealedImage)
    return image.key


POOL = [item(f"p{number:02d}", f"image {number}") for number in range(12)]
ITEMS = [item(f"q{number}", f"other {number}") for number in range(20)]


def chosen(items: Sequence[Item], pool: Sequence[Item], few_shot: FewShot, vectors: Any = None) -> dict[str, Any]:
    return demonstrations(items, candidates_of(pool, few_shot, digest), few_shot, digest, vectors)


def test_each_item_has_its_own_draw_that_neither_other_items_nor_the_order_of_the_pool_change() -> None:
    drawn = chosen(ITEMS, POOL, settings(shots=4))
    assert all(len(set(ids)) == 4 for ids in drawn.values())
    assert len(set(drawn.values())) > 15, "the draws of 20 items differ"
    shuffled = random.Random(1).sample(POOL, len(POOL))
    assert chosen(ITEMS[7:9], shuffled, settings(shots=4)) == {id_: drawn[id_] for id_ in ("q7", "q8")}
    assert chosen(ITEMS, POOL, settings(shots=4, seed=1)) != drawn
    assert len({id_ for ids in drawn.values() for id_ in ids}) == 12, "every item of the pool is drawn"


def test_fewer_shots_are_the_first_of_more_and_the_order_may_be_reversed() -> None:
    two, eight = chosen(ITEMS, POOL, settings()), chosen(ITEMS, POOL, settings(shots=8))
    assert all(eight[id_][:2] == ids for id_, ids in two.items())
    reverse = chosen(ITEMS, POOL, settings(selection={"kind": "seed", "order": "reversed"}))
    assert reverse == {id_: ids[::-1] for id_, ids in two.items()}


def test_all_candidates_may_be_shown_and_candidates_bound_the_pool() -> None:
    (every,) = chosen(ITEMS[:1], POOL, settings(shots=12)).values()
    assert sorted(every) == [one.id for one in POOL]
    few = chosen(ITEMS, POOL, settings(candidates=3))
    assert len({id_ for ids in few.values() for id_ in ids}) == 3


@pytest.mark.parametrize("control", ["none", "text_only", "shuffled_images"])
def test_an_image_of_the_item_is_never_shown_whatever_its_name(control: str) -> None:
    """One of twelve has the item's image under another id; with shuffled images one more would show it."""
    pool = [item(f"p{number:02d}", f"image {number}" if number else "own") for number in range(12)]
    candidates = candidates_of(pool, settings(control=control), digest)
    shots = 12 - sum("own" in one.images for one in candidates)
    assert shots == (12 - 1 if control != "shuffled_images" else 12 - 2)
    (ids,) = demonstrations(
        [item("q", "a", "own")], candidates, settings(shots=shots, control=control), digest
    ).values()
    by_id = {one.shown.id: one for one in candidates}
    assert not any(
        SealedImage("own") in (*by_id[id_].own.readable_images(), *by_id[id_].shown.readable_images()) for id_ in ids
    )
    with pytest.raises(ValueError, match=rf"item 'q' has {shots} candidates .* and few_shot.shots is {shots + 1}"):
        demonstrations([item("q", "own")], candidates, settings(shots=shots + 1, control=control), digest)


def test_an_item_is_no_demonstration_of_itself() -> None:
    (ids,) = chosen([item("p03")], POOL, settings(shots=11)).values()
    assert "p03" not in ids


def plane(angles: dict[str, float]) -> Any:
    """Features in a plane by the angle of each id, of any length."""
    return lambda items: np.array([[3 * np.cos(angles[one.id]), 3 * np.sin(angles[one.id])] for one in items])


def test_the_nearest_are_those_of_the_smallest_angle_with_ties_by_id_and_the_nearest_last() -> None:
    pool = [item("d", "1"), item("b", "2"), item("a", "3"), item("c", "4"), item("e", "own")]
    angles = {"a": 0.5, "b": -0.2, "c": -0.5, "d": 1.5, "e": 0.0, "q": 0.0}
    near = {"kind": "nearest"}
    assert chosen([item("q", "own")], pool, settings(shots=4, selection=near), plane(angles))["q"] == (
        "d", "c", "a", "b",
    )  # fmt: skip
    first = settings(shots=3, selection={**near, "order": "nearest_first"})
    assert chosen([item("q", "own")], pool, first, plane(angles))["q"] == ("b", "a", "c")


def test_the_last_bits_of_a_similarity_decide_nothing() -> None:
    angles = {"a": 0.5, "b": 0.5 - 1e-9, "q": 0.0}
    few_shot = settings(shots=1, selection={"kind": "nearest"})
    assert chosen([item("q", "own")], [item("b", "1"), item("a", "2")], few_shot, plane(angles))["q"] == ("a",)


def test_text_only_demonstrations_have_no_image_and_say_so() -> None:
    candidates = candidates_of([item("p", "1", "2"), item("t")], settings(control="text_only"), digest)
    shown = {one.own.id: one.shown for one in candidates}
    assert (shown["p"].id, shown["t"].id) == ("p (text only)", "t")
    assert shown["p"].parts["image"] == ("", "")
    assert shown["p"].parts["question"] == ("p?",)


def test_shuffled_demonstrations_have_the_images_of_others_in_the_places_of_their_own() -> None:
    interleaved = Item("m", "m", {"question": ("a", SealedImage("5"), "b", SealedImage("6"))}, answer="x")
    pool = [*POOL, interleaved]
    for one in candidates_of(pool, settings(control="shuffled_images"), digest):
        own, shown = one.own.readable_images(), one.shown.readable_images()
        assert len(shown) == len(own)
        assert not set(own) & set(shown)
        other = next(each for each in pool if each.id in one.shown.id.partition(" (images of ")[2])
        assert set(shown) <= set(other.readable_images())
        assert one.shown.answer == one.own.answer
        if one.own.id == "m":
            first, _, second, _ = one.shown.parts["question"]
            assert (first, second) == ("a", "b")
    with pytest.raises(ValueError, match="'p00' has no other image to be shown with"):
        candidates_of(POOL[:1], settings(control="shuffled_images"), digest)


def test_what_has_no_answer_or_no_image_is_no_demonstration_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    broken = Item("x", "x", {"image": (Unreadable("x.jpg is missing"),)}, answer="yes")
    candidates = candidates_of([POOL[0], item("n", "9", answer=""), broken], settings(), digest)
    assert [one.own.id for one in candidates] == ["p00"]
    assert "2 of 3 items cannot be demonstrations" in caplog.text
    with pytest.raises(ValueError, match="none of the 1 items of the pool has an answer and its images"):
        candidates_of([broken], settings(), digest)


def test_demonstrations_are_turns_of_a_chat_or_running_text() -> None:
    dog, cat = SealedImage("dog"), SealedImage("cat")
    chat = TextPrompt((("system", ("Be short.",)), ("user", (dog, "What? Answer:"))))
    text = TextPrompt((("user", (dog, "What? Answer:")),), is_chat=False)
    shown = {"s": ((cat, "What? Answer:"), "a cat")}
    first, second = with_demonstrations(
        [GenerateRequest(item="q", prompt=prompt, max_new_tokens=3) for prompt in (chat, text)], {"q": ("s",)}, shown
    )
    assert first.shots == second.shots == ("s",)
    assert first.prompt == TextPrompt(
        (
            ("system", ("Be short.",)),
            ("user", (cat, "What? Answer:")),
            ("assistant", ("a cat",)),
            ("user", (dog, "What? Answer:")),
        )
    )
    assert second.prompt == TextPrompt(
        (("user", (cat, "What? Answer: a cat\n\n", dog, "What? Answer:")),), is_chat=False
    )


def test_a_copy_is_an_answer_that_a_demonstration_gives() -> None:
    assert is_copy(" A cat. ", ["dog", "a  CAT"])
    assert not is_copy("cats", ["cat"])
    assert not is_copy("", ["cat"])


def okvqa(**changes: Any) -> OkVqa:
    config: OkVqa = config_of(OkVqa, few_shot={"shots": 2}, **changes)
    return config


def test_the_copy_rate_by_hand_and_names_that_say_how_many_shots() -> None:
    """Of four items one copies, one does not, one fails, and one copies with another case: 2 of 3 answers."""
    config, items = okvqa(), sample_items(okvqa())
    answers = dict(zip([one.id for one in items], ["red", "blue", None, "GREEN."], strict=True))
    plain = rows_of(items, config, lambda one, _: answers[one.id])
    rows = [replace(row, shots=("s", "t")) for row in plain]
    scored = score(items, rows, config, SETTINGS, shown={"s": "red", "t": "green"})
    values = {metric.name: metric.value for metric in scored.measurement.metrics}
    assert values["okvqa_copy_rate_2shot"] == pytest.approx(2 / 3)
    assert {name.rpartition("_")[2] for name in values} == {"2shot"}
    assert {"okvqa_official_2shot", "okvqa_lavis_2shot"} <= values.keys()
    assert [row.scores.get("copied") for row in scored.rows] == [1.0, 0.0, None, 1.0]
    assert score(items, scored.rows, config, SETTINGS, shown={"s": "red", "t": "green"}) == scored
    left_out = okvqa(failed_items="left_out")
    names = {one.name for one in score(items, rows, left_out, SETTINGS, shown={"s": "", "t": ""}).measurement.metrics}
    assert "okvqa_official_2shot_answered" in names


def test_other_selections_and_controls_are_other_names() -> None:
    assert settings(selection={"kind": "nearest"}, control="text_only").variant() == "2shot_nearest_text_only"
    assert settings(shots=8, control="shuffled_images").variant() == "8shot_shuffled_images"


def test_no_shots_are_no_setting() -> None:
    assert config_of(OkVqa, few_shot={"shots": 0}) == config_of(OkVqa)
    assert "few_shot" not in config_of(OkVqa).model_dump()


OF_A_MIXTURE = {"shots": 1, "pool": {"kind": "mixture", "sources": ["a"]}}
TEXT = {"format": "text", "user": "{image}{question}", "answer": {"kind": "generate", "max_new_tokens": 3}}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: settings(shots=0, control="text_only"), "control text_only has no effect without demonstrations"),
        (lambda: okvqa(prompt=TEXT), "needs a stop rule"),
        (lambda: config_of(Mmlu, few_shot={"shots": 1}), "the prompt shows {examples}, the benchmark's own"),
        (
            lambda: OfficialSuite(name="s", benchmarks={"o": config_of(OkVqa, few_shot=OF_A_MIXTURE)}),
            "'o' takes its demonstrations from the suite's mixture, and suite 's' has none",
        ),
    ],
)
def test_settings_that_cannot_be_are_refused_at_load(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
