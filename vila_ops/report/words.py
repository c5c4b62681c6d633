"""Numbers, times and places as a reader sees them. Pure."""

import math
import re
from collections.abc import Sequence
from datetime import datetime
from typing import Any

Json = dict[str, Any]

DASH = "–"
LONG_ID = re.compile(r"[0-9a-f-]{16,}")


def number(value: float | None) -> str:
    """A number with three decimals, or with two digits where that would be zero; None and NaN as a dash."""
    if value is None or math.isnan(value):
        return DASH
    digits = f"{value:,.0f}" if isinstance(value, int) else f"{value:.3f}" if abs(value) < 1000 else f"{value:,.1f}"
    if value and not float(digits.replace(",", "")):
        digits = f"{value:.2g}"
    return digits.replace("-", "−")


def signed(value: float) -> str:
    """A difference, with its sign."""
    return f"+{number(value)}" if value > 0 else number(value)


def duration(seconds: float | None) -> str:
    """A duration as seconds, minutes and seconds, or hours and minutes."""
    if seconds is None:
        return DASH
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def moment(iso: str) -> str:
    """An ISO time for readers, in its own time zone; any other text unchanged."""
    try:
        time = datetime.fromisoformat(iso)
    except ValueError:
        return iso
    return f"{time.day} {time:%B %Y, %H:%M %Z}".strip()


def short(name: str | None) -> str:
    """The first twelve digits of a digest or an id; other names unchanged, because a cut address is another address."""
    if not name:
        return DASH
    return name[:12] if LONG_ID.fullmatch(name) else name


def web(url: str | None) -> str | None:
    """The URL if it is http or https, else None: databases and scripts are no links."""
    return url if url and url.startswith(("http://", "https://")) else None


def plain(value: object) -> str:
    """A value of a free-form table."""
    match value:
        case None:
            return DASH
        case bool():
            return "yes" if value else "no"
        case float():
            return number(value)
        case dict():
            return ", ".join(f"{key} {plain(item)}" for key, item in value.items()) or DASH
        case list() | tuple():
            return ", ".join(plain(item) for item in value) or DASH
        case _:
            return str(value)


def workers(ran: Sequence[Json]) -> str:
    """How a stage's workers were launched."""
    if not ran:
        return DASH
    first = ran[0]
    world = first.get("world_size", len(ran))
    launch = {"inline": "inline, in this process", "ray": "Ray"}.get(first.get("launch", ""), first.get("launch"))
    parts = [launch, f"world size {world}", f"ZeRO stage {first.get('zero_stage', DASH)}", first.get("engine")]
    return " · ".join(str(part) for part in parts if part)


def where(worker: Json) -> str:
    """Where a worker ran, with short ids."""
    known = {key: worker[key] for key in ("rank", "node", "actor", "pid") if worker.get(key) is not None}
    parts = [f"{key} {short(str(value))}" for key, value in known.items()]
    return " · ".join(parts) or str(worker.get("launch") or DASH)


def same_words(answer: str, truth: str) -> bool:
    """Whether two captions differ only in capitals, punctuation and spaces."""
    first, second = (re.findall(r"\w+", text.casefold()) for text in (answer, truth))
    return first == second
