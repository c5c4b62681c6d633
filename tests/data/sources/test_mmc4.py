import gzip
import json
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vila_ops.config.sources import Mmc4
from vila_ops.data.download.sources import urls_of
from vila_ops.data.raw.files import RawFile
from vila_ops.data.records import Dropped, Image, Record, Turn

Found = list[list[Record | Dropped]]
ReadAll = Callable[[Mmc4], Found]
Scan = Callable[[Mmc4], list[RawFile]]
Download = Callable[[Path, Mapping[str, Any]], None]

# The worked example of MMC4's layout, as its authors' files have it.
EXAMPLE = (
    '{"url":"http://ex.test/p","text_list":["Intro.","A red ball.","The end."],"image_info":[{"image_name":"ab12.jpg",'
    '"raw_url":"http://ex.test/b.jpg","matched_text_index":1,"matched_sim":0.31,"face_detections":null}],'
    '"similarity_matrix":[[0.18,0.31,0.12]],"could_have_url_duplicate":0}'
)
B = "http://ex.test/b.jpg"


def document(sentences: int, *matches: int, **more: Any) -> dict[str, Any]:
    """Image n is at http://ex.test/n.jpg, and n tenths similar to its sentence."""
    infos = [
        {"raw_url": f"http://ex.test/{n}.jpg", "matched_text_index": match, "matched_sim": n / 10}
        for n, match in enumerate(matches)
    ]
    return {
        "url": "http://EX.test/Page",
        "text_list": [f"S{n}." for n in range(sentences)],
        "image_info": infos,
        "similarity_matrix": [[0.0] * sentences for _ in matches],
        **more,
    }


@pytest.fixture
def made(tmp_path: Path, download: Download) -> Callable[..., Mmc4]:
    """A source of lines, with the images 0.jpg to 9.jpg and b.jpg downloaded, or what `became` says instead."""

    def make(*lines: Any, became: Mapping[str, Any] | None = None, **settings: Any) -> Mmc4:
        raw = tmp_path / "raw"
        raw.mkdir(exist_ok=True)
        texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
        (raw / "docs_shard_0_v2.jsonl").write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
        images = {B: b"ball", **{f"http://ex.test/{n}.jpg": b"%d" % n for n in range(10)}}
        download(tmp_path / "images/docs_shard_0_v2", {**images, **(became or {})})
        return Mmc4(path=str(raw), images=str(tmp_path / "images"), licence="ODC-BY-1.0", **settings)

    return make


def parts(found: Found) -> tuple[Any, ...]:
    """Of the only record: images as their bytes."""
    ((record,),) = found
    assert isinstance(record, Record), record
    (turn,) = record.turns
    return tuple(part.data if isinstance(part, Image) else part for part in turn.parts)


def faults(found: Found) -> list[tuple[str, str]]:
    return [(one.reason, one.where) for held in found for one in held if isinstance(one, Dropped)]


def test_the_worked_example_is_text_with_the_image_before_its_sentence(read_all: ReadAll, made: Callable[..., Mmc4]):
    assert read_all(made(EXAMPLE)) == [
        [
            Record(
                id="docs_shard_0_v2.jsonl:1",
                object="http://ex.test/p",
                turns=(Turn("document", ("Intro.", Image(b"ball", {"similarity": 0.31}), "A red ball. The end.")),),
                category="",
                licence="ODC-BY-1.0",
                provenance="docs_shard_0_v2.jsonl:1 http://ex.test/p",
            )
        ]
    ]


def test_the_first_six_images_in_file_order_are_kept_and_stand_by_sentence(
    read_all: ReadAll, made: Callable[..., Mmc4]
):
    source = made(document(4, 3, 0, 1, 1, 2, 0, 3, 0))
    assert parts(read_all(source)) == (b"1", b"5", "S0.", b"2", b"3", "S1.", b"4", "S2.", b"0", "S3.")
    assert parts(read_all(made(document(2, 1, 0), max_images=1))) == ("S0.", b"0", "S1.")


