"""Conversations of every format to turns with their images. Pure.

A turn is {from, value} (LLaVA), {role, content} (chat messages) or {user, assistant} (The Cauldron). The content of a
message is text, or a list of parts: {type: text, text}, OpenAI's {type: image_url, image_url}, or an image as TRL,
transformers and Qwen write it, {type: image} with the image under `image`, `url`, `path` or `base64`, with its `index`
among the record's images, or with neither, for the next one.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from vila_ops.config.sources import Placement
from vila_ops.data.records import EMPTY_SYSTEM, FIRST_ANSWER, Image, Role, Turn
from vila_ops.data.sources.conversations import PLACEHOLDER, check_order, check_placeholders, check_text
from vila_ops.data.sources.faults import Fault
from vila_ops.data.sources.media import address, is_absent, read, refuse_unread

ROLES: dict[str, Role] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "developer": "system",
}
TOOLS = ("tool", "function", "observation", "tool_call", "tool_response", "function_call")
_NUMBERED = re.compile(r"<image[ _-]?[0-9]+>", re.IGNORECASE)
_READ = ("from", "value", "role", "content", "user", "assistant")
_PAYLOADS = ("image", "image_url", "url", "path", "base64")
_THOUGHTS = ("reasoning_content", "reasoning", "thinking")
"""Keys of a turn with what was thought before its answer: of DeepSeek, OpenRouter, and gpt-oss and TRL."""


@dataclass(frozen=True)
class Slot:
    """The position of an image in a turn. Without a number or an address it is the record's next image."""

    index: int | None = None
    """Number of the image in the record."""
    address: str | None = None
    """Path or URL of an image that the turn states itself."""


Parts = list[str | Slot]


@dataclass(frozen=True)
class _Said:
    """One turn."""

    number: int
    """Its position in the record, from 1."""
    form: str
    """The key of its speaker: from, role or user."""
    role: Role
    parts: Parts


@dataclass(frozen=True)
class Conversation:
    """The turns of a record. Every slot has an index or an address."""

    turns: tuple[tuple[Role, tuple[str | Slot, ...]], ...]
    notes: tuple[str, ...]
    """As `Record.notes`."""

    @property
    def slots(self) -> list[Slot]:
        """The positions of images, in order."""
        return [part for _, parts in self.turns for part in parts if isinstance(part, Slot)]

    def of_slots(self, images: Sequence[str]) -> list[str]:
        """The path or URL of the image in each slot, given those of the record."""
        return [slot.address or images[slot.index or 0] for slot in self.slots]

    def filled(self, images: Iterable[Image]) -> tuple[Turn, ...]:
        """The turns with an image in each slot, in order."""
        unused = iter(images)
        return tuple(
            Turn(role, tuple(next(unused) if isinstance(part, Slot) else part for part in parts))
            for role, parts in self.turns
        )


def conversation(
    stated: object,
    images: int,
    *,
    system: object = None,
    placement: Placement = "as_written",
    placeholders: bool = True,
) -> Conversation:
    """A conversation of a record with so many images. `<image>` in text is the position of one if `placeholders`.

    `system` is the prompt that the record states beside its turns; it comes before them.

    The images of chat messages and of The Cauldron that have no position come before the first question, as in TRL and
    ms-swift. A first turn of the assistant and empty system turns are left out. Raises Fault: malformed_turns,
    unknown_role, tool_call, weight, video, unread_media, turn_order, no_text, huge_turn, nul_in_text, lone_surrogate,
    too_few_placeholders or too_many_placeholders.
    """
    if not isinstance(stated, list):
        raise Fault("malformed_turns", f"a conversation is a list of turns, not {_short(stated)}")
    said = [*_prompt(system), *(one for number, turn in enumerate(stated, start=1) for one in _turns(number, turn))]
    said, notes = _left_out(_with_slots(said) if placeholders else said)
    check_order([one.role for one in said])
    if images and not any(_slots(one.parts) for one in said):
        said = _in_front(said, images, placement)
    elif placement == "vila":
        said = [replace(one, parts=_as_vila(one.parts)) for one in said]
    said = _numbered(said, images)
    for one in said:
        text = "".join(part for part in one.parts if isinstance(part, str))
        check_text(one.role, text, number=one.number, images=len(_slots(one.parts)))
    return Conversation(tuple((one.role, tuple(part for part in one.parts if part != "")) for one in said), notes)


