"""Read a JSON array element by element, with one element in memory at a time."""

import codecs
import json
import re
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from vila_ops.data.raw.lines import LineNumbers
from vila_ops.data.raw.text import DECODER

BLOCK = 1 << 20
"""Bytes read at once."""
MAX_ELEMENT = 1 << 26
"""Characters of one element; a longer element has probably lost its end."""
RECORD_KEYS = frozenset({"conversations", "messages", "instruction", "text_list", "turns"})
"""Keys that make an object a record of one of the formats."""
_LISTED = re.compile(r'"([^"\\]*+)"\s*+:\s*+\[\s*+(?=\{)')
"""A key with a list of objects."""
_SPACE = re.compile(r"[ \t\n\r]*")
_STRUCTURE = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"|[]["{},]', re.DOTALL)
"""Whole strings, and the brackets, braces and commas outside of them; a lone quote starts an unterminated string."""


@dataclass(frozen=True, slots=True)
class Broken:
    """An element that is not valid JSON, in an array that can be read on after it."""

    reason: str
    """bad_json or invalid_utf8."""
    detail: str


def wrapped_in(path: Path) -> str | None:
    """The key under which a file that is one object has its records, as {"data": [...]}; None for other files."""
    with path.open("rb") as file:
        head = file.read(BLOCK).decode("utf-8-sig", "replace")
    head = head.lstrip()
    if not head.startswith("{"):
        return None
    try:
        whole, _ = DECODER.raw_decode(head)
    except (ValueError, RecursionError):  # longer than what was read, or broken
        return _first_list_of_records(head)
    if whole.keys() & RECORD_KEYS:
        return None
    return next(
        (key for key, value in whole.items() if isinstance(value, list) and value and _is_record(value[0])), None
    )


def is_spread(path: Path) -> bool:
    """Whether the first object of a file goes over several lines, so that no line is a record."""
    with path.open("rb") as file:
        head = file.read(BLOCK).decode("utf-8-sig", "replace").lstrip()
    try:
        _, end = DECODER.raw_decode(head)
    except (ValueError, RecursionError):  # longer than what was read, or broken
        return False
    return head.startswith("{") and "\n" in head[:end]


def _first_list_of_records(head: str) -> str | None:
    for match in _LISTED.finditer(head):
        if match[1] in RECORD_KEYS:  # the object is a record itself
            return None
        try:
            first, _ = DECODER.raw_decode(head, match.end())
        except (ValueError, RecursionError):
            continue
        if _is_record(first):
            return match[1]
    return None


def _is_record(value: object) -> bool:
    return isinstance(value, dict) and bool(value.keys() & RECORD_KEYS)


def is_array(path: Path) -> bool:
    """Whether a file's first character, byte order mark and white space aside, opens an array."""
    with path.open("rb") as file:
        return file.read(4096).removeprefix(codecs.BOM_UTF8).lstrip(b" \t\n\r").startswith(b"[")


def elements(path: Path, *, start: int = 0, block: int = BLOCK) -> Iterator[tuple[int, Any]]:
    """(offset in bytes, value) of each element, from the first or the one at byte `start`; Broken for an invalid one.

    Raises ValueError if the file is not an array, if its end is missing, and if anything follows the end.
    """
    with path.open("rb") as file:
        window = _Window(path, file, start=start, block=block)
        if start == 0:
            window.open_array()
        if window.next_character() == "]":
            window.move(1)
        else:
            while True:
                window.next_character()
                yield window.offset, window.take()
                closing = window.next_character() == "]"
                window.move(1)
                if closing:
                    break
        if window.next_character():
            raise ValueError(f"{window.place()}: the array ended before it; a file holds one array, or is jsonl")


