import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from vila_ops.config.sources import Table
from vila_ops.data.raw.files import RawFile
from vila_ops.data.records import Dropped, Image, Record, Turn

ReadAll = Callable[[Table], list[list[Record | Dropped]]]
Scan = Callable[[Table], list[RawFile]]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    (folder / "sub").mkdir(parents=True)
    for name in ("Dog.jpg", "sub/cat.jpg"):
        (folder / name).write_bytes(name.encode())
    return folder


def table(path: Path, images: Path, **settings: Any) -> Table:
    return Table(path=str(path), images=str(images), licence="CC0-1.0", **settings)


def write(folder: Path, content: str | bytes, name: str = "captions.csv") -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def caption(name: str, text: str, line: int, **changed: Any) -> Record:
    place = f"captions.csv:{line}"
    facts: dict[str, Any] = {
        "id": place,
        "object": Path(name).name.lower(),
        "turns": (Turn("document", (Image(name.encode()), text)),),
        "category": "",
        "licence": "CC0-1.0",
        "provenance": place,
    }
    return Record(**{**facts, **changed})


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_row_is_a_image_and_its_caption(
    mark: bytes, end: str, tmp_path: Path, images: Path, read_all: ReadAll
) -> None:
    lines = ["image,text", "Dog.jpg,A dog.", 'sub/cat.jpg,"A cat, ""Tom"".\nOn a mat."', "", "Dog.jpg,Ein Hünd.", ""]
    path = write(tmp_path, mark + end.join(lines).encode())
    assert read_all(table(path, images)) == [
        [caption("Dog.jpg", "A dog.", 2)],
        [caption("sub/cat.jpg", 'A cat, "Tom".\nOn a mat.', 3)],
        [],
        [caption("Dog.jpg", "Ein Hünd.", 6)],
    ]


def test_tabs_part_a_tsv_and_columns_may_have_other_names(tmp_path: Path, images: Path, read_all: ReadAll) -> None:
    path = write(tmp_path, "caption\tfile\nA dog, brown.\tDog.jpg\n", "captions.tsv")
    ((record,),) = read_all(table(path, images, image="file", text="caption"))
    assert isinstance(record, Record)
    assert record.turns == (Turn("document", (Image(b"Dog.jpg"), "A dog, brown.")),)


def test_further_columns_are_licence_address_and_scores(tmp_path: Path, images: Path, read_all: ReadAll) -> None:
    header = "image,text,clip,width,note,licence,url,nan"
    path = write(
        tmp_path, f"{header}\nDog.jpg,A dog.,0.31,640,good,CC-BY-4.0,http://ex.test/d.jpg,nan\nDog.jpg,B,,,,,,\n"
    )
    (first,), (second,) = read_all(table(path, images))
    assert isinstance(first, Record)
    assert first.scores == {"clip": 0.31, "width": 640.0}
    assert first.licence == "CC-BY-4.0"
    assert first.provenance == "captions.csv:2 http://ex.test/d.jpg"
    assert second == caption("Dog.jpg", "B", 3)


def test_with_a_question_a_row_is_a_conversation(tmp_path: Path, images: Path, read_all: ReadAll) -> None:
    path = write(tmp_path, "image,q,a\nDog.jpg,What is it?,A dog.\nDog.jpg,,A dog.\n")
    asked = table(path, images, question="q", text="a", render="conversation")
    (record,), (dropped,) = read_all(asked)
    assert isinstance(record, Record)
    assert record.turns == (Turn("user", (Image(b"Dog.jpg"), "What is it?")), Turn("assistant", ("A dog.",)))
    assert isinstance(dropped, Dropped)
    assert (dropped.reason, dropped.where) == ("no_text", "captions.csv:3")


@pytest.mark.parametrize("settings", [{"question": "q"}, {"render": "conversation"}])
def test_a_question_without_conversation_has_no_effect_and_is_refused(settings: dict[str, str]) -> None:
    with pytest.raises(ValidationError, match="question and render conversation need each other"):
        table(Path("a.csv"), Path("photos"), **settings)


