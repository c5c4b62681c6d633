import hashlib
import random

import pytest

from vila_ops.data.preprocess.units import RECORD_BYTES, Unit, plan_units
from vila_ops.data.raw.files import STRIDE, RawFile

IMAGE = 30_000
MIB = 2**20


def raw(name: str, count: int, images: int) -> RawFile:
    marks = tuple(range(0, count, STRIDE))
    digest = hashlib.sha256(name.encode()).hexdigest()
    return RawFile(name=name, path=f"/raw/{name}", digest=digest, count=count, images=images, marks=marks)


def plan(files: list[RawFile], limit: int | None = None) -> list[Unit]:
    return plan_units("s", files, shard_bytes=128 * MIB, image_bytes=IMAGE, limit=limit)


def size(unit: Unit, files: dict[str, RawFile]) -> float:
    return sum(
        (span.stop - span.start) * (files[span.name].images / files[span.name].count * IMAGE + RECORD_BYTES)
        for span in unit.spans
    )


def records(units: list[Unit]) -> list[tuple[str, int]]:
    return [
        (span.name, number)
        for unit in units
        for span in unit.spans
        for number in range(span.start, span.stop)
        if span.takes(number)
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "images", "files"),
    [(320, 1280, 500), (5_000_000, 5_000_000, 1), (665_000, 620_000, 1), (12_000, 12_000, 40), (1, 1, 9000)],
    ids=["mmc4", "coyo", "llava", "webdataset", "html"],
)
def test_shards_of_large_sources_have_64_to_256_mebibytes(count: int, images: int, files: int) -> None:
    many = [raw(f"{number:05d}", count, images) for number in range(files)]
    units = plan(many)
    assert records(units) == [(file.name, number) for file in many for number in range(count)]
    sizes = [size(unit, {file.name: file for file in many}) for unit in units]
    assert all(64 * MIB <= one <= 256 * MIB for one in sizes[:-1])
    assert sizes[-1] <= 256 * MIB


@pytest.mark.slow
def test_what_a_rule_takes_out_makes_no_shard_smaller() -> None:
    """COYO's best fifth."""
    file = raw("a", 5_000_000, 5_000_000)
    units = plan_units("s", [file], shard_bytes=128 * MIB, image_bytes=IMAGE, share=0.2)
    assert records(units) == [("a", number) for number in range(5_000_000)]
    assert all(64 * MIB <= 0.2 * size(unit, {"a": file}) <= 256 * MIB for unit in units)


def test_a_file_that_is_dropped_in_changes_few_units() -> None:
    old = [raw(f"{number:05d}-{random.Random(number).random():.6f}", 320, 1280) for number in range(300)]
    fresh = raw("00150-aa", 320, 1280)
    before = {unit.model_dump_json() for unit in plan(old)}
    after = {unit.model_dump_json() for unit in plan(sorted([*old, fresh], key=lambda file: file.name))}
    at_end = {unit.model_dump_json() for unit in plan([*old, raw("99999", 320, 1280)])}
    assert len(before) > 60
    assert len(after - before) <= 3
    assert len(at_end - before) == 1


def test_a_limit_takes_so_many_evenly_spaced_records() -> None:
    files = [raw(f"{number}", 1000, 1000) for number in range(7)]
    taken = records(plan(files, limit=123))
    expected = [place * 7000 // 123 for place in range(123)]
    assert taken == [(str(place // 1000), place % 1000) for place in expected]
    assert records(plan(files, limit=9000)) == records(plan(files))


def test_spans_begin_where_the_file_says() -> None:
    for unit in plan([raw("a", 100_000, 100_000)]):
        for span in unit.spans:
            assert span.start % STRIDE == 0
            assert span.mark == span.start
