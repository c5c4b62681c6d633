import json
import random
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vila_ops.data.raw import json_array
from vila_ops.data.raw.json_array import Broken, elements, is_array

TEXT = st.text(st.characters(codec="utf-8"), max_size=30) | st.sampled_from(
    ['"', "\\", "],[", "}{", '\\"', "\u2028", "犬🐕"]
)
NUMBERS = st.integers() | st.floats(allow_nan=False, allow_infinity=False)
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=12,
)


def values(path: Path, **options: Any) -> list[Any]:
    return [value for _, value in elements(path, **options)]


def written(folder: Path, content: bytes) -> Path:
    path = folder / "a.json"
    path.write_bytes(content)
    return path


@pytest.mark.slow
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    document=st.lists(VALUES, max_size=8),
    indent=st.sampled_from([None, 0, 1, 4, "\t"]),
    ascii_only=st.booleans(),
    marked=st.booleans(),
    block=st.integers(1, 200),
)
def test_it_reads_what_json_reads_whatever_is_read_at_once(
    document: list[Any], indent: Any, ascii_only: bool, marked: bool, block: int, tmp_path: Path
) -> None:
    content = json.dumps(document, indent=indent, ensure_ascii=ascii_only).encode("utf-8")
    path = written(tmp_path, (b"\xef\xbb\xbf" if marked else b"") + content + b"\n")
    found = list(elements(path, block=block))
    assert is_array(path)
    assert [value for _, value in found] == json.loads(content)
    for number, (offset, _) in enumerate(found):  # each is found again from its mark alone
        assert offset > 0
        assert list(elements(path, start=offset, block=block)) == found[number:]


@pytest.mark.slow
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(document=st.lists(VALUES, min_size=1, max_size=4), seed=st.integers(0, 2**32), block=st.integers(1, 64))
def test_damaged_bytes_never_raise_anything_but_an_error_that_names_the_file(
    document: list[Any], seed: int, block: int, tmp_path: Path
) -> None:
    content = bytearray(json.dumps(document, ensure_ascii=False).encode())
    draw = random.Random(seed)
    for _ in range(draw.randint(1, 3)):
        content[draw.randrange(len(content))] = draw.choice(b'"\\{}[],\x00\xff\xc3 a0')
    path = written(tmp_path, bytes(content))
    found = values_or_error(path, block)
    assert found == values_or_error(path, 1 << 20)  # it says the same whatever is read at once
    assert not isinstance(found, str) or str(path) in found


def values_or_error(path: Path, block: int) -> list[Any] | str:
    try:
        return values(path, block=block)
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize("block", [1, 2, 5, 1 << 20])
@pytest.mark.parametrize(
    ("content", "expected", "told"),
    [
        (b'[{"a": 1,}, {"b": 2}]', [Broken, {"b": 2}], "byte 9 of the file"),
        (b'[{"a": 1 "c": 2}, {"b": 2}]', [Broken, {"b": 2}], "byte 9 of the file"),
        (b"[{'a': ']'}, {\"b\": 2}]", [Broken, {"b": 2}], "byte 2 of the file"),
        (b'[{"b": 2}, ]', [{"b": 2}, Broken], "byte 11 of the file"),
        (b'[, {"b": 2}]', [Broken, {"b": 2}], "byte 1 of the file"),
        (b'[{"a": 1, "a": 2}, {"b": 2}]', [Broken, {"b": 2}], "'a' occurs twice"),
        (b'[{"a": 1} {"a": 2}, {"b": 2}]', [Broken, {"b": 2}], "no comma after the value that ends at byte 10"),
        (b'[{"b": 2}, true false]', [{"b": 2}, Broken], "no comma"),
        (b'[{"a": "\xc3\xa4\xff"}, {"b": 2}]', [Broken, {"b": 2}], "byte 10 of the file"),
        (b"[" + b"[" * 100_000 + b"]" * 100_000 + b', {"b": 2}]', [Broken, {"b": 2}], "nested too deeply"),
    ],
)
def test_a_broken_element_is_told_with_its_byte_and_stops_no_other(
    content: bytes, expected: list[Any], told: str, block: int, tmp_path: Path
) -> None:
    found = values(written(tmp_path, content), block=block)
    assert [Broken if isinstance(value, Broken) else value for value in found] == expected
    (broken,) = [value for value in found if isinstance(value, Broken)]
    assert broken.reason == ("invalid_utf8" if b"\xff" in content else "bad_json")
    assert told in broken.detail


@pytest.mark.parametrize("block", [1, 7, 1 << 20])
@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "not a JSON array in UTF-8: it begins with ''"),
        (b'{"a": 1}', "not with '\\['"),
        ("[1]".encode("utf-16"), "not a JSON array in UTF-8"),
        (b'[{"a": 1},\n{"b"', r"a\.json:2 \(byte 11\): an element begins that has no end"),
        (b'[{"a": 1},\n', r"a\.json:2 \(byte 11\)"),
        (b'[{"a": 1}\n', r"a\.json:1 \(byte 1\)"),
        (b'[\n\n{"a": "x}, {"b": "y"}]', r"a\.json:3 \(byte 3\)"),
        (b"[1]\n[2]", r"a\.json:2 \(byte 4\): the array ended before it"),
        (b"[", r"has no end"),
    ],
)
def test_a_file_that_is_not_one_whole_array_is_an_error_with_its_line(
    content: bytes, told: str, block: int, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=told):
        values(written(tmp_path, content), block=block)


def test_an_element_without_end_is_given_up_before_it_fills_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_array, "MAX_ELEMENT", 10_000)
    path = written(tmp_path, b'[{"a": "' + b"x" * 30_000 + b'"}]')
    assert values(path, block=1 << 20) == [{"a": "x" * 30_000}]  # as it came whole
    with pytest.raises(ValueError, match=r"byte 1\): an element begins that has no end"):
        values(path, block=100)


def test_a_turn_of_ten_megabytes_is_an_element_like_any_other(tmp_path: Path) -> None:
    document = [{"a": "ä" * 10_000_000}, {"b": 1}]
    assert values(written(tmp_path, json.dumps(document, ensure_ascii=False).encode())) == document


@pytest.mark.slow
def test_memory_is_that_of_a_few_blocks_however_long_the_file_is(tmp_path: Path) -> None:
    path = written(tmp_path, json.dumps([{"id": number, "text": "ä" * 500} for number in range(20_000)]).encode())
    block = 1 << 16
    tracemalloc.start()
    try:
        assert sum(1 for _ in elements(path, block=block)) == 20_000
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert path.stat().st_size > 500 * block
    assert peak < 16 * block


@pytest.mark.parametrize("content", [b"[]", b" [ ]\n", b"\xef\xbb\xbf[\n]"])
def test_an_empty_array_has_no_elements(content: bytes, tmp_path: Path) -> None:
    assert values(written(tmp_path, content)) == []


@pytest.mark.parametrize("content", [b"", b'{"a": 1}\n{"a": 2}\n', b"\x1f\x8b\x08"])
def test_other_files_are_no_arrays(content: bytes, tmp_path: Path) -> None:
    assert not is_array(written(tmp_path, content))