def with_images(
    stated: object, images: Sequence[Image], *, system: object = None
) -> tuple[tuple[Turn, ...], tuple[str, ...]]:
    """The turns and the notes of a conversation whose images are stored beside it, in columns or members of a tar."""
    talk = conversation(stated, len(images), system=system)

    def image(slot: Slot) -> Image:
        if slot.address is None:
            return images[slot.index or 0]
        if slot.address.startswith("data:"):
            return read(slot.address, None)
        raise Fault("external_image", f"{slot.address[:200]!r} is outside of the file; store the image in it")

    return talk.filled(map(image, talk.slots)), talk.notes


def _prompt(system: object) -> Iterator[_Said]:
    """The turn of a system prompt that a record states beside its turns; none if it states no text."""
    if is_absent(system):
        return
    if not isinstance(system, str):
        raise Fault("malformed_turns", f"`system` is {_short(system)}; it is the text of the system prompt")
    yield _Said(0, "role", "system", [system])


def _turns(number: int, turn: object) -> Iterator[_Said]:
    """The turn at a position, or the two of a {user, assistant}."""
    if not isinstance(turn, dict):
        raise Fault("malformed_turns", f"turn {number} is no object: {_short(turn)}")
    turn = {key: value for key, value in turn.items() if value is not None}
    _refuse_unsupported(number, turn)
    refuse_unread(turn, read=_READ)
    match turn:
        case {"user": str(question), "assistant": str(answer)}:
            yield _Said(number, "user", "user", [question])
            yield _Said(number, "user", "assistant", [answer])
        case {"role": role, **rest}:
            own = _role(number, role)
            yield _Said(number, "role", own, _content(number, own, rest.get("content")))
        case {"from": role, "value": str(text)}:
            yield _Said(number, "from", _role(number, role), [text])
        case _:
            forms = "{from, value}, {role, content} or {user, assistant}, each a text"
            raise Fault("malformed_turns", f"turn {number} is not {forms}: {_short(turn)}")


def _refuse_unsupported(number: int, turn: Mapping[str, Any]) -> None:
    """Raise Fault for a turn of a tool, and for one that is not to be trained on as it stands."""
    role = turn.get("role", turn.get("from"))
    if role in TOOLS or turn.get("tool_calls") or turn.get("function_call"):
        raise Fault(
            "tool_call", f"message {number} calls a tool or is a tool's answer, which is not supported; remove it"
        )
    for key in ("weight", "loss", "loss_scale", "train", "training"):
        if (weight := turn.get(key)) is not None and weight != 1:
            raise Fault(
                "weight", f"message {number} has {key} {_short(weight)}, but every answer counts; remove the message"
            )
    for key in _THOUGHTS:
        if not (is_absent(turn.get(key)) or isinstance(turn[key], bool)):
            raise Fault("malformed_turns", f"message {number} has `{key}`; write it into the content, or remove it")


def _role(number: int, stated: object) -> Role:
    if not isinstance(stated, str) or stated not in ROLES:
        raise Fault("unknown_role", f"message {number} has the role {_short(stated)}; known are {', '.join(ROLES)}")
    return ROLES[stated]


def _content(number: int, role: Role, content: object) -> Parts:
    if isinstance(content, str):
        return [content]
    if isinstance(content, list):
        return [_part(number, part) for part in content]
    if content is None and role == "system":
        return []
    raise Fault("malformed_turns", f"message {number} has {_short(content)} as content; it is text or a list of parts")


def _part(number: int, part: object) -> str | Slot:
    """A part of a message. Keys with null are those of other parts, as Parquet stores them."""
    stated = {key: value for key, value in part.items() if value is not None} if isinstance(part, dict) else {}
    kind = stated.get("type") or next((key for key in ("image", "image_url", "video", "text") if key in stated), None)
    payloads = [stated[key] for key in _PAYLOADS if not is_absent(stated.get(key))]
    text = stated.get("text")
    if isinstance(part, str):
        return part
    if kind == "text" and isinstance(text, str) and not payloads:
        return text
    if kind in ("image", "image_url") and not text and len(payloads) <= 1:
        if "base64" in stated and isinstance(stated["base64"], str):
            return Slot(address=f"data:;base64,{stated['base64']}")
        if payloads and (given := address(payloads[0])):
            return Slot(address=given)
        index = stated.get("index")
        if not payloads and kind == "image" and (index is None or type(index) is int):
            return Slot(index=index)
    if kind in ("video", "video_url"):
        raise Fault("video", f"message {number} has a video; sample its frames, and give them as images")
    raise Fault(
        "malformed_turns", f"message {number} has {_short(part)}; a part is of type text or image_url, or image"
    )


