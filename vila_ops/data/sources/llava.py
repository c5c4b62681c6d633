"""LLaVA's conversations: {id, image, conversations: [{from, value}]}, as one array or one object on each line.

`<image>` in a turn is the position of an image. There must be as many as images: LLaVA's own loader silently ignores an
image without a placeholder (prepare_inputs_labels_for_multimodal), here such a record is dropped.
"""

from collections.abc import Iterator
from pathlib import Path

from vila_ops.config.sources import Llava
from vila_ops.data.raw.files import Folders, RawFile, Span, paths, scan_files
from vila_ops.data.records import Dropped, Image, Part, Record, Role, Turn
from vila_ops.data.sources.conversations import PLACEHOLDER, check_order, check_placeholders, check_text
from vila_ops.data.sources.faults import Fault
from vila_ops.data.sources.images import path_inside, read_image
from vila_ops.data.sources.json_files import SUFFIXES, Object, read_objects, record, scan_objects

ROLES: dict[str, Role] = {"human": "user", "gpt": "assistant", "system": "system"}


def raw_files(source: Llava, folders: Folders, *, cache: Path) -> list[RawFile]:
    """The JSON files, with the images that their records refer to."""
    return scan_files(
        paths(Path(source.path), SUFFIXES),
        f"llava:{source.images}",
        lambda path: scan_objects(path, lambda value: image_paths(value, source.images)),
        cache=cache,
    )


def read(source: Llava, folders: Folders, span: Span) -> Iterator[list[Record | Dropped]]:
    """The record of each object."""
    return read_objects(
        span,
        lambda value, place: conversation(
            value, place, images=source.images, licence=source.licence, caption=source.render == "caption"
        ),
    )


def image_paths(value: Object, images: str | None) -> list[Path | None]:
    """The paths of the object's images."""
    return [path_inside(images, name) for name in _names(value)]


def conversation(value: Object, place: str, *, images: str | None, licence: str, caption: bool) -> Record:
    """The record of an object; with `caption` only the image and the answer, as in LLaVA's `plain`."""
    if "video" in value:
        raise Fault("video", "videos are not read; sample its frames, and name them as a list in `image`")
    names = _names(value)
    messages = _messages(value.get("conversations"))
    check_placeholders(sum(text.count(PLACEHOLDER) for _, text in messages), len(names))
    if caption and (len(names) != 1 or len(messages) != 2 or PLACEHOLDER in messages[1][1]):
        raise Fault(
            "not_a_caption",
            f"{len(names)} images, {len(messages)} turns; a caption is 1 question with 1 image, 1 answer",
        )
    shown = [read_image(images, name) for name in names]
    if caption:
        turns: tuple[Turn, ...] = (Turn("document", (shown[0], messages[1][1])),)
    else:
        turns = tuple(_turns(messages, shown))
    return record(value, place, turns=turns, image=names[0] if names else None, licence=licence)


def _names(value: Object) -> list[str]:
    match value.get("image"):
        case None:
            return []
        case str(name):
            return [name]
        case list(names) if all(isinstance(name, str) for name in names):
            return names
        case other:
            raise Fault("malformed_image", f"`image` is a path or a list of paths, not {repr(other)[:80]}")


def _messages(conversations: object) -> list[tuple[Role, str]]:
    if not isinstance(conversations, list):
        raise Fault("malformed_turns", f"`conversations` is a list of turns, not {repr(conversations)[:80]}")
    messages: list[tuple[Role, str]] = []
    for number, turn in enumerate(conversations, start=1):
        match turn:
            case {"from": str(role), "value": str(text)} if role in ROLES:
                check_text(ROLES[role], text.replace(PLACEHOLDER, ""), number=number, images=text.count(PLACEHOLDER))
                messages.append((ROLES[role], text))
            case {"from": str(role), "value": str()}:
                raise Fault("unknown_role", f"turn {number} is from {role!r}; known are {', '.join(ROLES)}")
            case _:
                raise Fault(
                    "malformed_turns", f"turn {number} is not {{from, value}} with two texts: {repr(turn)[:80]}"
                )
    check_order([role for role, _ in messages])
    return messages


def _turns(messages: list[tuple[Role, str]], images: list[Image]) -> Iterator[Turn]:
    left = iter(images)
    for role, text in messages:
        first, *rest = text.split(PLACEHOLDER)
        parts: list[Part] = [first]
        for piece in rest:
            parts += [next(left), piece]
        yield Turn(role, tuple(part for part in parts if part != ""))
