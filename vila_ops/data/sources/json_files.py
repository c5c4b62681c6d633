"""Files of JSON objects, as one array or with one object on each line: scanned, and read to records."""

from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from vila_ops.data.raw.files import STRIDE, Scan, Span
from vila_ops.data.raw.json_array import Broken, elements, is_array, is_spread, wrapped_in
from vila_ops.data.raw.lines import LineNumbers, every_line, lines
from vila_ops.data.raw.text import fault, json_object
from vila_ops.data.records import Dropped, Record, Turn
from vila_ops.data.sources.faults import Fault
from vila_ops.data.sources.images import object_of

Object = dict[str, Any]
SUFFIXES = (".json", ".jsonl", ".jsonl.gz")


def scan_objects(path: Path, paths_of: Callable[[Object], list[Path | None]]) -> Scan:
    """Scan a file. `paths_of` returns the path of each image of an object, None for an image inside the object.

    Raises ValueError for a file that is one object around a list of records, or whose objects go over several lines.
    """
    if key := wrapped_in(path):
        raise ValueError(
            f"{path} is one object, with its records in the list {key!r}; write that list into a file of its own: "
            f"jq '.[\"{key}\"]' {path.name} > {key}.json"
        )
    if is_spread(path):
        raise ValueError(
            f"{path} has an object over several lines; write a record on each line (jq -c . {path.name} > NEW.jsonl), "
            f"or move the file elsewhere if it has no records"
        )
    beside: dict[str, None] = {}
    marks: list[int] = []
    count = images = 0
    for count, (offset, value) in enumerate(_values(path), start=1):
        if (count - 1) % STRIDE == 0:
            marks.append(offset)
        if not isinstance(value, dict):
            continue
        try:
            named = paths_of(value)
        except Fault:  # reported when the record is read
            continue
        images += len(named)
        beside.update(dict.fromkeys(str(image) for image in named if image is not None))
    return Scan(count=count, images=images, marks=tuple(marks), beside=tuple(beside))


def read_objects(span: Span, make: Callable[[Object, str], Record]) -> Iterator[list[Record | Dropped]]:
    """For each object of a span the record of `make(object, place)`, or Dropped if that raises Fault.

    The place is FILE:LINE, or FILE:LINE[INDEX] in an array.
    """
    return _read_array(span, make) if is_array(span.file()) else _read_lines(span, make)


def record(
    value: Object, place: str, *, turns: tuple[Turn, ...], image: str | None, licence: str, notes: tuple[str, ...] = ()
) -> Record:
    """The record with the id, licence and URL that the object states; the defaults are the place and `licence`.

    `image` is the file name of the first image, None if it has none.
    """
    url = stated(value, "url")
    return Record(
        id=own_id(value) or place,
        object=object_of(image, turns, id=own_id(value)),
        turns=turns,
        category="",
        licence=stated(value, "licence", "license") or licence,
        provenance=f"{place} {url}" if url else place,
        notes=notes,
    )


def own_id(value: Object) -> str:
    """The id that the object states, as text; empty if it states none."""
    number = value.get("id")
    return str(number) if isinstance(number, int) and not isinstance(number, bool) else stated(value, "id")


def stated(value: Object, *keys: str) -> str:
    """The first value of these keys that is undamaged text; empty if there is none."""
    texts = (value[key] for key in keys if isinstance(value.get(key), str))
    return next((text for text in texts if not fault(text)), "")


def _values(path: Path) -> Iterator[tuple[int, Any]]:
    """(offset in bytes, value) of each element or line; any value but a dict is faulty or blank."""
    if is_array(path):
        yield from elements(path)
    else:
        for offset, line in every_line(path):
            yield offset, json_object(line, where="") if line.strip() else None


def _read_lines(span: Span, make: Callable[[Object, str], Record]) -> Iterator[list[Record | Dropped]]:
    for number, (place, line) in enumerate(lines(span), start=span.start):
        if not line.strip() or not span.takes(number):
            yield []
            continue
        value = json_object(line, where=place)
        yield [value if isinstance(value, Dropped) else _record_or_dropped(value, place, make)]


def _read_array(span: Span, make: Callable[[Object, str], Record]) -> Iterator[list[Record | Dropped]]:
    path = span.file()
    with closing(LineNumbers(path)) as lines:
        for number, (offset, value) in zip(range(span.start, span.stop), elements(path, start=span.mark), strict=False):
            if not span.takes(number):
                yield []
                continue
            yield [_record_or_dropped(value, f"{span.name}:{lines.at(offset)}[{number}]", make)]


def _record_or_dropped(value: Any, place: str, make: Callable[[Object, str], Record]) -> Record | Dropped:
    if isinstance(value, Broken):
        return Dropped(place, value.reason, place, value.detail)
    if not isinstance(value, dict):
        kind = type(value).__name__
        return Dropped(place, "not_an_object", place, f"a JSON {kind}; a record is an object, {{...}}")
    try:
        return make(value, place)
    except Fault as error:
        return error.dropped(own_id(value) or place, where=place)
