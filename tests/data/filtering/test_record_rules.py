import io
from typing import Any

import pytest
from PIL import Image as Pillow
from pydantic import ValidationError

from vila_ops.config.clean import Bounds, Clean, NearDuplicates
from vila_ops.data.filtering.record_rules import FilteredRecord, filter_record, score_sum
from vila_ops.data.records import Dropped, Image, Part, Record, Turn

COLUMNS = ("clip_similarity_vitb32", "clip_similarity_vitl14")


def png(width: int, height: int, **scores: float) -> Image:
    out = io.BytesIO()
    Pillow.new("L", (width, height)).save(out, "PNG")
    return Image(out.getvalue(), scores)


def document(*parts: Part, **scores: float) -> Record:
    return Record("d", "thing", (Turn("document", parts),), category="", licence="", provenance="a:1", scores=scores)


def reason(filtered: FilteredRecord) -> str | None:
    return filtered.record.reason if isinstance(filtered.record, Dropped) else None


def rules(**set_to: Any) -> Clean:
    return Clean.model_validate(set_to)


def test_nothing_set_nothing_dropped() -> None:
    one = document(png(1, 9000), "")
    assert filter_record(one, Clean()) == FilteredRecord(one)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((64, 64), None),
        ((64, 128), None),
        ((63, 90), "small_image"),
        ((129, 64), "narrow_image"),
        ((64, 129), "narrow_image"),
    ],
)
def test_the_shorter_side_and_the_aspect_have_limits_that_are_still_allowed(
    size: tuple[int, int], expected: str | None
) -> None:
    assert reason(filter_record(document(png(*size), "A dog."), rules(min_side=64, max_aspect=2))) == expected


def test_words_are_counted_over_all_texts() -> None:
    one = document("one two", png(8, 8), " three\nfour ")
    assert reason(filter_record(one, rules(min_words=4, max_words=4))) is None
    assert reason(filter_record(one, rules(min_words=5))) == "few_words"
    assert reason(filter_record(one, rules(max_words=3))) == "many_words"


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ({"watermark_score": 0.5}, None),
        ({"watermark_score": 0.2}, None),
        ({"watermark_score": 0.51}, "high_watermark_score"),
        ({"watermark_score": 0.19}, "low_watermark_score"),
        ({"watermark_score": float("nan")}, "missing_watermark_score"),
        ({"nsfw": 0.3}, "missing_watermark_score"),
    ],
)
def test_a_score_outside_its_bounds_or_without_a_value_costs_the_record(
    scores: dict[str, float], expected: str | None
) -> None:
    bounds = {"watermark_score": {"at_least": 0.2, "at_most": 0.5}}
    assert reason(filter_record(document("A dog.", **scores), rules(scores=bounds))) == expected


def test_coyo_rows_need_both_columns_and_a_sum_above_the_floor() -> None:
    coyo = rules(top_share={"columns": COLUMNS, "share": 0.2, "above": 0.6})
    both = dict(zip(COLUMNS, (0.25, 0.375), strict=True))
    assert reason(filter_record(document("A dog.", **both), coyo)) is None
    assert score_sum(both, COLUMNS) == 0.625
    at_the_floor = dict(zip(COLUMNS, (0.3, 0.3), strict=True))
    assert reason(filter_record(document("A dog.", **at_the_floor), coyo)) == "low_sum"
    one_only = document("A dog.", clip_similarity_vitb32=0.9)
    assert reason(filter_record(one_only, coyo)) == "missing_clip_similarity_vitl14"
    assert score_sum(one_only.scores, COLUMNS) is None


def test_a_bad_image_is_dropped_images_of_a_document_that_keeps_another() -> None:
    good, small = png(80, 80), png(8, 80)
    filtered = filter_record(document("one ", small, "two ", good, "three"), rules(min_side=64))
    assert isinstance(filtered.record, Record)
    assert filtered.record.turns == (Turn("document", ("one ", "two ", good, "three")),)
    assert [(out.id, out.reason, out.where) for out in filtered.dropped_images] == [("d", "small_image", "a:1")]
    assert filtered.dropped_images[0].detail.startswith("image 1: 8 x 80 pixels")


def test_words_that_a_removed_image_parted_stay_apart() -> None:
    good, small = png(80, 80), png(8, 80)
    filtered = filter_record(document("One.", small, small, "Two.", good, small, "Three."), rules(min_side=64))
    assert isinstance(filtered.record, Record)
    assert "".join(str(part) for part in filtered.record.turns[0].parts[:3]) == "One. Two."
    assert filtered.record.turns[0].parts[3:] == (good, "Three.")


def test_the_last_image_of_a_document_and_any_of_a_conversation_cost_the_record() -> None:
    small, good = png(8, 8), png(80, 80)
    assert reason(filter_record(document(small, "A dog.", small), rules(min_side=64))) == "small_image"
    turns = (Turn("user", (good, small, "Which is larger?")), Turn("assistant", ("The first.",)))
    talk = Record("c", "thing", turns, category="", licence="", provenance="")
    filtered = filter_record(talk, rules(min_side=64))
    assert reason(filtered) == "small_image"
    assert filtered.dropped_images == ()


def test_a_column_of_each_image_is_a_rule_about_images() -> None:
    near, far, unknown = png(8, 8, similarity=0.3), png(8, 8, similarity=0.1), png(8, 8)
    filtered = filter_record(document(far, "a", near, "b", unknown), rules(scores={"similarity": {"at_least": 0.24}}))
    assert isinstance(filtered.record, Record)
    assert filtered.record.turns[0].parts == ("a", near, "b")
    assert [out.reason for out in filtered.dropped_images] == ["low_similarity", "missing_similarity"]


def test_an_unreadable_image_is_not_judged_here() -> None:
    one = document(Image(b"no image"), "A dog.")
    assert filter_record(one, rules(min_side=64, max_aspect=2)).record == one


@pytest.mark.parametrize(
    "make",
    [
        lambda: Bounds(),
        lambda: Bounds(at_least=2, at_most=1),
        lambda: Clean(min_words=5, max_words=4),
        lambda: Clean(max_aspect=0.5),
        lambda: NearDuplicates(),
        lambda: NearDuplicates(image_bits=7),
        lambda: NearDuplicates(text_similarity=0.4),
    ],
)
def test_rules_without_effect_or_sense_are_refused(make: Any) -> None:
    with pytest.raises(ValidationError):
        make()