class _Window:
    """Part of a file's text, and a position in it. Bytes that are not UTF-8 are decoded to lone surrogates."""

    def __init__(self, path: Path, file: IO[bytes], *, start: int, block: int) -> None:
        self._path, self._file, self._block = path, file, block
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="surrogateescape")
        self._text, self._position, self._ended = "", 0, False
        self.offset = file.seek(start)
        """Bytes before the position."""

    def open_array(self) -> None:
        """Move past the bracket that opens the array."""
        if self.next_character() == "\ufeff":
            self.move(1)
        if (first := self.next_character()) != "[":
            raise ValueError(f"{self._path} is not a JSON array in UTF-8: it begins with {first!r}, not with '['")
        self.move(1)

    def next_character(self) -> str:
        """The next character after white space; "" at the end of the file."""
        while True:
            space = _SPACE.match(self._text, self._position)
            self.move((space.end() if space else self._position) - self._position)
            if self._position < len(self._text):
                return self._text[self._position]
            if not self._more():
                return ""

    def take(self) -> Any:
        """The element at the position; moves to the comma or bracket after it."""
        while True:
            value, end, problem = self._decode()
            if end is None:
                end, value = self._end_by_structure(), Broken("bad_json", problem)
            if end is not None:
                return self._checked(value, self._text[self._position : end])
            if len(self._text) - self._position > MAX_ELEMENT or not self._more():
                raise ValueError(
                    f"{self.place()}: an element begins that has no end; the file was cut off there, "
                    f"or a quote or bracket is missing: fix it, or fetch the file again"
                )

    def move(self, characters: int) -> None:
        """Move forward by a number of characters."""
        passed = self._text[self._position : self._position + characters]
        self.offset += len(passed.encode("utf-8", "surrogateescape"))
        self._position += characters

    def place(self) -> str:
        """The position as FILE:LINE (byte OFFSET)."""
        with closing(LineNumbers(self._path)) as lines:
            return f"{self._path}:{lines.at(self.offset)} (byte {self.offset})"

    def _decode(self) -> tuple[Any, int | None, str]:
        """(value, end, "") if JSON and then a comma or bracket follow; else (None, None, the problem)."""
        try:
            value, end = DECODER.raw_decode(self._text, self._position)
        except RecursionError:
            return None, None, "nested too deeply"
        except ValueError as error:
            return None, None, self._message(error)
        space = _SPACE.match(self._text, end)
        end = space.end() if space else end
        if self._text[end : end + 1] in (",", "]"):
            return value, end, ""
        return None, None, f"no comma after the value that ends at {self._byte(end)}"

    def _message(self, error: ValueError) -> str:
        if isinstance(error, json.JSONDecodeError):  # whose line and column are those of the window
            return f"{error.msg} at {self._byte(error.pos)}"
        return str(error)

    def _byte(self, place: int) -> str:
        before = self._text[self._position : place].encode("utf-8", "surrogateescape")
        return f"byte {self.offset + len(before)} of the file"

    def _end_by_structure(self) -> int | None:
        """The end of an invalid element: the comma or bracket outside of all its strings, brackets and braces."""
        depth = 0
        for token in _STRUCTURE.finditer(self._text, self._position):
            match token.group():
                case "[" | "{":
                    depth += 1
                case "]" | "}" if depth:
                    depth -= 1
                case "]" | "," if not depth:
                    return token.start()
                case '"':
                    return None
        return None

    def _checked(self, value: Any, raw: str) -> Any:
        before = self.offset
        self.move(len(raw))
        try:
            raw.encode("utf-8")
        except UnicodeEncodeError as error:
            place = before + len(raw[: error.start].encode("utf-8"))
            return Broken("invalid_utf8", f"byte {place} of the file is not UTF-8; save the file in UTF-8")
        return value

    def _more(self) -> bool:
        """Double the text after the position, and drop the text before it; False at the end of the file."""
        if self._ended:
            return False
        rest = self._text[self._position :]
        data = self._file.read(max(self._block, len(rest)))
        self._ended = not data
        self._text, self._position = rest + self._decoder.decode(data, final=self._ended), 0
        return True
