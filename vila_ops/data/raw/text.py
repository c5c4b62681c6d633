"""Checks of raw text, and strict JSON. Pure."""

import json
from pathlib import Path
from typing import Any

from vila_ops.data.records import Dropped

MAX_LINE = 1 << 26
"""Bytes of one record; a longer line has probably lost its end."""
UTF_16_MARKS = (b"\xff\xfe", b"\xfe\xff")
HEAD = 64
"""Bytes at the beginning of a file that tell its encoding."""


def fault(text: str) -> str | None:
    """The reason that text cannot be used ("nul_in_text", "lone_surrogate"), or None. Length is not checked."""
    if "\0" in text:
        return "nul_in_text"
    if text.isascii():
        return None
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # half of a UTF-16 pair, such as JSON's "\ud800", is not a character
        return "lone_surrogate"
    return None


def check_utf8(head: bytes, path: Path) -> None:
    """Raise ValueError if a file that begins with these bytes is UTF-16, as some spreadsheets write it.

    Without a byte order mark, UTF-16 is told by the zero bytes of its ASCII characters: all at even or all at odd
    places, at least four, and a quarter of the first 32 characters. A few damaged bytes do not make that pattern.
    """
    even, odd = head[:HEAD:2], head[1:HEAD:2]
    zeros = sorted((even.count(0), odd.count(0)))
    if head.startswith(UTF_16_MARKS) or (zeros[0] == 0 and zeros[1] >= max(4, len(odd) // 4)):
        raise ValueError(
            f"{path} is text in UTF-16, but text is read as UTF-8; convert it: "
            f"iconv -f UTF-16 -t UTF-8 {path.name} > utf-8-{path.name}"
        )


def decoded(data: bytes) -> str:
    """Text in UTF-8, or in UTF-16 with a byte order mark. Raises UnicodeDecodeError."""
    return data.decode("utf-16" if data.startswith(UTF_16_MARKS) else "utf-8-sig")


def json_object(line: bytes, *, where: str) -> dict[str, Any] | Dropped:
    """The object in some JSON; Dropped (oversized, invalid_utf8, bad_json, not_an_object) for anything else."""
    if len(line) >= MAX_LINE:
        return Dropped(where, "oversized", where, f"more than {MAX_LINE} bytes without the end of a line; cut it")
    try:
        value = DECODER.decode(decoded(line).strip())
    except UnicodeDecodeError as error:
        return Dropped(
            where, "invalid_utf8", where, f"byte {error.start + 1} of the line: {error.reason}; save as UTF-8"
        )
    except (ValueError, RecursionError) as error:
        return Dropped(where, "bad_json", where, str(error))
    if not isinstance(value, dict):
        return Dropped(where, "not_an_object", where, f"a JSON {type(value).__name__}; a record is an object, {{...}}")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r} occurs twice in one object; keep one of them")
    return values


DECODER = json.JSONDecoder(object_pairs_hook=_unique)
"""Refuses duplicate keys, about which readers disagree. NaN and Infinity are read, since Python writes them for numbers
that are missing; where a number is used, it must be finite."""