def test_an_image_on_an_empty_last_sentence_stays_as_in_vilas_loader(read_all: ReadAll, made: Callable[..., Mmc4]):
    """The loader appends eos before it looks for an image at the end (llava/data/dataset.py, LazyMMC4Dataset)."""
    assert parts(read_all(made(document(3, 0, 2, text_list=["Intro.", "The end.", ""])))) == (
        b"0", "Intro. The end.", b"1",
    )  # fmt: skip


@pytest.mark.parametrize("form", ["stored", "deflated", "gzip"])
def test_shards_are_read_as_they_are_published(form: str, read_all: ReadAll, made: Callable[..., Mmc4], tmp_path: Path):
    """https://github.com/allenai/mmc4: docs_no_face_shard_N_v2.jsonl.zip."""
    plain = made(EXAMPLE, "", document(2, 1), document(1, 0))
    expected = read_all(plain)
    shard = tmp_path / "raw/docs_shard_0_v2.jsonl"
    text = shard.read_bytes()
    shard.unlink()
    if form == "gzip":
        shard.with_suffix(".jsonl.gz").write_bytes(gzip.compress(text))
    else:
        how = zipfile.ZIP_STORED if form == "stored" else zipfile.ZIP_DEFLATED
        with zipfile.ZipFile(shard.with_suffix(".jsonl.zip"), "w", how) as archive:
            archive.writestr(shard.name, text)
    found = read_all(plain)
    assert [[one.turns for one in held if isinstance(one, Record)] for held in found] == [
        [one.turns for one in held if isinstance(one, Record)] for held in expected
    ]
    assert len(found) == 4
    shard.write_bytes(text)  # unzipped beside its archive
    with pytest.raises(ValueError, match="would share one tar of images; move one away"):
        read_all(plain)


def test_only_images_that_are_similar_enough_are_asked_for(made: Callable[..., Mmc4], tmp_path: Path):
    source = made(document(3, 0, 1, 2), document(1, 0), min_similarity=0.1)
    raw = tmp_path / "raw/docs_shard_0_v2.jsonl"
    assert urls_of(source, raw) == ["http://ex.test/1.jpg", "http://ex.test/2.jpg"]


def test_pairs_are_a_record_each_and_image_first_puts_all_images_in_front(read_all: ReadAll, made: Callable[..., Mmc4]):
    line = document(4, 1, 3)  # text1 img1 text2 text3 img2 text4
    (found,) = read_all(made(line, order="pairs"))
    assert [(one.id, one.turns[0].parts) for one in found if isinstance(one, Record)] == [
        ("docs_shard_0_v2.jsonl:1#0", (Image(b"0", {"similarity": 0.0}), "S1.")),
        ("docs_shard_0_v2.jsonl:1#1", (Image(b"1", {"similarity": 0.1}), "S3.")),
    ]
    assert parts(read_all(made(line, order="image_first"))) == (b"0", b"1", "S0. S1. S2. S3.")


def test_a_document_with_a_image_that_is_not_there_is_dropped_with_the_downloaders_word(
    read_all: ReadAll, made: Callable[..., Mmc4]
):
    gone = {"http://ex.test/7.jpg": "not_found"}  # the eighth, which would not be shown anyway
    source = made(document(1, 0, 0), document(1, *[0] * 8), document(1, 0), became=gone)
    first, (fault,), last = read_all(source)
    assert isinstance(first[0], Record)
    assert isinstance(last[0], Record)
    assert fault == Dropped(
        id="docs_shard_0_v2.jsonl:2",
        reason="not_downloaded",
        where="docs_shard_0_v2.jsonl:2",
        detail="http://ex.test/7.jpg: not_found asked in vain",
        is_bad=False,
    )


