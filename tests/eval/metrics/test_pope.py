import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.eval.metrics.official import recorded
from vila_ops.eval.metrics.pope import (
    QUESTIONS,
    PopeCounts,
    YesNo,
    accuracy,
    corrected_answer,
    count,
    f1,
    official_in_order,
    parse_answer,
    pope,
    precision,
    recall,
    yes_ratio,
)
from vila_ops.eval.statistics import cluster_bootstrap


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("yes", "yes"),
        ("Yes, there is a dog.", "yes"),
        ("no", "no"),
        ("No", "no"),
        ("No, there is no dog.", "no"),
        ("There is not a dog in the image.", "no"),
        ("no.", "no"),
        ("", "yes"),
        ("Yes. There is no cat, though.", "yes"),  # the first sentence alone
        ("The image shows a dog. No.", "yes"),
        (". no", "yes"),  # the first sentence is empty
        ("Well,no", "yes"),  # without its comma it is one word
        ("Well, no", "no"),
        ("NO", "yes"),  # case is kept
        ("Not that I see", "yes"),
        ("No!", "yes"),  # so are marks other than commas and dots
        ("no\n", "yes"),  # and line ends: the script splits at spaces
        ("nothing is known", "yes"),  # whole words
        ("There isn't one", "yes"),
    ],
)
def test_answers_are_read_as_by_the_official_script(text: str, answer: YesNo) -> None:
    assert parse_answer(text) == answer


def script(text: str) -> YesNo:
    """Lines of the official script, as a reference."""
    if text.find(".") != -1:
        text = text.split(".")[0]
    text = text.replace(",", "")
    words = text.split(" ")
    return "no" if "No" in words or "not" in words or "no" in words else "yes"


@given(st.lists(st.sampled_from(["no", "No", "not", "yes", "a", ".", ",", " ", "\n"]), max_size=8).map("".join))
def test_any_answer_is_read_as_by_the_official_script(text: str) -> None:
    assert parse_answer(text) == script(text)


LABELS: list[tuple[str, YesNo]] = [("1", "yes"), ("2", "yes"), ("3", "yes"), ("4", "no"), ("5", "no")]


def test_numbers_by_hand() -> None:
    answers = [("5", "No."), ("4", "Yes."), ("3", "no"), ("2", "yes"), ("1", "A dog, yes")]  # in another order
    counts = count(answers, LABELS)
    assert counts.argmax(axis=1).tolist() == [0, 0, 3, 1, 2]
    assert counts.sum(axis=1).tolist() == [1] * 5
    assert pope(counts) == PopeCounts(accuracy=3 / 5, precision=2 / 3, recall=2 / 3, f1=4 / 6, yes_ratio=3 / 5, items=5)


def test_always_yes_is_half_right_on_balanced_labels() -> None:
    labels: list[tuple[str, YesNo]] = [("1", "yes"), ("2", "no")]
    result = pope(count([("1", ""), ("2", "")], labels))
    assert result == PopeCounts(accuracy=0.5, precision=0.5, recall=1, f1=2 / 3, yes_ratio=1, items=2)


def test_always_no_has_no_precision_and_no_f1() -> None:
    result = pope(count([(id_, "no") for id_, _ in LABELS], LABELS))
    assert result == PopeCounts(accuracy=2 / 5, precision=0, recall=0, f1=0, yes_ratio=0, items=5)


def test_labels_that_are_all_no_have_no_recall() -> None:
    result = pope(count([("1", "no"), ("2", "no")], [("1", "no"), ("2", "no")]))
    assert result == PopeCounts(accuracy=1, precision=0, recall=0, f1=0, yes_ratio=0, items=2)


def test_f1_is_the_harmonic_mean_of_precision_and_recall() -> None:
    sums = np.random.default_rng(0).integers(1, 50, size=(100, 4)).astype(np.float64)
    harmonic = 2 * precision(sums) * recall(sums) / (precision(sums) + recall(sums))
    assert f1(sums) == pytest.approx(harmonic)


