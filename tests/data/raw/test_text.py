import json
import math
from pathlib import Path

import pytest

from vila_ops.data.raw.text import MAX_LINE, check_utf8, decoded, fault, json_object
from vila_ops.data.records import Dropped


@pytest.mark.parametrize("text", ["", "a", "ä 犬 🐕", "\ud7ff\ue000", "\u202eright to left", "x" * 10_000_000])
def test_text_that_utf8_can_hold_is_no_fault(text: str) -> None:
    assert fault(text) is None


@pytest.mark.parametrize(
    ("text", "reason"),
    [("a\0b", "nul_in_text"), ("\0", "nul_in_text"), ("\ud800", "lone_surrogate"), ("ä\udfff", "lone_surrogate")],
)
def test_damaged_text_has_a_reason(text: str, reason: str) -> None:
    assert fault(text) == reason


def test_an_object_is_read_as_json_reads_it() -> None:
    line = json.dumps({"a": [1, 2.5, None, True], "ä": {"b": '\ud83d\udc15 \\ "'}}).encode()
    assert json_object(line + b"\r\n", where="f:1") == json.loads(line)
    assert json_object(b"\xef\xbb\xbf" + line, where="f:1") == json.loads(line)


@pytest.mark.parametrize(
    ("line", "reason", "told"),
    [
        (b'{"a": "\xff"}', "invalid_utf8", "byte 8 of the line"),
        (b'{"a": "\xed\xa0\x80"}', "invalid_utf8", "byte 8"),
        (b'{"a": 1', "bad_json", "delimiter"),
        (b'{"a": 1,}', "bad_json", "property name"),
        (b'{"a": 1, "b": {"c": 1, "c": 1}}', "bad_json", "'c' occurs twice"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "bad_json", "recursion"),
        (b'{"a": ' + b"9" * 5000 + b"}", "bad_json", "digits"),
        (b"[1]", "not_an_object", "list"),
        (b"null", "not_an_object", "NoneType"),
        (b'{"a": 1} {"a": 2}', "bad_json", "Extra data"),
    ],
)
def test_a_line_that_is_no_object_is_dropped_with_its_place(line: bytes, reason: str, told: str) -> None:
    found = json_object(line, where="docs/a.jsonl:17")
    assert isinstance(found, Dropped)
    assert (found.reason, found.where) == (reason, "docs/a.jsonl:17")
    assert told in found.detail


def test_numbers_that_python_writes_for_missing_ones_are_read() -> None:
    """json.dumps writes NaN and Infinity, which RFC 8259 does not have; img2dataset's files have them."""
    line = json.dumps({"similarity": float("nan"), "width": float("inf"), "caption": "a cup"}).encode()
    value = json_object(line, where="f:1")
    assert isinstance(value, dict)
    assert math.isnan(value["similarity"])
    assert (value["width"], value["caption"]) == (math.inf, "a cup")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("text", ["image,text\n", '{"a": 1}\n', "[\n"])
def test_a_file_in_utf_16_is_refused_with_the_command_that_converts_it(encoding: str, text: str) -> None:
    with pytest.raises(ValueError, match=r"a\.csv is text in UTF-16.*iconv -f UTF-16 -t UTF-8 a\.csv > "):
        check_utf8((text + "more").encode(encoding), Path("raw/a.csv"))


@pytest.mark.parametrize(
    "head", [b"", b"a", b"\xef\xbb\xbfimage", b"image,text", b"\0\0\0\0", b"a\0", "ä,ö".encode(), b"\0i\0age,text,a,b"]
)
def test_other_files_are_not_taken_for_utf_16(head: bytes) -> None:
    check_utf8(head, Path("a.csv"))


def test_text_with_a_mark_of_utf_16_is_decoded() -> None:
    assert decoded("Ein Bär 🐻".encode("utf-16")) == decoded("Ein Bär 🐻".encode("utf-8-sig")) == "Ein Bär 🐻"


def test_a_record_without_end_is_not_parsed() -> None:
    dropped = json_object(b'{"a": "' + b"x" * MAX_LINE, where="f:1")
    assert isinstance(dropped, Dropped)
    assert dropped.reason == "oversized"
