"""Rules on one record: the record as they leave it, or the reason to drop it. Of images only headers are read."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import isfinite

from vila_ops.config.clean import Bounds, Clean
from vila_ops.data.containers import BadImage, strip
from vila_ops.data.records import Dropped, Image, Part, Record, Turn

Violation = tuple[str, str]
"""The reason that drops are counted by, and a detail: the value, the rule and the way out."""


@dataclass(frozen=True)
class FilteredRecord:
    """A record after its source's rules."""

    record: Record | Dropped
    dropped_images: tuple[Dropped, ...] = ()
    """Images removed from a document that stays; counted apart from records."""


def filter_record(record: Record, rules: Clean) -> FilteredRecord:
    """The record as the rules leave it.

    An image that breaks a rule is removed from a document (all turns `document`) that keeps another image. In other
    records the text refers to its images, so the record is dropped. Reasons: few_words, many_words, small_image,
    narrow_image, and of scores low_COLUMN, high_COLUMN, missing_COLUMN, low_sum.
    """
    for reason, detail in _record_violations(record, rules):
        return FilteredRecord(Dropped(record.id, reason, where=record.provenance, detail=detail))
    images = [part for turn in record.turns for part in turn.parts if isinstance(part, Image)]
    violations = [next(_image_violations(image, record, rules), None) for image in images]
    dropped_images = [
        Dropped(record.id, violation[0], where=record.provenance, detail=f"image {number}: {violation[1]}")
        for number, violation in enumerate(violations, start=1)
        if violation
    ]
    if not dropped_images:
        return FilteredRecord(record)
    is_document = all(turn.role == "document" for turn in record.turns)
    if not is_document or len(dropped_images) == len(images):
        return FilteredRecord(dropped_images[0])
    broken = iter(violations)
    turns = tuple(Turn(turn.role, _without(turn.parts, broken)) for turn in record.turns)
    return FilteredRecord(replace(record, turns=tuple(turn for turn in turns if turn.parts)), tuple(dropped_images))


def _without(parts: tuple[Part, ...], broken: Iterator[Violation | None]) -> tuple[Part, ...]:
    """The parts without images that break a rule; texts that then meet are kept apart by a space."""
    kept: list[Part] = []
    meets = False
    for part in parts:
        if isinstance(part, Image) and next(broken):
            meets = bool(kept) and isinstance(kept[-1], str)
            continue
        if meets and isinstance(part, str) and not (f"{kept[-1]}"[-1:].isspace() or part[:1].isspace()):
            kept.append(" ")
        kept.append(part)
        meets = False
    return tuple(kept)


def score_sum(scores: Mapping[str, float], columns: tuple[str, ...]) -> float | None:
    """The sum that `top_share` ranks by; None if a column is missing or its value is not finite."""
    values = [scores.get(column) for column in columns]
    finite = [value for value in values if value is not None and isfinite(value)]
    return sum(finite) if len(finite) == len(values) else None


def _record_violations(record: Record, rules: Clean) -> Iterator[Violation]:
    for column, bounds in rules.scores.items():
        if not _is_of_images(column, record):
            yield from _score_violations(record.scores, column, bounds)
    if rules.top_share:
        for column in rules.top_share.columns:
            yield from _score_violations(record.scores, column, None)
        total, above = score_sum(record.scores, rules.top_share.columns), rules.top_share.above
        if total is not None and above is not None and total <= above:
            yield "low_sum", f"{' + '.join(rules.top_share.columns)} is {total:.4g}, not above {above}"
    words = sum(len(part.split()) for turn in record.turns for part in turn.parts if isinstance(part, str))
    if rules.min_words is not None and words < rules.min_words:
        yield "few_words", f"{words} words, fewer than min_words {rules.min_words}"
    if rules.max_words is not None and words > rules.max_words:
        yield "many_words", f"{words} words, more than max_words {rules.max_words}"


def _image_violations(image: Image, record: Record, rules: Clean) -> Iterator[Violation]:
    for column, bounds in rules.scores.items():
        if _is_of_images(column, record):
            yield from _score_violations(image.scores, column, bounds)
    if rules.min_side is None and rules.max_aspect is None:
        return
    try:
        stripped = strip(image.data)
    except BadImage:
        return  # decoding it when the shard is written drops it as bad
    width, height = stripped.width, stripped.height
    if rules.min_side is not None and min(width, height) < rules.min_side:
        yield "small_image", f"{width} x {height} pixels, its shorter side below min_side {rules.min_side}"
    if rules.max_aspect is not None and max(width, height) > rules.max_aspect * min(width, height):
        yield "narrow_image", f"{width} x {height} pixels, its sides beyond max_aspect {rules.max_aspect}"


def _is_of_images(column: str, record: Record) -> bool:
    parts = (part for turn in record.turns for part in turn.parts)
    return column not in record.scores and any(isinstance(part, Image) and column in part.scores for part in parts)


def _score_violations(scores: Mapping[str, float], column: str, bounds: Bounds | None) -> Iterator[Violation]:
    """Whether a score is missing or out of bounds; without bounds, any finite value passes."""
    value = scores.get(column)
    if value is None or not isfinite(value):
        yield f"missing_{column}", f"{column} is {value}; take the rule out if the source does not have it"
    elif bounds and bounds.at_least is not None and value < bounds.at_least:
        yield f"low_{column}", f"{column} is {value:.4g}, below at_least {bounds.at_least}"
    elif bounds and bounds.at_most is not None and value > bounds.at_most:
        yield f"high_{column}", f"{column} is {value:.4g}, above at_most {bounds.at_most}"
