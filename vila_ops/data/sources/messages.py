"""Chat messages, one conversation on each line: {"messages": [{"role", "content"}]}, as OpenAI has them.

Content is text, or a list of parts in their order (see `turns`). An image is a data: URL in base64, or the path of a
file in the source's `images`. It is stated by its part, or by the record under `images` or `image`, as in the formats
of LLaMA-Factory, ms-swift and TRL: there, `<image>` in the text is the position of the next one, and images without any
position come before the first question. In a record without these keys `<image>` is text. A `system` beside the
messages is their system prompt.
"""

from collections.abc import Iterator
from pathlib import Path

from vila_ops.config.sources import Messages
from vila_ops.data.raw.files import Folders, RawFile, Span, paths, scan_files
from vila_ops.data.raw.objects import raw_path
from vila_ops.data.records import Dropped, Record
from vila_ops.data.sources import media
from vila_ops.data.sources.conversations import prompt_beside
from vila_ops.data.sources.json_files import SUFFIXES, Object, read_objects, record, scan_objects
from vila_ops.data.sources.turns import Conversation, conversation

_READ = ("messages", *media.IMAGE_KEYS)


def raw_files(source: Messages, folders: Folders, *, cache: Path) -> list[RawFile]:
    """The JSON files, with the image files that their records refer to."""
    return scan_files(
        paths(raw_path(source.path), SUFFIXES),
        f"messages:{source.images}:{source.ignore}",
        lambda path: scan_objects(path, lambda value: _image_paths(source, value)),
        cache=cache,
    )


def read(source: Messages, folders: Folders, span: Span) -> Iterator[list[Record | Dropped]]:
    """The conversation of each object."""
    return read_objects(span, lambda value, place: _record(source, value, place))


def _record(source: Messages, value: Object, place: str) -> Record:
    talk, images = _conversation(value, prompt_beside(value, source.ignore))
    media.refuse_unread(value, read=_READ, ignore=source.ignore, shown=images)
    turns = talk.filled(media.read(image, source.images) for image in images)
    return record(value, place, turns=turns, image=media.name_of(images), licence=source.licence, notes=talk.notes)


def _conversation(value: Object, system: object) -> tuple[Conversation, list[str]]:
    """The conversation, and the path or URL of the image in each of its slots."""
    stated = media.stated_images(value)
    has_keys = any(key in value for key in media.IMAGE_KEYS)
    talk = conversation(value.get("messages"), len(stated), system=system, placeholders=has_keys)
    return talk, talk.of_slots(stated)


def _image_paths(source: Messages, value: Object) -> list[Path | None]:
    """The paths of the images; None for images inside the object."""
    _, images = _conversation(value, prompt_beside(value, source.ignore))
    return [media.file_of(image, source.images) for image in images]
