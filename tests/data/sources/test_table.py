import csv
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from vila_ops.config.sources import Table
from vila_ops.data.download.sources import urls_of
from vila_ops.data.inspect.guess import guess
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
    _, (dropped, *swallowed) = read_all(table(path, images))
    assert isinstance(dropped, Dropped)
    assert (dropped.reason, dropped.where) == ("bad_csv", "captions.csv:3")
    assert "never closed" in dropped.detail
    assert [(one.reason, one.where) for one in swallowed if isinstance(one, Dropped)] == [
        ("bad_csv", "captions.csv:4"),
        ("bad_csv", "captions.csv:5"),
    ]


def rows_with(fault: str, separator: str) -> str:
    """A thousand rows, of which row 100 has a quote in its caption."""
    lines = [f"Dog.jpg{separator}Dog number {number}" for number in range(1, 1001)]
    lines[99] = f"Dog.jpg{separator}{fault}"
    return "\n".join([f"image{separator}text", *lines]) + "\n"


def test_a_quote_is_a_character_of_a_tsv(tmp_path: Path, images: Path, read_all: ReadAll) -> None:
    """IANA's text/tab-separated-values: a field is any characters but a tab and the end of a line."""
    path = write(tmp_path, rows_with('"Wow, a red one', "\t"), "captions.tsv")
    found = read_all(table(path, images))
    texts = [record.turns[0].parts[1] for (record,) in found if isinstance(record, Record)]
    assert len(texts) == 1000
    assert texts[99] == '"Wow, a red one'
    pandas = write(tmp_path, 'image\ttext\nDog.jpg\t"It says ""hi"".\n"\n', "pandas.tsv")
    ((record,),) = read_all(table(pandas, images, quotes=True))
    assert isinstance(record, Record)
    assert record.turns[0].parts[1] == 'It says "hi".\n'


@pytest.mark.parametrize(
    ("last", "bad", "good"),
    [
        ("Dog number 1000", 901, 99),  # never closed: every line to the end
        ('a dog "Rex', 901, 99),  # closed in the last row, whose quote belongs to its text
        ('a dog",', 900, 99),  # closed so that the row has three fields
        ('a dog"', 901, 99),  # closed where a quote may close: one row of two fields, with 900 rows in it
    ],
)
def test_lines_that_a_quote_swallows_are_bad_records(
    last: str, bad: int, good: int, tmp_path: Path, images: Path, read_all: ReadAll
) -> None:
    content = rows_with('"Wow, a red one', ",").replace("Dog number 1000", last)
    found = [one for held in read_all(table(write(tmp_path, content), images)) for one in held]
    dropped = [one for one in found if isinstance(one, Dropped)]
    assert {one.reason for one in dropped} <= {"bad_csv", "bad_row"}
    assert [one.where for one in dropped] == [f"captions.csv:{line}" for line in range(101, 1002)][:bad]
    assert (len(dropped), len(found) - len(dropped)) == (bad, good)


def test_names_are_absolute_or_in_the_other_unicode_form(tmp_path: Path, images: Path, read_all: ReadAll) -> None:
    (images / unicodedata.normalize("NFD", "Hünd é.jpg")).write_bytes(b"nfd")
    names = [str(images / "sub/cat.jpg"), unicodedata.normalize("NFC", "Hünd é.jpg"), str(tmp_path / "photos2/a.jpg")]
    rows = "".join(f"{name},A\n" for name in names)
    (cat,), (hound,), (outside,) = read_all(table(write(tmp_path, f"image,text\n{rows}"), images))
    assert isinstance(cat, Record)
    assert isinstance(hound, Record)
    assert (cat.turns[0].parts[0], hound.turns[0].parts[0]) == (Image(b"sub/cat.jpg"), Image(b"nfd"))
    assert cat.object == "cat.jpg"
    assert isinstance(outside, Dropped)
    assert outside.reason == "bad_image_path"


def test_a_lone_quote_between_pipes_costs_a_row_or_is_text(tmp_path: Path, images: Path, read_all: ReadAll) -> None:
    """github.com/pandas-dev/pandas/issues/22140: Str3|3|"|num3, after which pandas reads nothing."""
    path = write(tmp_path, 'image|text|n\nDog.jpg|A|1\nDog.jpg|"|2\nDog.jpg|C|3\n', "captions.psv")
    quoted = [one for held in read_all(table(path, images, separator="pipe")) for one in held]
    assert [type(one) for one in quoted] == [Record, Dropped, Dropped]
    plain = read_all(table(path, images, separator="pipe", quotes=False))
    assert [record.turns[0].parts[1] for (record,) in plain if isinstance(record, Record)] == ["A", '"', "C"]


def test_an_end_of_file_of_dos_inside_quotes_ends_nothing(tmp_path: Path, images: Path, read_all: ReadAll) -> None:
    """github.com/pandas-dev/pandas/issues/16559."""
    ((record,),) = read_all(table(write(tmp_path, 'image,text\r\nDog.jpg,"test \x1a    test"\r\n'), images))
    assert record == caption("Dog.jpg", "test \x1a    test", 2)


