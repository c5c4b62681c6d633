"""Which captions a report shows, and which are right. The order is that of `printf ITEM | sha256sum`."""

from vila_ops.config.eval import AnswerMatch, CaptionCider
from vila_ops.eval.report import ItemAnswer
from vila_ops.report.captions import captions

BY_HASH = "dfcbehag"
"""18ac, 252f, 2e7d, 3e23, 3f79, aaa9, ca97 and cd0a."""


def answer(item: str, said: str = "A cat.", truth: str = "A dog.") -> ItemAnswer:
    return ItemAnswer(item=item, object=item, truth=truth, answer=said, control="A bus.")


def test_the_order_is_that_of_a_hash_of_the_names_whatever_the_answers_and_their_order() -> None:
    for order in ("abcdefgh", "hgfedcba"):
        for right in ("", "abcd", "efgh"):
            answers = [answer(item, "A dog." if item in right else "A cat.") for item in order]
            (part,) = captions({"cider": answers}, {"cider": CaptionCider()})
            assert "".join(one["item"] for one in part["shown"]) == BY_HASH
            assert "".join(one["item"] for one in part["shown"] if one["right"]) == (
                "".join(item for item in BY_HASH if item in right)
            )
            assert (part["right"], part["of"]) == (len(right), 8)


def test_a_caption_is_right_with_the_words_of_the_true_one() -> None:
    answers = [
        answer("a", "a red  BUS", "A red bus."),
        answer("b", "A bus.", "A red bus."),
        answer("c", "A red bus, a red bus.", "A red bus."),
        answer("d", "", "A red bus."),
        answer("e", "A red buses.", "A red bus."),
    ]
    (part,) = captions({"cider": answers}, {"cider": CaptionCider()})
    assert {one["item"]: one["right"] for one in part["shown"]} == {
        "a": True, "b": False, "c": False, "d": False, "e": False,
    }  # fmt: skip
    assert part["shown"][-1] == {
        "item": "a", "object": "a", "truth": "A red bus.", "answer": "a red  BUS", "control": "A bus.", "right": True,
    }  # fmt: skip


def test_known_objects_come_before_new_ones_and_those_before_other_answers() -> None:
    own = [answer(item) for item in "abc"]
    benchmarks = {
        "answer_match": AnswerMatch(),
        "cider": CaptionCider(),
        "empty": CaptionCider(objects="known"),
        "known_cider": CaptionCider(objects="known"),
        "short": CaptionCider(max_new_tokens=4),
    }
    parts = captions({name: [] if name == "empty" else own for name in benchmarks}, benchmarks)
    assert [(part["benchmark"], part["objects"]) for part in parts] == [
        ("known_cider", "known"), ("cider", "new"), ("short", "new"), ("answer_match", None),
    ]  # fmt: skip
    assert captions({"cider": []}, {"cider": CaptionCider()}) == []


def test_all_benchmarks_together_show_24_and_each_at_least_six_while_all_are_counted() -> None:
    answers = [answer(str(number), "A dog." if number < 30 else "A cat.") for number in range(40)]
    for count, shown in ((1, 24), (2, 12), (3, 8), (5, 6)):
        benchmarks = {f"cider{number}": CaptionCider() for number in range(count)}
        parts = captions(dict.fromkeys(benchmarks, answers), benchmarks)
        assert [(len(part["shown"]), part["right"], part["of"]) for part in parts] == [(shown, 30, 40)] * count
