"""What official codes gave on generated items, recorded with the code's version; see `made_with` in each file."""

import json
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[2] / "golden" / "metrics"


def recorded(name: str) -> dict[str, Any]:
    """The content of a file, with its `items`."""
    content: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    return content
