import bz2
import gzip
import io
import json
import lzma
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vila_ops.config.sources import Html, JsonLines, Llava, Source, Table
from vila_ops.data.inspect.guess import guess

CHAT = [{"from": "human", "value": "?"}, {"from": "gpt", "value": "!"}]
LINES: dict[str, dict[str, Any]] = {
    "llava": {"id": "1", "conversations": CHAT},
    "messages": {"messages": [{"role": "user", "content": "Hi"}]},
    "mmc4": {"url": "http://ex.test/p", "text_list": ["Intro."], "image_info": [], "similarity_matrix": []},
    "flan": {"inputs": "Translate to French: cat", "targets": "chat"},
    "vflan": {"question": "What is it?", "answer": "A cat.", "image": ["QQ=="]},
}
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
TABLES = {
    "flan": {"inputs": ["a"], "targets": ["b"], "_template_idx": [1]},
    "coyo": {"id": [1], "url": ["http://ex.test/c.jpg"], "text": ["a"], "clip_similarity_vitb32": [0.3]},
    "hf_parquet": {"image": pa.array([{"bytes": b"x", "path": "a.png"}], IMAGE), "text": ["a"]},
    "interleaved": {"images": [["http://ex.test/c.jpg", None]], "texts": [[None, "a"]]},
}


@pytest.mark.parametrize("kind", LINES)
@pytest.mark.parametrize("form", ["lines", "blank first", "packed"])
def test_lines_are_told_by_the_keys_of_the_first(kind: str, form: str, tmp_path: Path) -> None:
    line = json.dumps(LINES[kind]).encode()
    content = {"lines": line + b"\n" + line, "blank first": b"\n\n" + line, "packed": gzip.compress(line)}[form]
    path = tmp_path / ("a.jsonl.gz" if form == "packed" else "a.txt")  # what is in it counts
    path.write_bytes(content)
    made = guess(str(path))
    assert (made.kind, made.path) == (kind, str(path))  # type: ignore[union-attr]


@pytest.mark.parametrize("indent", [None, 2])
def test_an_array_is_told_by_its_first_element(indent: int | None, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps([LINES["llava"]] * 3, indent=indent))
    assert guess(str(tmp_path), images="photos") == Llava(path=str(tmp_path), licence="NOASSERTION", images="photos")


@pytest.mark.parametrize("kind", TABLES)
def test_parquet_is_told_by_its_columns(kind: str, tmp_path: Path) -> None:
    pq.write_table(pa.table(TABLES[kind]), tmp_path / "a.parquet")
    assert guess(str(tmp_path)).kind == kind


def test_images_in_a_parquet_file_are_told_from_addresses(tmp_path: Path) -> None:
    """The Cauldron has the columns of OBELICS, with its images in them; others have plain bytes."""
    texts = [[{"user": "?", "assistant": "!", "source": "x"}]]
    images = pa.array([[{"bytes": b"x", "path": None}]], pa.list_(IMAGE))
    for columns in ({"images": images, "texts": texts}, {"jpg": pa.array([b"x"], pa.binary()), "caption": ["a"]}):
        pq.write_table(pa.table(columns), tmp_path / "a.parquet")
        assert guess(str(tmp_path)).kind == "hf_parquet"


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.jsonl.zst", bytes.fromhex("28b52ffd") + b"...", "compressed by zstd; unpack it"),  # RFC 8878
        ("a.jsonl.bz2", bz2.compress(b"{}"), "compressed by bzip2"),
        ("a.jsonl.xz", lzma.compress(b"{}"), "compressed by xz"),
        ("a.csv.gz", gzip.compress(b"image,text\n", mtime=0), "a gzip archive; unpack it"),
        ("a.xls", bytes.fromhex("d0cf11e0a1b11ae1"), "save it as CSV in UTF-8"),
        ("a.json", b'{\n  "mine": {"file_name": "mine.json"}\n}\n', "an object over several lines.* jq -c"),
        # the formats of Alpaca, as in LLaMA-Factory's data folder, and of ms-swift 2
        ("a.json", b'[{"instruction": "Q?", "input": "", "output": "A"}]', "the keys 'instruction', 'input', 'output'"),
        ("a.jsonl", b'{"query": "Q?", "response": "A"}', "the keys 'query', 'response'; a record has `conversations`"),
    ],
)  # fmt: skip
def test_a_file_of_no_format_is_told_for_what_it_is(name: str, content: bytes, told: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"cannot tell the format of .*{told}"):
        guess(str(tmp_path))


