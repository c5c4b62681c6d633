"""Interleaved documents in the forms of OBELICS and OmniCorpus."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vila_ops.config.sources import Interleaved
from vila_ops.data.download.sources import urls_of
from vila_ops.data.inspect.guess import guess
from vila_ops.data.raw.files import RawFile
from vila_ops.data.records import Dropped, Image, Record

ReadAll = Callable[[Interleaved], list[list[Record | Dropped]]]
Scan = Callable[[Interleaved], list[RawFile]]
Make = Callable[..., Interleaved]

# The keys of OmniCorpus-CC's records (huggingface.co/datasets/OpenGVLab/OmniCorpus-CC-210M), with other words.
OMNICORPUS: dict[str, Any] = {
    "general_metadata": {"url": "http://EX.test/Page", "id": "b1", "fluency_prob": 0.9, "toxic_prob": 0.01},
    "images": ["http://ex.test/a.jpg", None, None, "http://ex.test/b.jpg", None],
    "metadata": [{"aesthetic_prob": 0.5, "unsafe_prob": 0.1}, None, None, {"aesthetic_prob": 0.2}, None],
    "texts": [None, "Intro.", " Second paragraph.\n", None, "The end."],
}
# OBELICS (huggingface.co/datasets/HuggingFaceM4/OBELICS) has both kinds of metadata as JSON in text.
OBELICS = {
    "images": OMNICORPUS["images"],
    "metadata": json.dumps(OMNICORPUS["metadata"]),
    "general_metadata": json.dumps(OMNICORPUS["general_metadata"]),
    "texts": OMNICORPUS["texts"],
}
A, B = (Image(b"a", {"aesthetic_prob": 0.5, "unsafe_prob": 0.1}), Image(b"b", {"aesthetic_prob": 0.2}))
PARTS = (A, "Intro.\n\nSecond paragraph.", B, "The end.")


@pytest.fixture
def made(tmp_path: Path, download: Callable[[Path, Mapping[str, Any]], None]) -> Make:
    """A source of documents as jsonl, or as Parquet, with the images a.jpg and b.jpg downloaded, or what `became`."""

    def make(*documents: Any, became: Mapping[str, Any] | None = None, form: str = "jsonl", **more: Any) -> Interleaved:
        raw = tmp_path / "raw"
        raw.mkdir(exist_ok=True)
        if form == "jsonl":
            lines = (one if isinstance(one, str) else json.dumps(one) for one in documents)
            (raw / "docs-0.jsonl").write_text("".join(f"{line}\n" for line in lines))
        else:
            pq.write_table(pa.Table.from_pylist(list(documents)), raw / "docs-0.parquet", row_group_size=10)
        images = {"http://ex.test/a.jpg": b"a", "http://ex.test/b.jpg": b"b", **(became or {})}
        download(tmp_path / "images/docs-0", images)
        source = guess(str(raw), images=str(tmp_path / "images"), own={"licence": "CC-BY-4.0", **more})
        assert isinstance(source, Interleaved)
        return source

    return make


def only(found: list[list[Record | Dropped]]) -> Record:
    ((record,),) = found
    assert isinstance(record, Record), record
    return record


def dropped(found: list[list[Record | Dropped]]) -> list[tuple[str, str, bool]]:
    return [(one.reason, one.where, one.is_bad) for held in found for one in held if isinstance(one, Dropped)]


@pytest.mark.parametrize(("document", "form"), [(OMNICORPUS, "jsonl"), (OBELICS, "parquet"), (OMNICORPUS, "parquet")])
def test_texts_and_images_stand_in_their_order(document: Any, form: str, made: Make, read_all: ReadAll) -> None:
    record = only(read_all(made(document, form=form)))
    assert record.turns[0].parts == PARTS
    assert record.object == "http://ex.test/page"
    assert record.licence == "CC-BY-4.0"
    assert record.provenance == f"docs-0.{form}:1 http://EX.test/Page"
    assert {name: score for name, score in record.scores.items() if score} == {"fluency_prob": 0.9, "toxic_prob": 0.01}


def test_the_urls_are_those_of_its_images_after_its_rules(made: Make, tmp_path: Path) -> None:
    path = tmp_path / "raw/docs-0.jsonl"
    a, b = "http://ex.test/a.jpg", "http://ex.test/b.jpg"
    assert urls_of(made(OMNICORPUS, "{", "", OMNICORPUS), path) == [a, b]
    assert urls_of(made(OMNICORPUS, max_images=1), path) == [a]
    assert urls_of(made(OMNICORPUS, clean={"scores": {"aesthetic_prob": {"at_most": 0.3}}}), path) == [b]
    assert urls_of(made(OMNICORPUS, clean={"scores": {"fluency_prob": {"at_least": 0.95}}}), path) == []
    assert urls_of(made(OBELICS, form="parquet"), path.with_suffix(".parquet")) == [a, b]


def test_an_image_that_is_not_there_is_left_out_or_costs_the_document(made: Make, read_all: ReadAll) -> None:
    gone = {"http://ex.test/b.jpg": "not_found"}
    record = only(read_all(made(OMNICORPUS, became=gone)))
    assert record.turns[0].parts == (A, "Intro.\n\nSecond paragraph.\n\nThe end.")
    strict = made(OMNICORPUS, became=gone, missing_images="drop_document")
    assert dropped(read_all(strict)) == [("not_downloaded", "docs-0.jsonl:1", False)]
    none = made(OMNICORPUS, became={**gone, "http://ex.test/a.jpg": "timeout"})
    assert dropped(read_all(none)) == [("not_downloaded", "docs-0.jsonl:1", False)]


def test_rules_on_scores_are_applied_before_an_image_is_missed(made: Make, read_all: ReadAll) -> None:
    gone = {"http://ex.test/b.jpg": "not_found"}
    rule = {"scores": {"aesthetic_prob": {"at_least": 0.4}}}
    source = made(OMNICORPUS, became=gone, clean=rule, missing_images="drop_document")
    assert only(read_all(source)).turns[0].parts == (A, "Intro.\n\nSecond paragraph.\n\nThe end.")
    unsafe = made(OMNICORPUS, clean={"scores": {"toxic_prob": {"at_most": 0.001}}})
    assert dropped(read_all(unsafe)) == [("high_toxic_prob", "docs-0.jsonl:1 http://EX.test/Page", False)]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "bad_json"),
        ("[1]", "not_an_object"),
        ({"texts": ["a"]}, "bad_document"),
        ({"texts": ["a"], "images": [None, None]}, "bad_document"),
        ({"texts": ["a"], "images": ["http://ex.test/a.jpg"]}, "bad_document"),
        ({"texts": [1], "images": [None]}, "bad_document"),
        ({"texts": ["a", None], "images": [None, {"bytes": "x"}]}, "bad_document"),
        ({"texts": ["a\0", None], "images": [None, "http://ex.test/a.jpg"]}, "nul_in_text"),
        ({"texts": ["a", None], "images": [None, "http://ex.test/\ud800"]}, "lone_surrogate"),
        ({"texts": ["a"], "images": [None], "metadata": "{"}, "bad_json"),
        ({"texts": ["a", None], "images": [None, None]}, "no_image"),
        ({"texts": [" ", None], "images": [None, "http://ex.test/a.jpg"]}, "no_text"),
        ({"texts": [], "images": []}, "no_image"),
    ],
)
def test_a_faulty_line_is_dropped_with_its_number(line: Any, reason: str, made: Make, read_all: ReadAll) -> None:
    found = read_all(made(OMNICORPUS, line, "", OMNICORPUS))
    assert dropped(found) == [(reason, "docs-0.jsonl:2", True)]
    assert [len(held) for held in found] == [1, 1, 0, 1]


def test_spans_are_slices_of_the_whole_and_images_are_counted(made: Make, read_all: ReadAll, scan: Scan) -> None:
    for form in ("jsonl", "parquet"):
        source = made(*[OMNICORPUS] * 40, form=form)
        path = Path(source.path) / f"docs-0.{form}"
        source = source.with_changes({"path": str(path)})
        assert len(read_all(source)) == 40  # which compares spans of 16 with the whole
        (file,) = scan(source)
        assert (file.count, file.images) == (40, 80)


def test_a_parquet_of_another_form_is_an_error(made: Make, scan: Scan, tmp_path: Path) -> None:
    source = made(OBELICS, form="parquet")
    path = tmp_path / "raw/docs-0.parquet"
    pq.write_table(pa.table({"texts": [["a"]], "images": ["http://ex.test/a.jpg"]}), path)
    with pytest.raises(ValueError, match=r"docs-0\.parquet: column 'images' is string, not a list of URLs"):
        scan(source)
    pq.write_table(pa.table({"text": ["a"], "image": ["x"]}), path)
    with pytest.raises(ValueError, match=r"docs-0\.parquet has no column 'texts' but text, image"):
        scan(source)
