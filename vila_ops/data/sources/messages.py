"""OpenAI's chat messages, one conversation on each line: {"messages": [{"role", "content"}]}.

Content is text, or a list of {"type": "text", "text"} and {"type": "image_url", "image_url": {"url"}}, in its order.
The url is a data: URL in base64, or the path of a file in the source's `images`.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vila_ops.config.sources import Messages
from vila_ops.data.raw.files import Folders, RawFile, Span, paths, scan_files
from vila_ops.data.records import Dropped, Image, Part, Record, Role, Turn
from vila_ops.data.sources.conversations import check_order, check_text
from vila_ops.data.sources.faults import Fault
from vila_ops.data.sources.images import from_base64, path_inside, read_image
from vila_ops.data.sources.json_files import SUFFIXES, Object, read_objects, record, scan_objects

ROLES: dict[str, Role] = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
TOOLS = ("tool", "function")


def raw_files(source: Messages, folders: Folders, *, cache: Path) -> list[RawFile]:
    """The JSON files, with the image files that their records refer to."""
    return scan_files(
        paths(Path(source.path), SUFFIXES),
        f"messages:{source.images}",
        lambda path: scan_objects(path, lambda value: _image_paths(value, source.images)),
        cache=cache,
    )


def read(source: Messages, folders: Folders, span: Span) -> Iterator[list[Record | Dropped]]:
    """The conversation of each object."""
    return read_objects(span, lambda value, place: _record(source, value, place))


def _record(source: Messages, value: Object, place: str) -> Record:
    messages = _messages(value)
    contents = [(_role(number, message), _content(number, message)) for number, message in enumerate(messages, start=1)]
    for number, (role, content) in enumerate(contents, start=1):
        images = sum(kind == "image_url" for kind, _ in content)
        check_text(role, "".join(value for kind, value in content if kind == "text"), number=number, images=images)
    check_order([role for role, _ in contents])
    turns = tuple(Turn(role, tuple(_parts(content, source.images))) for role, content in contents)
    first = next((url for _, content in contents for kind, url in content if kind == "image_url"), None)
    name = None if first is None or first.startswith("data:") else first
    return record(value, place, turns=turns, image=name, licence=source.licence)


def _messages(value: Object) -> list[Any]:
    messages = value.get("messages")
    if not isinstance(messages, list):
        raise Fault("malformed_turns", f"`messages` is a list of messages, not {repr(messages)[:80]}")
    return messages


def _role(number: int, message: Any) -> Role:
    role = message.get("role") if isinstance(message, dict) else None
    if role in TOOLS or (isinstance(message, dict) and (message.get("tool_calls") or message.get("function_call"))):
        raise Fault(
            "tool_call", f"message {number} calls a tool or is a tool's answer, which is not supported; remove it"
        )
    if not isinstance(role, str) or role not in ROLES:
        raise Fault("unknown_role", f"message {number} has the role {repr(role)[:80]}; known are {', '.join(ROLES)}")
    if message.get("weight", 1) != 1:
        raise Fault("weight", f"message {number} has a weight other than 1, which is not supported; remove the message")
    return ROLES[role]


def _content(number: int, message: Object) -> list[tuple[str, str]]:
    """("text", text) and ("image_url", url) of a message, in order."""
    content = message.get("content")
    if isinstance(content, str):
        return [("text", content)]
    if not isinstance(content, list):
        raise Fault(
            "malformed_turns", f"message {number} has {repr(content)[:80]} as content; it is text or a list of parts"
        )
    return [_part(number, part) for part in content]


def _part(number: int, part: Any) -> tuple[str, str]:
    match part:
        case {"type": "text", "text": str(text)}:
            return "text", text
        case {"type": "image_url", "image_url": {"url": str(url)} | str(url)}:
            return "image_url", url
        case {"type": "video_url"}:
            raise Fault("video", f"message {number} has a video; sample its frames, and give them as images")
        case _:
            raise Fault(
                "malformed_turns", f"message {number} has {repr(part)[:80]}; a part is of type text or image_url"
            )


def _parts(content: list[tuple[str, str]], images: str | None) -> Iterator[Part]:
    for kind, value in content:
        if kind == "image_url":
            yield _image(value, images)
        elif value:
            yield value


def _image(url: str, images: str | None) -> Image:
    if url.startswith("data:"):
        head, comma, data = url.partition(",")
        if not comma or not head.endswith(";base64"):
            raise Fault("bad_base64", f"{url[:40]!r} is not a data:TYPE;base64,... URL")
        return from_base64(data)
    return read_image(images, _checked_path(url))


def _checked_path(url: str) -> str:
    scheme, separator, _ = url.partition("://")
    if separator:
        way = (
            "download it first, and write its path in `images`" if scheme.lower().startswith("http") else "write a path"
        )
        raise Fault("remote_image", f"{url[:80]!r} is not read while data is prepared; {way}")
    return url


def _image_paths(value: Object, images: str | None) -> list[Path | None]:
    """The paths of the images; None for images inside the object."""
    urls = []
    for number, message in enumerate(_messages(value), start=1):
        if isinstance(message, dict):
            urls += [value for kind, value in _content(number, message) if kind == "image_url"]
    return [None if url.startswith("data:") else path_inside(images, _checked_path(url)) for url in urls]