def test_a_spreadsheet_is_no_archive_to_unpack(tmp_path: Path) -> None:
    """The members are those of every Open Packaging document (ECMA-376, part 2)."""
    with zipfile.ZipFile(tmp_path / "captions.xlsx", "w") as archive:
        for name in ("[Content_Types].xml", "_rels/.rels", "xl/workbook.xml"):
            archive.writestr(name, "<x/>")
    with pytest.raises(ValueError, match=r"captions\.xlsx is a spreadsheet or another document; save it as CSV"):
        guess(str(tmp_path / "captions.xlsx"))


def test_a_broken_first_line_hides_no_format(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"messages": [{"role": "user", "content": "caf\xe9"}]}\n{"messages": []}\n')
    assert guess(str(tmp_path)).kind == "messages"


def test_a_tar_is_a_webdataset(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "00000.tar", "w") as file:
        info = tarfile.TarInfo("1.txt")
        info.size = 1
        file.addfile(info, io.BytesIO(b"a"))
    assert guess(str(tmp_path)).kind == "webdataset"


def test_pages_and_their_images_are_html(tmp_path: Path) -> None:
    (tmp_path / "p.htm").write_text("<!DOCTYPE html>\n<HTML><body><img src='a.png'>Text</body></HTML>")
    (tmp_path / "q.html").write_text("<h1>Tags may be left out</h1><p>Text")
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n\0")
    assert guess(str(tmp_path)) == Html(path=str(tmp_path), licence="NOASSERTION")


@pytest.mark.parametrize(
    ("header", "more"),
    [("image,text", {}), ("image,question,text", {"question": "question", "render": "conversation"})],
)
def test_a_csv_is_a_table_and_its_images_lie_beside_it(header: str, more: dict[str, str], tmp_path: Path) -> None:
    path = tmp_path / "captions.csv"
    path.write_text(f"{header}\n")
    expected = Table.model_validate({"path": str(path), "licence": "NOASSERTION", "images": str(tmp_path), **more})
    assert guess(str(path)) == expected
    assert guess(str(path), images="photos") == Table.model_validate({**expected.model_dump(), "images": "photos"})


def test_our_own_folder_and_that_of_cc3m_are_told_by_their_files(tmp_path: Path) -> None:
    own, cc3m = tmp_path / "own", tmp_path / "cc3m"
    for folder, names in ((own, ["records.jsonl"]), (cc3m, ["chat.json", "metadata.json"])):
        folder.mkdir()
        for name in names:
            (folder / name).write_text("[]")
    assert guess(str(own)) == JsonLines(path=str(own), render="conversation")
    assert guess(str(cc3m), images="photos").kind == "llava_cc3m"


def test_a_pickle_is_taken_for_vflan_which_refuses_it_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "a.pkl").write_bytes(b"\x80\x04.")
    assert guess(str(tmp_path)).kind == "vflan"


