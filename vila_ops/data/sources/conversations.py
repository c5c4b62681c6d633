"""Checks that apply to conversations of every format. Pure."""

from collections.abc import Sequence

from vila_ops.data.records import Role
from vila_ops.data.sources.faults import Fault, checked

PLACEHOLDER = "<image>"
MAX_TURN = 1_000_000
"""Characters, about a hundred times the length of a sample. A longer turn is a dump or a file without line breaks."""


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
