import json
from collections.abc import Callable
from pathlib import Path

import pytest

from vila_ops.config.sources import JsonLines
from vila_ops.data import sources
from vila_ops.data.preprocess.units import plan_units
from vila_ops.data.raw.files import RawFile, Span
from vila_ops.data.records import Dropped, Image, Record, Turn

ReadAll = Callable[[JsonLines], list[list[Record | Dropped]]]
Scan = Callable[[JsonLines], list[RawFile]]

DOG = {
    "id": "1",
    "object": "Dog",
    "category": "animals",
    "licence": "CC0-1.0",
    "provenance": "my camera",
    "turns": [
        {"role": "user", "parts": [{"image": "photos/dog.png"}, {"text": "What is <image> this?"}]},
        {"role": "assistant", "parts": [{"text": "A dog."}]},
    ],
}


def source(folder: Path, *lines: object) -> JsonLines:
    (folder / "photos").mkdir(exist_ok=True)
    (folder / "photos/dog.png").write_bytes(b"dog")
    texts = [line if isinstance(line, str) else json.dumps(line, ensure_ascii=False) for line in lines]
    (folder / "records.jsonl").write_text("\n".join(texts) + "\n", encoding="utf-8")
    return JsonLines(render="questions", path=str(folder))


def test_a_line_is_a_record(tmp_path: Path, read_all: ReadAll):
    bear, blank, dog = read_all(source(tmp_path, {**DOG, "id": "0", "object": "Bär"}, "", DOG))
    assert [record.object for record in bear if isinstance(record, Record)] == ["bär"]
    assert blank == []
    assert dog == [
        Record(
            id="1",
            object="dog",
            turns=(
                Turn("user", (Image(b"dog"), "What is <image> this?")),
                Turn("assistant", ("A dog.",)),
            ),
            category="animals",
            licence="CC0-1.0",
            provenance="my camera",
        )
    ]


def test_the_file_is_counted_by_lines_and_images_with_a_mark_every_16_lines(tmp_path: Path, scan: Scan):
    ours = source(tmp_path, *[DOG] * 7, "", "{not json", *[{**DOG, "object": "Bär"}] * 24)
    (file,) = scan(ours)
    lines = (tmp_path / "records.jsonl").read_bytes().splitlines(keepends=True)
    assert (file.name, file.path) == ("records.jsonl", str(tmp_path / "records.jsonl"))
    assert (file.count, file.images) == (33, 31)
    assert file.marks == (0, len(b"".join(lines[:16])), len(b"".join(lines[:32])))


def test_a_span_reads_its_own_lines_from_its_mark(tmp_path: Path, scan: Scan):
    ours = source(tmp_path, *[{**DOG, "id": str(number), "object": "ä" * number} for number in range(1, 41)])
    (file,) = scan(ours)
    span = Span(name=file.name, path=file.path, digest=file.digest, start=16, stop=19, mark=file.marks[1])
    assert [record.id for found in sources.read(ours, {}, span) for record in found] == ["17", "18", "19"]


def test_a_limit_takes_evenly_spaced_lines(tmp_path: Path, scan: Scan):
    ours = source(tmp_path, *[{**DOG, "id": str(number)} for number in range(10)])
    (unit,) = plan_units("ours", scan(ours), shard_bytes=10**6, image_bytes=1, limit=4)
    (span,) = unit.spans
    assert [record.id for found in sources.read(ours, {}, span) for record in found] == ["0", "2", "5", "7"]


def test_a_image_that_changes_changes_the_digest(tmp_path: Path, scan: Scan):
    ours = source(tmp_path, DOG)
    (before,) = scan(ours)
    (tmp_path / "photos/dog.png").write_bytes(b"cat")
    (after,) = scan(ours)
    assert after.digest != before.digest


def test_a_record_whose_image_is_missing_is_dropped(tmp_path: Path, read_all: ReadAll):
    ours = source(tmp_path, {**DOG, "turns": [{"role": "document", "parts": [{"image": "gone.png"}]}]})
    detail = "no file 'gone.png' beside records.jsonl"
    assert read_all(ours) == [[Dropped("1", "missing_image", where="records.jsonl:1", detail=detail)]]


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("{not json", "Invalid JSON"),
        ({**DOG, "turns": []}, "turns\n"),
        ({**DOG, "colour": "brown"}, "colour\n"),
        ({key: value for key, value in DOG.items() if key != "licence"}, "licence\n"),
        ({**DOG, "turns": [{"role": "narrator", "parts": [{"text": "x"}]}]}, "turns.0.role\n"),
        ({**DOG, "turns": [{"role": "user", "parts": [{"image": "../secret.png"}]}]}, "not a path inside the folder"),
        ({**DOG, "turns": [{"role": "user", "parts": [{"image": "/etc/passwd"}]}]}, "not a path inside the folder"),
    ],
)
def test_a_bad_line_is_dropped_with_its_place_and_its_fault(
    line: object, fault: str, tmp_path: Path, read_all: ReadAll
):
    before, (dropped,), after = read_all(source(tmp_path, DOG, line, DOG))
    assert isinstance(dropped, Dropped)
    assert (dropped.reason, dropped.where) == ("bad_line", "records.jsonl:2")
    assert fault in dropped.detail
    assert before == after == read_all(source(tmp_path, DOG))[0]


def test_a_folder_without_records_is_an_error(tmp_path: Path, scan: Scan):
    with pytest.raises(ValueError, match=r"no records\.jsonl in"):
        scan(JsonLines(render="questions", path=str(tmp_path)))


def test_it_needs_no_package(tmp_path: Path):
    assert source(tmp_path, DOG).packages() == ()