@pytest.mark.parametrize(
    ("files", "told"),
    [
        ({"a.txt": b"notes", "b.png": b"\x89PNG"}, "found nothing that is known; name it with --format: coyo, flan,"),
        ({"a.json": b'[{"b": 1}]'}, "the first record of .*a.json has the keys 'b'"),
        (
            {"a.jsonl": b'{"messages": []}', "b.jsonl": b'{"inputs": "", "targets": ""}'},
            r"flan \(b.jsonl\) and messages",
        ),
        ({".hidden.jsonl": b'{"messages": []}', "a.jsonl.part": b'{"messages": []}'}, "found nothing"),
        ({}, "found nothing"),
    ],
)
def test_what_cannot_be_told_is_an_error_that_lists_the_formats(
    files: dict[str, bytes], told: str, tmp_path: Path
) -> None:
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=told):
        guess(str(tmp_path))


@pytest.mark.parametrize(
    ("uri", "settings", "told"),
    [
        ("ftp://host/a", {}, "ftp://host/a is not read where it lies, as s3, gs, az are"),
        ("s3://", {}, "'s3://' names no bucket; write s3://BUCKET/FOLDER"),
        ("gone", {}, "no such file or folder: gone"),
        (".", {"kind": "lava"}, "no vila_ops.sources of kind 'lava': ours are .*'coyo'"),
        (".", {"kind": "flan", "images": "photos"}, "--images has no effect on the format flan"),
    ],
)
def test_an_argument_that_cannot_be_is_an_error(uri: str, settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        guess(uri, **settings)


def test_a_named_format_wins(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(LINES["flan"]))
    made: Source = guess(str(tmp_path), kind="messages")
    assert made.kind == "messages"


@pytest.mark.parametrize(
    ("name", "content", "settings"),
    [
        ("Flickr8k.token.txt", "1000_6.jpg#0\tA child .\n", {"separator": "tab", "columns": ("image", "text")}),
        ("results_20130124.token", "10009.jpg#0\tTwo men .\n", {"separator": "tab", "columns": ("image", "text")}),
        (
            "results.csv",
            "image_name| comment_number| comment\n10.jpg| 0| Two men\n",
            {"separator": "pipe", "image": "image_name", "text": "comment"},
        ),
        ("captions.txt", "image,caption\n10.jpg,A child .\n", {"separator": "comma", "text": "caption"}),
        (
            "Train_GCC-training.tsv",
            "a bus, red\thttp://ex.test/a\n",
            {"columns": ("text", "url"), "image_url": "url"},
        ),
        ("metadata.csv", "file_name,text\n10.jpg,A\n", {"image": "file_name"}),
        ("q.tsv", "image\tquestion\tanswer\n", {"text": "answer", "question": "question", "render": "conversation"}),
    ],
)
def test_the_first_line_of_a_table_shows_its_settings(
    name: str, content: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    path = tmp_path / name
    path.write_text(content)
    made = guess(str(path))
    assert made == Table.model_validate(
        {"path": str(path), "licence": "NOASSERTION", "images": str(tmp_path), **settings}
    )


@pytest.mark.parametrize("content", ["Notes, of a kind\n", "see http://ex.test/a.jpg\n", "a.jpg\n", "", "\n"])
def test_a_text_is_no_table(content: str, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text(content)
    with pytest.raises(ValueError, match="found nothing that is known"):
        guess(str(tmp_path))


def test_zipped_shards_and_interleaved_documents_are_told(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "docs_shard_0_v2.jsonl.zip", "w") as archive:
        archive.writestr("docs_shard_0_v2.jsonl", json.dumps(LINES["mmc4"]))
    assert guess(str(tmp_path), images="out").kind == "mmc4"
    other = tmp_path / "other"
    other.mkdir()
    (other / "a.jsonl").write_text(json.dumps({"texts": ["a", None], "images": [None, "http://ex.test/a.jpg"]}))
    assert guess(str(other), images="out").kind == "interleaved"


def test_settings_are_given_by_their_dotted_names(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("image,text\n")
    made = guess(str(path), own={"clean.min_words": 2, "clean.scores": {"s": {"at_least": 1}}})
    assert (made.clean.min_words, made.clean.scores["s"].at_least) == (2, 1)
