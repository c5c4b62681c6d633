import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vila_ops.config.sources import Coyo
from vila_ops.data.raw.files import RawFile
from vila_ops.data.records import Dropped, Image, Record, Turn

Found = list[list[Record | Dropped]]
ReadAll = Callable[[Coyo], Found]
Scan = Callable[[Coyo], list[RawFile]]
Download = Callable[[Path, Mapping[str, Any]], None]

# The columns of COYO-700M's card, in their types.
SCHEMA = pa.schema(
    {
        "id": pa.int64(), "url": pa.string(), "text": pa.string(), "width": pa.int32(), "height": pa.int32(),
        "image_phash": pa.string(), "text_length": pa.int32(), "word_count": pa.int32(),
        "num_tokens_bert": pa.int32(), "num_tokens_gpt": pa.int32(), "num_faces": pa.int32(),
        "clip_similarity_vitb32": pa.float32(), "clip_similarity_vitl14": pa.float32(),
        "nsfw_score_opennsfw2": pa.float32(), "nsfw_score_gantman": pa.float32(), "watermark_score": pa.float32(),
        "aesthetic_score_laion_v2": pa.float32(),
    }
)  # fmt: skip


def row(number: int, **more: Any) -> dict[str, Any]:
    numbers = {field.name: 0.5 if pa.types.is_floating(field.type) else 7 for field in SCHEMA}
    texts = {"id": 7000 + number, "url": f"http://EX.test/{number}.jpg", "image_phash": "b3", "text": f"tree {number}"}
    return {**numbers, **texts, **more}


def image(number: int) -> tuple[str, bytes]:
    return f"http://EX.test/{number}.jpg", b"image %d" % number


@pytest.fixture
def made(tmp_path: Path, download: Download) -> Callable[..., Coyo]:
    """A source of rows in row groups of ten, with an image of each, or what `became` says instead."""

    def make(*rows: dict[str, Any], became: Mapping[str, Any] | None = None, name: str = "part-0") -> Coyo:
        (tmp_path / "raw").mkdir(exist_ok=True)
        table = pa.Table.from_pylist(list(rows), schema=SCHEMA)
        pq.write_table(table, tmp_path / f"raw/{name}.parquet", row_group_size=10)
        download(tmp_path / f"images/{name}", {**dict(map(image, range(len(rows)))), **(became or {})})
        return Coyo(path=str(tmp_path / "raw"), images=str(tmp_path / "images"), licence="CC-BY-4.0")

    return make


def test_a_row_is_a_captioned_image_with_its_columns_of_numbers_as_scores(read_all: ReadAll, made: Callable[..., Coyo]):
    scores = {"watermark_score": None, "nsfw_score_gantman": float("nan"), "width": 640}
    assert read_all(made(row(0, text=" a green tree\n", **scores))) == [
        [
            Record(
                id="part-0.parquet:1",
                object="http://ex.test/0.jpg",
                turns=(Turn("document", (Image(b"image 0"), "a green tree")),),
                category="",
                licence="CC-BY-4.0",
                provenance="part-0.parquet:1 http://EX.test/0.jpg",
                scores={
                    "width": 640, "height": 7, "text_length": 7, "word_count": 7, "num_tokens_bert": 7,
                    "num_tokens_gpt": 7, "num_faces": 7, "clip_similarity_vitb32": 0.5,
                    "clip_similarity_vitl14": 0.5, "nsfw_score_opennsfw2": 0.5, "aesthetic_score_laion_v2": 0.5,
                },
            )
        ]
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("more", "reason", "detail"),
    [
        ({"url": "http://ex.test/dead.jpg"}, "not_downloaded", "http://ex.test/dead.jpg: not_found asked in vain"),
        ({"url": "http://ex.test/new.jpg"}, "not_downloaded", "not_asked"),
        ({"url": None}, "no_url", ""),
        ({"text": None}, "no_text", ""),
        ({"text": " "}, "no_text", ""),
        ({"text": "a\0b"}, "nul_in_text", "alt text"),
    ],
)
def test_a_faulty_row_is_dropped_with_its_number_and_its_neighbours_are_not(
    more: dict[str, Any], reason: str, detail: str, read_all: ReadAll, made: Callable[..., Coyo]
):
    dead = {"http://ex.test/dead.jpg": "not_found"}
    first, (fault,), last = read_all(made(row(0), row(1, **more), row(2), became=dead))
    assert isinstance(fault, Dropped)
    assert (fault.reason, fault.where) == (reason, "part-0.parquet:2")
    assert detail in fault.detail
    assert isinstance(first[0], Record)
    assert isinstance(last[0], Record)