def test_a_caption_of_several_lines_swallows_nothing(tmp_path: Path, images: Path, read_all: ReadAll) -> None:
    text = "A dog,\na cat,\ngone.jpg,a bird\n\nand Dog.jpg"
    ((record,),) = read_all(table(write(tmp_path, f'image,text\nDog.jpg,"{text}"\n'), images))
    assert record == caption("Dog.jpg", text, 2)


# The first lines of the tables as they are published: Flickr8k.token.txt and results_20130124.token (tabs, captions
# numbered), Kaggle's captions.txt and results.csv, and Train_GCC-training.tsv of Conceptual Captions.
PUBLISHED = {
    "Flickr8k.token.txt": ("Dog.jpg#0\tA dog runs .\nDog.jpg#1\tA brown dog .\n", ["A dog runs .", "A brown dog ."]),
    "results_20130124.token": ('Dog.jpg#0\tTwo "good" dogs .\n', ['Two "good" dogs .']),
    "captions.txt": ('image,caption\nDog.jpg,A dog .\nDog.jpg,"A dog , brown ."\n', ["A dog .", "A dog , brown ."]),
    "results.csv": (
        "image_name| comment_number| comment\nDog.jpg| 0| A dog .\nDog.jpg| 1| A dog , brown .\n",
        ["A dog .", "A dog , brown ."],
    ),
    "metadata.csv": ("file_name,text\nsub/cat.jpg,A cat.\n", ["A cat."]),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_tables_are_read_as_they_are(name: str, tmp_path: Path, images: Path, read_all: ReadAll) -> None:
    content, texts = PUBLISHED[name]
    ours = guess(str(write(tmp_path, content, name)), images=str(images))
    assert isinstance(ours, Table)
    found = read_all(ours)
    assert [record.turns[0].parts[1] for (record,) in found if isinstance(record, Record)] == texts
    assert len(texts) == len(found)


def test_images_by_url_come_from_the_downloader(
    tmp_path: Path, read_all: ReadAll, download: Callable[[Path, Any], None]
) -> None:
    rows = "a very typical bus station\thttp://ex.test/bus.jpg\nsierra looked stunning\thttp://ex.test/Gone.jpg\n"
    path = write(tmp_path, rows, "Train_GCC-training.tsv")
    out = tmp_path / "out"
    download(out / "Train_GCC-training", {"http://ex.test/bus.jpg": b"bus", "http://ex.test/Gone.jpg": "not_found"})
    ours = guess(str(path), images=str(out))
    assert isinstance(ours, Table)
    assert (ours.columns, ours.image_url) == (("text", "url"), "url")
    assert urls_of(ours, path) == ["http://ex.test/bus.jpg", "http://ex.test/Gone.jpg"]
    (bus,), (gone,) = read_all(ours)
    assert isinstance(bus, Record)
    assert bus.turns == (Turn("document", (Image(b"bus"), "a very typical bus station")),)
    assert bus.provenance == "Train_GCC-training.tsv:1 http://ex.test/bus.jpg"
    assert isinstance(gone, Dropped)
    assert (gone.reason, gone.is_bad) == ("not_downloaded", False)


def test_an_ending_that_says_nothing_needs_a_separator(tmp_path: Path, images: Path, read_all: ReadAll) -> None:
    path = write(tmp_path, "image;text\nDog.jpg;A dog, brown.\n", "captions.dat")
    with pytest.raises(ValueError, match=r"captions\.dat ends neither in \.csv nor in \.tsv; .*separator=tab"):
        read_all(table(path, images))
    ((record,),) = read_all(table(path, images, separator="semicolon"))
    assert isinstance(record, Record)
    assert record.turns[0].parts[1] == "A dog, brown."


@pytest.mark.parametrize(
    ("content", "told"),
    [
        # pandas-dev/pandas#47303, mechatroner/vscode_rainbow_csv#108
        (
            b"sep=;\r\nimage;text\r\na.jpg;A dog\r\n",
            "'sep=;' is a note for Excel; remove this line, and set",
        ),
        # mholt/PapaParse#43, WarrenWilkinson/read-csv#7
        (b"image,text\ra.jpg,A dog\r", r"end with CR alone, as on old Macs: tr '\\r' '\\n' < FILE > NEW_FILE"),
    ],
)
def test_tables_of_spreadsheets_are_refused_with_the_way_out(
    content: bytes, told: str, tmp_path: Path, read_all: ReadAll
) -> None:
    (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(ValueError, match=told):
        read_all(Table(path=str(tmp_path / "a.csv"), images=str(tmp_path), licence="MIT"))


def test_a_table_in_utf_16_is_refused_with_the_way_out(tmp_path: Path, images: Path, scan: Scan) -> None:
    path = write(tmp_path, "image,text\nDog.jpg,Ein Hünd.\n".encode("utf-16"))
    with pytest.raises(ValueError, match=r"captions\.csv is text in UTF-16.*iconv -f UTF-16 -t UTF-8"):
        scan(table(path, images))


def test_columns_that_name_one_twice_are_refused() -> None:
    with pytest.raises(ValidationError, match="columns names a column twice"):
        table(Path("a.csv"), Path("photos"), columns=["image", "image"])


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (
            "photo,text\nDog.jpg,A\n",
            r"captions\.csv has no column 'image'; it has 'photo', 'text'; name the columns in",
        ),
        ("image;text\nDog.jpg;A\n", "separated by semicolons: set `separator: semicolon`"),
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
