"""LLaVA's conversations: {id, image, conversations: [{from, value}]}, as one array or one object on each line.

The images are a path or a list of paths under `image`, or under `images` as LLaMA-Factory has it. `<image>` in a turn
is the position of an image. There must be as many as images: LLaVA's own loader silently ignores an image without a
placeholder (prepare_inputs_labels_for_multimodal), here such a record is dropped unless `placement` is vila. A `system`
beside the turns is their system prompt, as LLaMA-Factory has it.
"""

from collections.abc import Iterator
from pathlib import Path

from vila_ops.config.sources import Llava, LlavaCc3m
from vila_ops.data.raw.files import Folders, RawFile, Span, paths, scan_files
from vila_ops.data.raw.objects import raw_path
from vila_ops.data.records import Dropped, Record, Turn
from vila_ops.data.sources import media
from vila_ops.data.sources.conversations import prompt_beside
from vila_ops.data.sources.faults import Fault
from vila_ops.data.sources.json_files import SUFFIXES, Object, read_objects, record, scan_objects
from vila_ops.data.sources.turns import Slot, conversation

_READ = ("conversations", *media.IMAGE_KEYS)


def raw_files(source: Llava, folders: Folders, *, cache: Path) -> list[RawFile]:
    """The JSON files, with the images that their records refer to."""
    return scan_files(
        paths(raw_path(source.path), SUFFIXES),
        f"llava:{source.images}",
        lambda path: scan_objects(path, lambda value: image_paths(value, source.images)),
        cache=cache,
    )


def read(source: Llava, folders: Folders, span: Span) -> Iterator[list[Record | Dropped]]:
    """The record of each object."""
    return read_objects(span, lambda value, place: record_of(source, value, place))


def image_paths(value: Object, images: str | None) -> list[Path | None]:
    """The paths of the object's images; None for images inside the object."""
    return [media.file_of(image, images) for image in media.stated_images(value)]


def record_of(source: Llava | LlavaCc3m, value: Object, place: str) -> Record:
    """The record of an object; with render `caption` only the image and the answer, as in LLaVA's `plain`."""
    images = media.stated_images(value)
    system = prompt_beside(value, source.ignore)
    media.refuse_unread(value, read=_READ, ignore=source.ignore, shown=images)
    caption = source.render == "caption"
    as_vila = caption or (
        isinstance(source, Llava) and source.placement == "vila"
    )  # a caption follows its image anyway
    talk = conversation(
        value.get("conversations"),
        len(images),
        system=None if caption else system,
        placement="vila" if as_vila else "as_written",
    )
    if caption and not (len(images) == 1 and len(talk.turns) == 2 and isinstance(talk.turns[0][1][0], Slot)):
        told = f"{len(images)} images, {len(talk.turns)} turns"
        raise Fault("not_a_caption", f"{told}; a caption is 1 question with 1 image, 1 answer")
    turns = talk.filled(media.read(image, source.images) for image in talk.of_slots(images))
    if caption:
        turns = (Turn("document", (*turns[0].parts[:1], *turns[1].parts)),)
    return record(value, place, turns=turns, image=media.name_of(images), licence=source.licence, notes=talk.notes)