def test_a_row_that_a_rule_drops_or_whose_image_is_missing_keeps_its_scores(
    read_all: ReadAll, made: Callable[..., Coyo]
):
    """They take part in the ranking of top_share, so it is the same before and after the download."""
    gone = {image(1)[0]: "not_found"}
    rules = {"scores": {"watermark_score": {"at_most": 0.5}}}
    source = made(row(0, watermark_score=0.9), row(1), row(2), became=gone).with_changes({"clean": rules})
    (marked,), (lost,), (good,) = read_all(source)
    assert isinstance(marked, Dropped)
    assert isinstance(lost, Dropped)
    assert isinstance(good, Record)
    assert (marked.reason, marked.is_bad) == ("high_watermark_score", False)
    assert (lost.reason, lost.is_bad) == ("not_downloaded", False)
    assert marked.scores["clip_similarity_vitb32"] == lost.scores["clip_similarity_vitb32"] == 0.5


def test_text_that_is_not_utf_8_costs_its_row_only(read_all: ReadAll, made: Callable[..., Coyo], tmp_path: Path):
    source = made(row(0), row(1), row(2))
    table = pa.Table.from_pylist([row(0), row(1), row(2)], schema=SCHEMA)
    offsets, data = pa.array([0, 2, 5, 7], pa.int32()).buffers()[1], pa.py_buffer(b"okb\xffdok")
    broken = pa.Array.from_buffers(pa.string(), 3, [None, offsets, data])
    pq.write_table(table.set_column(2, "text", broken), tmp_path / "raw/part-0.parquet")
    found = [one for held in read_all(source) for one in held]
    assert [one.reason if isinstance(one, Dropped) else one.turns[0].parts[1] for one in found] == [
        "ok",
        "invalid_utf8",
        "ok",
    ]


def test_spans_are_slices_of_the_whole_across_row_groups(read_all: ReadAll, scan: Scan, made: Callable[..., Coyo]):
    source = made(*map(row, range(53)))
    found = read_all(source)  # which compares spans of 16 with the whole
    assert [one.turns[0].parts[1] for (one,) in found if isinstance(one, Record)] == [f"tree {n}" for n in range(53)]
    (file,) = scan(source)
    assert (file.count, file.images) == (53, 53)


def test_a_new_shard_leaves_the_digests_of_others_alone_but_a_new_image_does_not(scan: Scan, made: Callable[..., Coyo]):
    (before,) = scan(made(row(0)))
    same, other = scan(made(row(0), name="part-1"))
    assert same == before
    changed, _ = scan(made(row(0), became={image(0)[0]: b"another"}))
    assert changed.digest != before.digest
    assert other.count == 1


def test_the_downloads_may_lie_in_a_folder_inside(scan: Scan, made: Callable[..., Coyo], tmp_path: Path):
    made(row(0))
    (tmp_path / "images").rename(tmp_path / "raw/images")
    source = Coyo(path=str(tmp_path / "raw"), images=str(tmp_path / "raw/images"), licence="x")
    assert [file.name for file in scan(source)] == ["part-0.parquet"]


def test_a_file_of_another_form_is_an_error_that_names_it(scan: Scan, made: Callable[..., Coyo], tmp_path: Path):
    source = made(row(0))
    path = tmp_path / "raw/part-0.parquet"
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    with pytest.raises(ValueError, match=r"part-0\.parquet is not a readable Parquet file"):
        scan(source)
    pq.write_table(pa.table({"url": ["http://ex.test/a.jpg"], "caption": ["x"]}), path)
    with pytest.raises(ValueError, match=r"part-0\.parquet has no column 'text' of text, but url, caption"):
        scan(source)


def test_a_download_that_is_not_one_is_an_error(read_all: ReadAll, made: Callable[..., Coyo], tmp_path: Path):
    source = made(row(0))
    (tmp_path / "images/part-0.parquet").write_bytes(b"PAR1 is cut off")
    with pytest.raises(ValueError, match="is not a manifest of"):
        read_all(source)


def written() -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([*map(row, range(30))], schema=SCHEMA), out, row_group_size=10)
    return out.getvalue()


WHOLE = written()


@pytest.mark.slow
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(places=st.lists(st.tuples(st.integers(0, len(WHOLE) - 1), st.integers(0, 255)), min_size=1, max_size=3))
def test_a_damaged_file_is_records_drops_or_an_error(
    places: list[tuple[int, int]], read_all: ReadAll, made: Callable[..., Coyo], tmp_path: Path
):
    if not (tmp_path / "raw").exists():
        made(*map(row, range(30)))
    data = bytearray(WHOLE)
    for place, value in places:
        data[place] = value
    (tmp_path / "raw/part-0.parquet").write_bytes(data)
    source = Coyo(path=str(tmp_path / "raw"), images=str(tmp_path / "images"), licence="x")
    try:
        found = read_all(source)
    except ValueError:
        return
    assert all(len(held) == 1 for held in found)
