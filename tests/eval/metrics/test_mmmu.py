import random

import pytest

from tests.eval.metrics.official import recorded
from vila_ops.eval.metrics.columns import Columns
from vila_ops.eval.metrics.mmmu import MmmuItem, corrected_open, letter, matches, mmmu, official_open

OPTIONS = ("a red dog", "a cat", "12")


def choice(answer: str, truth: str = "B") -> MmmuItem:
    return MmmuItem(options=OPTIONS, truth=(truth,), answer=answer)


def test_the_official_column_is_that_of_the_official_code() -> None:
    items = recorded("mmmu")["items"]
    ours = mmmu([MmmuItem(tuple(one["options"]), tuple(one["truth"]), one["answer"]) for one in items])
    assert [bool(one.official) for one in ours] == [one["official"] for one in items]


@pytest.mark.parametrize(
    ("answer", "named"),
    [
        ("B", "B"),
        ("B.", "B"),
        ("(A) or (B)", "B"),
        ("not A but B", "B"),
        ("(A) and B", "A"),  # brackets first
        ("A dog sits there", "A"),
        ("the answer is clearly shown: a cat", "B"),  # a long answer
        ("a cat", None),
        ("(B", None),
        ("", None),
    ],
)
def test_letters_are_read_as_by_the_official_code(answer: str, named: str | None) -> None:
    assert letter(answer, OPTIONS) == named


def test_an_unreadable_answer_is_drawn_in_the_official_column_and_wrong_in_the_other() -> None:
    generator = random.Random(42)
    drawn = [generator.choice(["A", "B", "C"]) for _ in range(50)]
    results = mmmu([choice("hm")] * 50)
    assert [one.official for one in results] == [float(one == "B") for one in drawn]
    assert 0 < sum(one.official for one in results) < 50
    assert not any(one.corrected for one in results)


def test_a_letter_before_an_article_is_read_in_the_corrected_column_alone() -> None:
    result = mmmu([choice("B. A cat that sleeps"), choice("It is not (A), so the answer is (B).")])
    assert result == [Columns(official=0, corrected=1), Columns(official=1, corrected=1)]


def test_only_the_official_column_depends_on_the_order_of_the_items() -> None:
    items = [choice(answer, truth) for answer in ("hm", "B", "?", "(A)", "well") for truth in "ABC"]
    order = list(range(len(items)))
    random.Random(1).shuffle(order)
    before, after = mmmu(items), mmmu([items[place] for place in order])
    assert [before[place].corrected for place in order] == [one.corrected for one in after]
    assert [before[place].official for place in order] != [one.official for one in after]


def test_open_answers_by_hand() -> None:
    assert official_open("so x = 3.14159") == {3.14}
    assert official_open("a cat") == {"a cat"}
    assert official_open("B") == {" b", "b "}


def test_sentences_are_split_in_the_corrected_column_alone() -> None:
    text = "The length is 5. This follows from the figure"
    assert 5.0 in corrected_open(text)
    assert official_open(text) == {"follows from the figure"}
    assert mmmu([MmmuItem(options=(), truth=("5",), answer=text)]) == [Columns(official=0, corrected=1)]


def test_parts_of_a_number_are_read_in_the_official_column_alone() -> None:
    assert official_open("It is 1,234.5") == {1234.5, 1234.0, 234.5}
    assert corrected_open("It is 1,234.5") == {1234.5}
    assert corrected_open("Either 2,3 or -1.5e3") == {"either 2,3 or -1.5e3", 2.0, 3.0, -1500.0}


@pytest.mark.parametrize(
    ("parsed", "truth", "expected"),
    [
        ({3.14}, ("3.14",), True),
        ({3.14}, ("3.1",), False),
        ({"3.14 m"}, ("3.14",), False),
        ({"a red cat"}, ("cat",), True),
        ({"a red cat"}, ("dog", "RED"), True),
        ({"abc"}, ("b",), False),
        ({"a b c"}, ("b",), True),
        (set(), ("cat",), False),
    ],
)
def test_open_answers_match_true_ones(parsed: set[float | str], truth: tuple[str, ...], expected: bool) -> None:
    assert matches(parsed, truth) is expected