def _with_slots(said: Sequence[_Said]) -> list[_Said]:
    """The turns with a slot at each placeholder; unchanged if parts of messages are images. The Cauldron has none."""
    if any(_slots(one.parts) for one in said):
        return list(said)
    return [
        one if one.form == "user" else replace(one, parts=[part for text in one.parts for part in _split(str(text))])
        for one in said
    ]


def _left_out(said: Sequence[_Said]) -> tuple[list[_Said], tuple[str, ...]]:
    """The turns without empty system turns, and without a first turn of the assistant; and the reasons."""
    kept = [one for one in said if one.role != "system" or any(part != "" for part in one.parts)]
    notes = [EMPTY_SYSTEM] if len(kept) < len(said) else []
    first = next((one for one in kept if one.role != "system"), None)
    if first is not None and first.role == "assistant" and any(one.role == "user" for one in kept):
        if _slots(first.parts):
            raise Fault("turn_order", "the first turn is the assistant's and has an image; begin with the user's")
        kept.remove(first)
        notes.append(FIRST_ANSWER)
    return kept, tuple(notes)


def _in_front(said: Sequence[_Said], images: int, placement: Placement) -> list[_Said]:
    """The turns with all images before the first question. Raises Fault for LLaVA's form placed as it is written."""
    text = "".join(str(part) for one in said for part in one.parts)
    if numbered := _NUMBERED.search(text):
        raise Fault("too_few_placeholders", f"{numbered[0]!r} is no placeholder; write {PLACEHOLDER}, in order")
    first = next(one for one in said if one.role == "user")
    if placement == "vila":
        parts = _split((f"{PLACEHOLDER}\n" * images + "".join(map(str, first.parts)).strip()).strip())
    elif first.form == "from":
        check_placeholders(0, images)
    else:
        parts = [*([Slot()] * images), *first.parts]
    return [replace(one, parts=parts) if one is first else one for one in said]


def _as_vila(parts: Parts) -> Parts:
    """The parts of a turn with its images placed as by VILA's preprocess_multimodal: of v1.0 for one, of v1.5 for more.

    One comes before the text, with a newline between them. Several stay, with one space before and one newline after
    each. Blanks at the ends of the turn, and around each image, are removed.
    """
    slots = _slots(parts)
    if not slots:
        return parts
    text = "".join(PLACEHOLDER if isinstance(part, Slot) else part for part in parts)
    chunks = text.split(PLACEHOLDER)
    if len(slots) == 1:
        text = f"{PLACEHOLDER}\n{''.join(chunks).strip()}".strip()
    else:
        stripped = [chunk.strip() for chunk in chunks]
        text = f"{PLACEHOLDER}\n".join([*(f"{chunk} " for chunk in stripped[:-1]), stripped[-1]]).strip()
    unused = iter(slots)
    return [next(unused) if isinstance(part, Slot) else part for part in _split(text)]


def _numbered(said: Sequence[_Said], images: int) -> list[_Said]:
    """The turns with a number or an address in each slot. Raises Fault unless every image of the record has a slot."""
    free = [slot for one in said for slot in _slots(one.parts) if slot.address is None]
    stated = [slot.index for slot in free if slot.index is not None]
    if not stated:
        check_placeholders(len(free), images)
    elif len(stated) < len(free):
        raise Fault("malformed_turns", "some images have an `index` and some have none; give it to all, or to none")
    elif any(not 0 <= index < images for index in stated):
        raise Fault("too_many_placeholders", f"the images have the indices {stated}, but there are {images}, from 0")
    elif unused := set(range(images)) - set(stated):
        raise Fault("too_few_placeholders", f"no part of a message has the index {min(unused)}, of {images} images")
    numbers = iter(range(images))

    def numbered(part: str | Slot) -> str | Slot:
        is_next = isinstance(part, Slot) and part.address is None and part.index is None
        return Slot(index=next(numbers)) if is_next else part

    return [replace(one, parts=[numbered(part) for part in one.parts]) for one in said]


def _slots(parts: Parts) -> list[Slot]:
    return [part for part in parts if isinstance(part, Slot)]


def _split(text: str) -> Parts:
    """The text around placeholders, with a slot for each placeholder."""
    first, *rest = text.split(PLACEHOLDER)
    return [first, *(part for piece in rest for part in (Slot(), piece))]


def _short(value: object) -> str:
    return repr(value)[:100]