@pytest.mark.parametrize(
    ("row", "reason", "told"),
    [
        (b"Dog.jpg,", "no_text", "is empty"),
        (b"Dog.jpg, ", "no_text", "is empty"),
        (b"gone.jpg,A dog.", "missing_image", "no file 'gone.jpg'"),
        (b"../captions.csv,A dog.", "bad_image_path", "without '..'"),
        (b"/etc/passwd,A dog.", "bad_image_path", "not a path inside"),
        (b",A dog.", "bad_image_path", "'' is not a path"),
        (b"Dog.jpg", "bad_row", "1 fields, but 2 columns"),
        (b"Dog.jpg,A dog, brown.", "bad_row", "3 fields, but 2 columns"),
        (b'Dog.jpg,"A dog" brown', "bad_csv", "expected after"),
        (b"Dog.jpg,A dog\rbrown", "bad_csv", "new-line"),
        (b"Dog.jpg,\xff", "invalid_utf8", "save the file in UTF-8"),
        (b"Dog.jpg,A\0dog", "nul_in_text", "column 'text'"),
    ],
)
def test_a_faulty_row_is_dropped_with_its_line_and_stops_no_other(
    row: bytes, reason: str, told: str, tmp_path: Path, images: Path, read_all: ReadAll
) -> None:
    path = write(tmp_path, b'image,text\nDog.jpg,"Two\nlines."\n' + row + b"\nDog.jpg,A dog.\n")
    before, (dropped,), after = read_all(table(path, images))
    assert before == [caption("Dog.jpg", "Two\nlines.", 2)]
    assert after == [caption("Dog.jpg", "A dog.", 5)]
    assert isinstance(dropped, Dropped)
    assert (dropped.id, dropped.reason, dropped.where) == ("captions.csv:4", reason, "captions.csv:4")
    assert told in dropped.detail


def test_a_quote_that_is_never_closed_is_told_where_it_opens(tmp_path: Path, images: Path, read_all: ReadAll) -> None:
    path = write(tmp_path, 'image,text\nDog.jpg,A dog.\nDog.jpg,"A dog.\nDog.jpg,B\nDog.jpg,C\n')
    _, (dropped,) = read_all(table(path, images))
    assert isinstance(dropped, Dropped)
    assert (dropped.reason, dropped.where) == ("bad_csv", "captions.csv:3")
    assert "never closed" in dropped.detail


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (
            "photo,text\nDog.jpg,A\n",
            r"captions\.csv has no column 'image'; it has 'photo', 'text'; name the columns in",
        ),
        ("image;text\nDog.jpg;A\n", "separated by semicolons: save it with commas"),
        ("image,text,image\n", "captions.csv:1: a table begins with the names of its columns, each once"),
        ("", "captions.csv:1: a table begins"),
        ("\n", "captions.csv:1: a table begins"),
        ('"image" x,text\n', "captions.csv:1: the header cannot be read"),
    ],
)
def test_a_header_without_the_columns_is_an_error(
    content: str, told: str, tmp_path: Path, images: Path, scan: Scan
) -> None:
    with pytest.raises(ValueError, match=told):
        scan(table(write(tmp_path, content), images))


def test_long_tables_are_read_by_spans_as_by_the_csv_module(tmp_path: Path, images: Path, read_all: ReadAll) -> None:
    texts = [f"Line {n}\n" * (n % 4 + 1) + '"quoted", ä' for n in range(100)]
    path = tmp_path / "captions.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([["image", "text"], *[["Dog.jpg", text] for text in texts]])
    found = read_all(table(path, images))
    assert [record.turns[0].parts[1] for (record,) in found if isinstance(record, Record)] == texts


def test_a_field_of_ten_megabytes_is_kept(tmp_path: Path, images: Path, read_all: ReadAll) -> None:
    ((record,),) = read_all(table(write(tmp_path, "image,text\nDog.jpg," + "x" * 10_000_000), images))
    assert isinstance(record, Record)
    assert record.turns[0].parts[1] == "x" * 10_000_000


def test_the_digest_is_that_of_the_rows_and_their_images(tmp_path: Path, images: Path, scan: Scan) -> None:
    ours = table(write(tmp_path, "image,text\nDog.jpg,A dog.\nDog.jpg,A dog.\n../x,B\n"), images)
    (before,) = scan(ours)
    assert (before.count, before.images) == (3, 2)
    (images / "sub/cat.jpg").write_bytes(b"not named")
    assert scan(ours) == [before]
    (images / "Dog.jpg").write_bytes(b"another dog")
    assert scan(ours)[0].digest != before.digest
