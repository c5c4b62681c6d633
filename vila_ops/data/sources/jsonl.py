"""A folder in our own layout: `records.jsonl` with one record on each line, and the images that it refers to.

{"id": "1", "object": "dog", "category": "animals", "licence": "CC0-1.0", "provenance": "my camera",
 "turns": [{"role": "user", "parts": [{"image": "dog.png"}, {"text": "What is this?"}]},
           {"role": "assistant", "parts": [{"text": "A dog."}]}]}
"""

from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath

from pydantic import Field, ValidationError, field_validator

from vila_ops.config.base import Config
from vila_ops.config.sources import JsonLines
from vila_ops.data.raw.files import STRIDE, Folders, RawFile, RawMissing, Scan, Span, content, scan_files
from vila_ops.data.raw.lines import every_line, lines
from vila_ops.data.raw.objects import raw_path
from vila_ops.data.records import Dropped, Image, Part, Record, Role, Turn
from vila_ops.data.sources.images import MAX_BYTES, is_too_long

RECORDS = "records.jsonl"


class TextLine(Config):
    """Text, used unchanged."""

    text: str


class ImageLine(Config):
    """An image file."""

    image: str
    """Path relative to the folder of records.jsonl."""

    @field_validator("image")
    @classmethod
    def _inside_the_folder(cls, image: str) -> str:
        path = PurePosixPath(image)
        if not path.parts or path.is_absolute() or ".." in path.parts or is_too_long(path) or "\0" in image:
            raise ValueError(f"{image!r} is not a path inside the folder; write it relative to {RECORDS}, without '..'")
        return image


class TurnLine(Config):
    """One message."""

    role: Role
    parts: tuple[TextLine | ImageLine, ...] = Field(min_length=1)


class Line(Config):
    """One line of records.jsonl."""

    id: str = Field(min_length=1)
    object: str = Field(min_length=1)
    category: str
    licence: str
    provenance: str
    turns: tuple[TurnLine, ...] = Field(min_length=1)


def raw_files(source: JsonLines, folders: Folders, *, cache: Path) -> list[RawFile]:
    """records.jsonl, with the images that its records refer to."""
    path = raw_path(source.path) / RECORDS
    if not path.is_file():
        raise RawMissing(f"no {RECORDS} in {source.path!r}; a jsonl source is a folder with that file")
    return scan_files([(RECORDS, path)], source.kind, _scan, cache=cache)


def read(source: JsonLines, folders: Folders, span: Span) -> Iterator[list[Record | Dropped]]:
    """The record of each line, none for a blank line."""
    for place, text in lines(span):
        if not text.strip():
            yield []
            continue
        try:
            line = Line.model_validate_json(text)
        except ValidationError as error:
            yield [Dropped(id=place, reason="bad_line", where=place, detail=str(error))]
            continue
        yield [_record(raw_path(source.path), line, where=place)]


def _record(folder: Path, line: Line, *, where: str) -> Record | Dropped:
    images = [part.image for turn in line.turns for part in turn.parts if isinstance(part, ImageLine)]
    data = {image: content(folder / image, most=MAX_BYTES) for image in images}
    if missing := [image for image in images if data[image] is None]:
        return Dropped(
            id=line.id, reason="missing_image", where=where, detail=f"no file {missing[0]!r} beside {RECORDS}"
        )
    return Record(
        id=line.id,
        object=line.object.lower(),
        turns=tuple(Turn(turn.role, tuple(_part(data, part) for part in turn.parts)) for turn in line.turns),
        category=line.category,
        licence=line.licence,
        provenance=line.provenance,
    )


def _part(images: Mapping[str, bytes | None], part: TextLine | ImageLine) -> Part:
    return part.text if isinstance(part, TextLine) else Image(images[part.image] or b"")


def _scan(path: Path) -> Scan:
    """Scan every line; a faulty line has no images."""
    beside: dict[str, None] = {}
    images = 0
    counted = 0
    marks: list[int] = []
    for counted, (offset, text) in enumerate(every_line(path), start=1):
        if (counted - 1) % STRIDE == 0:
            marks.append(offset)
        try:
            line = Line.model_validate_json(text)
        except ValidationError:
            continue
        named = [part.image for turn in line.turns for part in turn.parts if isinstance(part, ImageLine)]
        images += len(named)
        beside.update(dict.fromkeys(str(path.parent / name) for name in named))
    return Scan(count=counted, images=images, marks=tuple(marks), beside=tuple(beside))
