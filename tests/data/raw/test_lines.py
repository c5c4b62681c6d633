"""Files of lines, plain and compressed: the standard library's archives hold what was put in."""

import gzip
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from vila_ops.data.raw import lines as module
from vila_ops.data.raw.files import Span
from vila_ops.data.raw.lines import every_line, lines

TEXT = b'{"a": 1}\n\n{"b": "\xc3\xa4"}\n{"c": 3}'
LINES = [(0, b'{"a": 1}\n'), (9, b"\n"), (10, b'{"b": "\xc3\xa4"}\n'), (22, b'{"c": 3}')]


def zipped(path: Path, *members: tuple[str, bytes], how: int = zipfile.ZIP_DEFLATED) -> None:
    with zipfile.ZipFile(path, "w", how) as archive:
        for name, content in members:
            archive.writestr(name, content)


FORMS: dict[str, Callable[[Path], object]] = {
    "plain": lambda path: path.write_bytes(TEXT),
    "gzip": lambda path: path.write_bytes(gzip.compress(TEXT)),
    "stored": lambda path: zipped(path, ("docs_shard_0_v2.jsonl", TEXT), how=zipfile.ZIP_STORED),
    "deflated": lambda path: zipped(path, ("docs_shard_0_v2.jsonl", TEXT)),
    "of a Mac": lambda path: zipped(path, ("docs/a.jsonl", TEXT), ("docs/", b""), ("__MACOSX/docs/._a.jsonl", b"x")),
}


@pytest.mark.parametrize("form", FORMS)
def test_lines_and_their_offsets_are_those_of_the_inflated_text(form: str, tmp_path: Path) -> None:
    path = tmp_path / "a.data"  # the first bytes say what it is
    FORMS[form](path)
    assert list(every_line(path)) == LINES
    span = Span(name="a.data", path=str(path), digest="", start=2, stop=9, mark=10)
    assert list(lines(span)) == [("a.data:3", LINES[2][1]), ("a.data:4", LINES[3][1])]


@pytest.mark.parametrize(
    ("members", "told"),
    [([], "holds 0 files"), ([("a.jsonl", TEXT), ("b.jsonl", TEXT)], "holds 2 files, .*; unpack it")],
)
def test_a_zip_of_several_files_is_refused(members: list[tuple[str, bytes]], told: str, tmp_path: Path) -> None:
    zipped(tmp_path / "a.zip", *members)
    if not members:
        (tmp_path / "a.zip").write_bytes(b"PK\x03\x04" + (tmp_path / "a.zip").read_bytes())
    with pytest.raises(ValueError, match=told):
        list(every_line(tmp_path / "a.zip"))


def test_an_encrypted_zip_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    zipped(path, ("a.jsonl", TEXT))
    data = bytearray(path.read_bytes())
    data[data.find(b"PK\x01\x02") + 8] |= 1  # general purpose bit 0 of the central directory (APPNOTE.TXT 4.3.12)
    path.write_bytes(data)
    with pytest.raises(ValueError, match="is encrypted; unpack it"):
        list(every_line(path))


@pytest.mark.parametrize("form", ["gzip", "stored", "deflated"])
def test_damage_is_an_error_that_names_the_file_or_is_lines(form: str, tmp_path: Path) -> None:
    FORMS[form](tmp_path / "whole")
    whole = (tmp_path / "whole").read_bytes()
    refused = 0
    for place in range(4, len(whole)):
        for damaged in (whole[:place], whole[:place] + bytes([whole[place] ^ 0x5A]) + whole[place + 1 :]):
            (tmp_path / "a.jsonl").write_bytes(damaged)
            try:
                list(every_line(tmp_path / "a.jsonl"))
            except ValueError as error:
                refused += "a.jsonl" in str(error)
    assert refused > len(whole)


def test_a_line_without_end_is_cut_and_those_after_it_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_LINE", 10)
    (tmp_path / "a.jsonl").write_bytes(b"x" * 25 + b"\n" + b"y" * 10 + b"\nend\n" + b"z" * 10)
    found = list(every_line(tmp_path / "a.jsonl"))
    assert found == [(0, b"x" * 10), (26, b"y" * 10), (37, b"end\n"), (41, b"z" * 10)]


def test_utf_16_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n', encoding="utf-16")
    with pytest.raises(ValueError, match=r"a\.jsonl is text in UTF-16"):
        list(every_line(tmp_path / "a.jsonl"))
