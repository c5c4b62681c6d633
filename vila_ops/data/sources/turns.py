"""Conversations that are stored beside their images, in columns or tar members, to turns. Pure."""

from collections.abc import Iterator, Sequence
from typing import Any

from vila_ops.data.records import Image, Part, Role, Turn
from vila_ops.data.sources.conversations import PLACEHOLDER, check_order, check_placeholders, check_text
from vila_ops.data.sources.faults import Fault

ROLES: dict[str, Role] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}

_Slots = list[str | None]
"""The content of a turn; None is the position of the next image."""


def turns(conversation: object, images: Sequence[Image]) -> tuple[Turn, ...]:
    """The turns of one conversation, with each image at its placeholder.

    A list of {from, value} (LLaVA), of {role, content} (chat messages; content is text, or a list of {type: text} and
    {type: image}), or of {user, assistant} (The Cauldron, whose images have no placeholders and come before the
    first question). `<image>` in text is a placeholder. Raises Fault: malformed_turns, turn_order,
    too_few_placeholders, too_many_placeholders, no_text, nul_in_text or lone_surrogate.
    """
    if not isinstance(conversation, list) or not conversation:
        raise Fault("malformed_turns", f"a conversation is a list of turns, not {_short(conversation)}")
    slots = [slot for turn in conversation for slot in _turn(turn)]
    check_order([role for role, _ in slots])
    if isinstance(conversation[0], dict) and "assistant" in conversation[0]:
        slots[0][1][:0] = [None] * len(images)
    check_placeholders(sum(parts.count(None) for _, parts in slots), len(images))
    unused = iter(images)
    filled_turns = []
    for number, (role, parts) in enumerate(slots, start=1):
        check_text(role, "".join(part or "" for part in parts), number=number, images=parts.count(None))
        filled: tuple[Part, ...] = tuple(next(unused) if part is None else part for part in parts if part != "")
        filled_turns.append(Turn(role, filled))
    return tuple(filled_turns)


def _turn(turn: object) -> Iterator[tuple[Role, _Slots]]:
    match turn:
        case {"from": str(role), "value": str(text)} | {"role": str(role), "content": str(text)} if role in ROLES:
            yield ROLES[role], _split(text)
        case {"role": str(role), "content": list(parts)} if role in ROLES:
            yield ROLES[role], [_content(part) for part in parts]
        case {"user": str(question), "assistant": str(answer)}:
            yield "user", [question]
            yield "assistant", [answer]
        case _:
            forms = "{from, value}, {role, content} or {user, assistant}"
            raise Fault("malformed_turns", f"a turn is {forms} with the roles {', '.join(ROLES)}: {_short(turn)}")


def _content(part: object) -> str | None:
    match part:
        case {"type": "text", "text": str(text)}:
            return text
        case {"type": "image"}:
            return None
        case _:
            raise Fault("malformed_turns", f"a part of a message is of type text or image: {_short(part)}")


def _split(text: str) -> _Slots:
    """The text around placeholders, with None for each placeholder."""
    first, *rest = text.split(PLACEHOLDER)
    slots: _Slots = [first]
    for piece in rest:
        slots += [None, piece]
    return slots


def _short(value: Any) -> str:
    return repr(value)[:100]
