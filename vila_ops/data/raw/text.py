"""Checks of raw text, and strict JSON. Pure."""

import json
from typing import Any, NoReturn

from vila_ops.data.records import Dropped


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


def json_object(line: bytes, *, where: str) -> dict[str, Any] | Dropped:
    """The object on a line of JSON; Dropped (invalid_utf8, bad_json, not_an_object) for anything else."""
    try:
        value = DECODER.decode(line.decode("utf-8-sig").strip())
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


def _no_number(word: str) -> NoReturn:
    raise ValueError(f"{word} is not JSON; write null, or leave the key out")


DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_no_number)
"""Refuses what JSON readers disagree about: duplicate keys, NaN and Infinity."""