def test_or_the_image_alone_is_left_out_and_the_next_takes_its_place(read_all: ReadAll, made: Callable[..., Mmc4]):
    gone = {"http://ex.test/1.jpg": "timeout"}
    source = made(document(4, 0, 1, 2, 3), became=gone, missing_images="drop_image", max_images=2)
    assert parts(read_all(source)) == (b"0", "S0. S1.", b"2", "S2. S3.")
    none = made(document(2, 1), became={"http://ex.test/0.jpg": "timeout"}, missing_images="drop_image")
    assert faults(read_all(none)) == [("no_image", "docs_shard_0_v2.jsonl:1")]


def test_images_below_min_similarity_are_left_out_before_they_are_missed(read_all: ReadAll, made: Callable[..., Mmc4]):
    source = made(document(3, 0, 1, 2), became={"http://ex.test/0.jpg": "dns"}, min_similarity=0.1)
    assert parts(read_all(source)) == ("S0.", b"1", "S1.", b"2", "S2.")


def test_a_image_that_changed_on_the_disk_is_not_taken(read_all: ReadAll, made: Callable[..., Mmc4], tmp_path: Path):
    source = made(EXAMPLE)
    tar = tmp_path / "images/docs_shard_0_v2.tar"
    tar.write_bytes(tar.read_bytes().replace(b"ball", b"bell"))
    ((fault,),) = read_all(source)
    assert isinstance(fault, Dropped)
    assert (fault.reason, "damaged" in fault.detail) == ("not_downloaded", True)


@pytest.mark.parametrize(
    ("line", "reason", "detail"),
    [
        ('{"url": ', "bad_json", ""),
        (EXAMPLE.replace('"url"', '"text_list":[],"url"'), "bad_json", "twice"),
        ("[1]", "not_an_object", "list"),
        ("[" * 100_000, "bad_json", ""),
        (EXAMPLE.replace("0.31,", "NaN,"), "bad_document", "finite"),
        (EXAMPLE.replace("Intro.", "In\\u0000tro."), "nul_in_text", ""),
        (EXAMPLE.replace("Intro.", "\\ud83d Intro."), "lone_surrogate", ""),
        (EXAMPLE.replace("ex.test/b", "ex.test/\\udc00b"), "lone_surrogate", ""),
        (document(0), "bad_document", "text_list"),
        (document(2, 2), "bad_document", "matched_text_index 2, but text_list has 2 sentences"),
        (document(2, -1), "bad_document", "matched_text_index"),
        (document(2, 0, similarity_matrix=[]), "bad_document", "not 1 rows"),
        (document(2, 0, similarity_matrix=[[0.1, 0.2, 0.3]]), "bad_document", "of 2 numbers"),
        (document(2, 0, similarity_matrix=[[0.1, "x"]]), "bad_document", "similarity_matrix.0.1"),
        (document(2, 0, text_list="text"), "bad_document", "text_list"),
        (document(2, 0, text_list=["a", None]), "bad_document", "text_list.1"),
        ({key: value for key, value in document(1, 0).items() if key != "image_info"}, "bad_document", "image_info"),
        (document(1, 0, image_info=[{"raw_url": B, "matched_sim": 0.1}]), "bad_document", "matched_text_index"),
        (document(2), "no_image", ""),
        (document(1, 0, text_list=["  "]), "no_text", "no sentence has a word"),
        (EXAMPLE.replace("b.jpg", "new.jpg"), "not_downloaded", "not_asked"),
    ],
)  # fmt: skip
def test_a_faulty_line_is_dropped_with_its_number_and_its_neighbours_are_not(
    line: Any, reason: str, detail: str, read_all: ReadAll, made: Callable[..., Mmc4]
):
    first, (fault,), blank, last = read_all(made(EXAMPLE, line, "", EXAMPLE))
    assert isinstance(fault, Dropped)
    assert (fault.reason, fault.where) == (reason, "docs_shard_0_v2.jsonl:2")
    assert detail in fault.detail
    assert isinstance(first[0], Record)
    assert isinstance(last[0], Record)
    assert blank == []


