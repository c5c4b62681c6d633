"""A folder of one's own: `records.jsonl`, one record a line, and the pictures that it names.

{"id": "1", "object": "dog", "category": "animals", "licence": "CC0-1.0", "provenance": "my camera",
 "turns": [{"role": "user", "parts": [{"image": "dog.png"}, {"text": "What is this?"}]},
           {"role": "assistant", "parts": [{"text": "A dog."}]}]}
"""

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from pydantic import Field, ValidationError, field_validator

from vila_ops.config.base import Config
from vila_ops.config.data import JsonLines
from vila_ops.data.records import Dropped, Image, Part, Record, Role, Turn

RECORDS = "records.jsonl"


class TextPart(Config):
    """Text, taken as it is."""

    text: str


class ImagePart(Config):
    """A picture file."""

    image: str
    """Path relative to the folder of records.jsonl."""

    @field_validator("image")
    @classmethod
    def _inside_the_folder(cls, image: str) -> str:
        path = PurePosixPath(image)
        if not path.parts or path.is_absolute() or ".." in path.parts:
            raise ValueError(f"{image!r} is not a path inside the folder; write it relative to {RECORDS}, without '..'")
        return image


class TurnLine(Config):
    """What one side says."""

    role: Role
    parts: tuple[TextPart | ImagePart, ...] = Field(min_length=1)


class Line(Config):
    """One line of records.jsonl."""

    id: str = Field(min_length=1)
    object: str = Field(min_length=1)
    category: str
    licence: str
    provenance: str
    turns: tuple[TurnLine, ...] = Field(min_length=1)


def keys(source: JsonLines) -> list[str]:
    """LINE:OFFSET of all lines that are not blank, in the order of the file; LINE is padded, so they are sorted."""
    found = []
    offset = 0
    with _records(source).open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                found.append(f"{number:09d}:{offset}")
            offset += len(line)
    return found


def read(source: JsonLines, key: str) -> Iterator[Record | Dropped]:
    """The record of this line; dropped where a picture is missing; an error where the line is not a record."""
    number, _, offset = key.partition(":")
    with _records(source).open("rb") as lines:
        lines.seek(int(offset))
        text = lines.readline()
    try:
        line = Line.model_validate_json(text)
    except ValidationError as error:
        raise ValueError(f"{_records(source)} line {int(number)}: {error}") from error
    folder = Path(source.path)
    pictures = [part.image for turn in line.turns for part in turn.parts if isinstance(part, ImagePart)]
    if not all((folder / picture).is_file() for picture in pictures):
        yield Dropped(id=line.id, reason="missing_image")
        return
    yield Record(
        id=line.id,
        object=line.object.lower(),
        turns=tuple(Turn(turn.role, tuple(_part(folder, part) for part in turn.parts)) for turn in line.turns),
        category=line.category,
        licence=line.licence,
        provenance=line.provenance,
    )


def _part(folder: Path, part: TextPart | ImagePart) -> Part:
    return part.text if isinstance(part, TextPart) else Image((folder / part.image).read_bytes())


def _records(source: JsonLines) -> Path:
    path = Path(source.path) / RECORDS
    if not path.is_file():
        raise ValueError(f"no {RECORDS} in {source.path!r}; a jsonl source is a folder with that file")
    return path
