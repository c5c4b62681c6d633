"""Conversations as columns and JSON hold them (LLaVA, chat messages, question-answer pairs) to turns. Pure."""

from collections.abc import Iterator, Sequence
from typing import Any

from vila_ops.data.records import Image, Part, Role, Turn
from vila_ops.data.sources.faults import Fault, checked

PLACEHOLDER = "<image>"
ROLES: dict[str, Role] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}

_Slots = list[tuple[Role, list[str | None]]]
"""What each side says; None is where the next picture belongs."""


def turns(conversation: object, pictures: Sequence[Image]) -> tuple[Turn, ...]:
    """The turns of one conversation, each picture where its placeholder stands.

    A list of {from, value} (LLaVA), {role, content} (chat messages; content is text or a list of {type: text | image})
    or {user, assistant}. `<image>` in text is a placeholder; without any, all pictures stand before the first question.
    Raises Fault: malformed_turns, turn_order, image_count, no_text, nul_in_text or lone_surrogate.
    """
    if not isinstance(conversation, list) or not conversation:
        raise Fault("malformed_turns", f"a conversation is a list of turns, not {_short(conversation)}")
    slots = [slot for turn in conversation for slot in _turn(turn)]
    _check_order([role for role, _ in slots])
    return _filled(slots, pictures)


def _turn(turn: object) -> Iterator[tuple[Role, list[str | None]]]:
    match turn:
        case {"from": str(role), "value": str(text)} | {"role": str(role), "content": str(text)} if role in ROLES:
            yield ROLES[role], _split(text)
        case {"role": str(role), "content": list(parts)} if role in ROLES:
            yield ROLES[role], [_content(part) for part in parts]
        case {"user": str(question), "assistant": str(answer)}:
            yield "user", _split(question)
            yield "assistant", _split(answer)
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


def _split(text: str) -> list[str | None]:
    """The text around placeholders, which become None."""
    first, *rest = text.split(PLACEHOLDER)
    slots: list[str | None] = [first]
    for piece in rest:
        slots += [None, piece]
    return slots


def _check_order(roles: list[Role]) -> None:
    spoken = roles[1:] if roles[0] == "system" else roles
    if not spoken or len(spoken) % 2 or spoken != ["user", "assistant"] * (len(spoken) // 2):
        raise Fault("turn_order", f"user and assistant take turns, the user first: {', '.join(roles[:20])}")


def _filled(slots: _Slots, pictures: Sequence[Image]) -> tuple[Turn, ...]:
    wanted = sum(part is None for _, parts in slots for part in parts)
    if wanted == 0 and pictures:
        first = next(parts for role, parts in slots if role == "user")
        first[:0] = [None] * len(pictures)
    elif wanted != len(pictures):
        raise Fault("image_count", f"{wanted} placeholders, {len(pictures)} pictures; each picture needs one")
    left = iter(pictures)
    made = []
    for role, parts in slots:
        filled: tuple[Part, ...] = tuple(next(left) if part is None else part for part in parts if part != "")
        _check_text(role, [part for part in filled if isinstance(part, str)], has_picture=None in parts)
        made.append(Turn(role, filled))
    return tuple(made)


def _check_text(role: Role, texts: list[str], *, has_picture: bool) -> None:
    for text in texts:
        checked(text, what=role)
    if not any(text.strip() for text in texts) and (role == "assistant" or not has_picture):
        raise Fault("no_text", f"an empty turn of the {role}")


def _short(value: Any) -> str:
    return repr(value)[:100]