def test_statistics_of_many_sums_are_those_of_each() -> None:
    sums = np.array([[2, 1, 1, 1], [0, 0, 3, 0]], dtype=np.float64)
    assert accuracy(sums).tolist() == [3 / 5, 1]
    assert yes_ratio(sums).tolist() == [3 / 5, 0]


def test_f1_has_a_bootstrap_interval_over_objects() -> None:
    counts = count([("5", "no"), ("4", "yes"), ("3", "no"), ("2", "yes"), ("1", "yes")], LABELS)
    interval = cluster_bootstrap(counts, ["a", "a", "b", "b", "c"], statistic=f1, resamples=500, seed=0)
    assert interval.value == pope(counts).f1
    assert 0 <= interval.low < interval.value < interval.high <= 1


def test_missing_ids_are_named() -> None:
    with pytest.raises(ValueError, match="differ in 2 ids: 2, 9"):
        count([("1", "yes"), ("9", "no")], [("1", "yes"), ("2", "no")])


def test_doubled_answers_are_named() -> None:
    with pytest.raises(ValueError, match="answers have 1 ids more than once: 1"):
        count([("1", "yes"), ("1", "no")], [("1", "yes")])


def test_doubled_labels_are_named() -> None:
    with pytest.raises(ValueError, match="labels have 1 ids more than once: 1"):
        count([("1", "yes")], [("1", "yes"), ("1", "yes")])


def test_a_label_of_another_word_is_named() -> None:
    with pytest.raises(ValueError, match="neither 'yes' nor 'no': 1"):
        count([("1", "yes")], [("1", "Yes")])  # type: ignore[list-item]


def test_no_items_are_refused() -> None:
    with pytest.raises(ValueError, match="no items"):
        pope(count([], []))


def test_numbers_in_order_are_those_of_the_script() -> None:
    for case in recorded("pope")["items"]:
        ours = official_in_order(case["answers"], case["labels"])
        assert (ours.accuracy, ours.precision, ours.recall) == (case["acc"], case["precision"], case["recall"]), case
        assert (ours.f1, ours.yes_ratio) == (pytest.approx(case["f1"]), case["yes_ratio"]), case


def test_numbers_by_id_are_those_in_order_where_the_ids_are_in_order() -> None:
    answers, labels = ["yes", "no", "No.", "yes"], ["yes", "yes", "no", "no"]
    by_id = count(list(zip("1234", answers, strict=True)), list(zip("1234", labels, strict=True)))  # type: ignore[arg-type]
    assert pope(by_id) == official_in_order(answers, labels)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("NO", "no"),
        ("No!", "no"),
        ("no\n", "no"),
        ("Well,no", "no"),
        (". no", "no"),
        ("There isn't one", "no"),
        ("There isn’t one", "no"),
        ("Not that I see", "no"),
        ("Yes. There is no cat, though.", "yes"),
        ("A dog is there", "yes"),
        ("nothing is known", "yes"),
        ("", None),
        (" .\n", None),
        ("Nope", "no"),
        ("ＮＯ", "no"),  # full width
        ("I am not sure", None),  # POPE#19
        ("Maybe.", None),
        ("I can't tell", None),
        ("No, I am not sure", "no"),
        ("I cannot see a dog", "no"),
    ],
)
def test_answers_are_read_by_their_negations(text: str, answer: YesNo | None) -> None:
    assert corrected_answer(text) == answer


def test_an_empty_answer_is_wrong_for_either_label() -> None:
    labels: list[tuple[str, YesNo]] = [("1", "yes"), ("2", "no")]
    counts = count([("1", ""), ("2", "")], labels, parse=corrected_answer)
    assert counts.argmax(axis=1).tolist() == [3, 1]
    assert pope(counts).accuracy == 0


def test_the_versions_differ_in_the_random_questions() -> None:
    assert sum(QUESTIONS["e3e3926"].values()) == 8910
    assert sum(QUESTIONS["109985c"].values()) == 9000
