"""Published numbers beside a metric that was measured in the same way; see baselines.yaml."""

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from vila_ops.config import Config

FILE = Path(__file__).with_name("baselines.yaml")


class Published(Config):
    """A number of a paper, in the unit of the metric."""

    model: str
    value: float
    source: str


def published(measure: str, settings: Mapping[str, Any], num_items: int) -> tuple[Published, ...]:
    """The published numbers of a metric; empty where the benchmark was measured in another way.

    `measure` is the metric's name in its benchmark's own result; settings and number of items are the benchmark's. A
    part of the items is another measurement.
    """
    known = _known()
    metric = known["metrics"].get(measure)
    if metric is None or settings.get("first") is not None or metric.get("items", num_items) != num_items:
        return ()
    if any(settings.get(key) != value for key, value in metric.get("settings", {}).items()):
        return ()
    note = f"; {metric['note']}" if "note" in metric else ""
    return tuple(
        Published(model=model, value=value / metric["of"], source=source + note)
        for (model, source), value in zip(known["models"].items(), metric["values"], strict=True)
    )


@cache
def _known() -> dict[str, Any]:
    known: dict[str, Any] = yaml.safe_load(FILE.read_text(encoding="utf-8"))
    return known
