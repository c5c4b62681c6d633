"""Checks that apply to conversations of every format. Pure."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from vila_ops.data.records import Role
from vila_ops.data.sources.faults import Fault, checked
from vila_ops.data.sources.media import is_absent

PLACEHOLDER = "<image>"
MAX_TURN = 1_000_000
"""Characters, about a hundred times the length of a sample. A longer turn is a dump or a file without line breaks."""

SYSTEM = "system"
"""Key of a record with its system prompt, beside its turns, as LLaMA-Factory and ms-swift have it."""
TOOLS, OBJECTS = "tools", "objects"
ANSWERS = ("chosen", "rejected", "rejected_response", "rejected_messages")
"""Keys of preference data: of TRL, LLaMA-Factory and ms-swift."""
TAGS = ("label", "kto_tag")
"""Keys that are false beside a bad answer, in ms-swift and LLaMA-Factory."""
BESIDE = (SYSTEM, TOOLS, OBJECTS, *ANSWERS, *TAGS)
"""Keys of a record beside its turns that change what they mean."""


def prompt_beside(value: Mapping[str, Any], ignore: Collection[str]) -> object:
    """What a record states as its system prompt beside its turns; None if it states none, or it is ignored.

    Raises Fault (tool_call, preference, unfilled_boxes) for a key beside the turns that is not read. Without tools, the
    worse answer, or the coordinates for placeholders in its text, the record means another thing.
    """
    for key in BESIDE:
        stated = value.get(key)
        if key in ignore or is_absent(stated) or (stated is not False if key in TAGS else stated in (False, "[]")):
            continue
        if key == TOOLS:
            reason, why = "tool_call", "describes tools, which are not supported"
        elif key in (*ANSWERS, *TAGS):
            reason, why = "preference", "is of preference data, but every answer in the turns is trained on"
        elif key == OBJECTS and ("<bbox>" in repr(value) or "<ref-object>" in repr(value)):
            reason, why = "unfilled_boxes", "fills <bbox> and <ref-object> in ms-swift; write them into the text"
        else:
            continue
        raise Fault(reason, f"`{key}` {why}; remove the record or the key, or set `ignore: [{key}]` of the source")
    return None if SYSTEM in ignore else value.get(SYSTEM)


def check_order(roles: Sequence[Role]) -> None:
    """Raise Fault unless user and assistant alternate, after at most one system turn; the last may be the user's."""
    rest = roles[1:] if roles[:1] == ["system"] else roles
    if any(role != ("user", "assistant")[number % 2] for number, role in enumerate(rest)) or len(rest) < 2:
        raise Fault(
            "turn_order", f"user and assistant take turns, the user first; here {', '.join(roles[:9]) or 'none'}"
        )


def check_text(role: Role, text: str, *, number: int, images: int) -> None:
    """Raise Fault if the text of a turn is damaged, huge or empty. A user turn with an image may have no text."""
    if len(text) > MAX_TURN:
        raise Fault("huge_turn", f"turn {number} ({role}) has {len(text):,} characters, more than {MAX_TURN:,}; cut it")
    checked(text, what=f"turn {number} ({role})")
    if not text.strip() and (role != "user" or not images):
        raise Fault("no_text", f"turn {number} ({role}) is empty")


def check_placeholders(placeholders: int, images: int) -> None:
    """Raise Fault unless there are as many placeholders as images."""
    if placeholders != images:
        reason = "too_few_placeholders" if placeholders < images else "too_many_placeholders"
        raise Fault(reason, f"{placeholders} of {PLACEHOLDER} for {images} images; each needs one, where it belongs")