def test_bytes_that_are_not_utf_8_are_dropped_with_their_line(
    read_all: ReadAll, made: Callable[..., Mmc4], tmp_path: Path
):
    source = made(EXAMPLE, EXAMPLE)
    raw = tmp_path / "raw/docs_shard_0_v2.jsonl"
    raw.write_bytes(raw.read_bytes().replace(b"Intro", b"Intr\xff", 1))
    assert faults(read_all(source)) == [("invalid_utf8", "docs_shard_0_v2.jsonl:1")]


def test_spans_of_many_lines_are_slices_of_the_whole_and_images_are_counted(
    read_all: ReadAll, scan: Scan, made: Callable[..., Mmc4]
):
    source = made(*(document(2, *[0] * (n % 9)) if n % 7 else "{" for n in range(100)))
    found = read_all(source)  # which compares spans of 16 with the whole
    assert len(found) == 100
    (file,) = scan(source)
    assert file.images == sum(min(6, n % 9) for n in range(100) if n % 7)
    assert len(file.marks) == 7


def test_the_digest_is_of_the_shard_and_its_images_and_of_no_other_file(
    scan: Scan, made: Callable[..., Mmc4], download: Download, tmp_path: Path
):
    source = made(EXAMPLE)
    (before,) = scan(source)
    (tmp_path / "images/notes.txt").write_text("x")
    (tmp_path / "raw/docs_shard_1_v2.jsonl").write_text(EXAMPLE)
    download(tmp_path / "images/docs_shard_1_v2", {B: b"another ball"})
    same, other = scan(source)
    assert same == before
    assert other.digest != before.digest
    made(EXAMPLE, became={B: b"a new ball"})
    assert scan(source)[0].digest != before.digest
    assert scan(source)[1] == other


def test_shards_of_equal_content_have_the_images_of_their_own_names(
    read_all: ReadAll, made: Callable[..., Mmc4], download: Download, tmp_path: Path
):
    source = made(EXAMPLE)
    (tmp_path / "raw/docs_shard_1_v2.jsonl").write_bytes((tmp_path / "raw/docs_shard_0_v2.jsonl").read_bytes())
    download(tmp_path / "images/docs_shard_1_v2", {B: b"another ball"})
    first, second = read_all(source)
    assert [parts([found])[1] for found in (first, second)] == [b"ball", b"another ball"]


def test_a_shard_without_its_download_is_an_error_that_says_what_to_do(
    scan: Scan, made: Callable[..., Mmc4], tmp_path: Path
):
    source = made(EXAMPLE)
    (tmp_path / "images/docs_shard_0_v2.tar").unlink()
    with pytest.raises(ValueError, match=r"no .*docs_shard_0_v2\.tar: .* fetch them with `vila-ops data download`"):
        scan(source)
    with pytest.raises(ValueError, match="raw is where the raw files are; the downloaded images need a folder"):
        scan(Mmc4(path=source.path, images=source.path, licence="x"))


@pytest.mark.slow
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_damaged_lines_are_records_or_drops(read_all: ReadAll, made: Callable[..., Mmc4], tmp_path: Path, data: Any):
    source = made(EXAMPLE) if not (tmp_path / "raw").exists() else None
    source = source or Mmc4(path=str(tmp_path / "raw"), images=str(tmp_path / "images"), licence="x")
    line = bytearray(json.dumps(document(3, 0, 2, 1)).encode())
    for place, value in data.draw(st.lists(st.tuples(st.integers(0, len(line) - 1), st.integers(0, 255)), max_size=3)):
        line[place] = value
    extra = data.draw(st.recursive(st.none() | st.floats() | st.text(max_size=5), st.lists, max_leaves=5))
    field = data.draw(st.sampled_from(["url", "text_list", "image_info", "similarity_matrix"]))
    other = json.dumps(document(3, 0, 2, 1, **{field: extra})).encode()
    whole = json.dumps(document(1, 0)).encode()
    (tmp_path / "raw/docs_shard_0_v2.jsonl").write_bytes(b"\n".join([bytes(line), other, whole]) + b"\n")
    found = read_all(source)
    assert len(found) >= 3
    assert isinstance(found[-1][0], Record)
