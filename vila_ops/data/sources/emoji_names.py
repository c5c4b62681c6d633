"""CLDR names and groups of emoji, from emojibase-data: an emoji is one object in every drawing style."""

import json
from functools import lru_cache
from pathlib import Path

GROUPS = ("smileys-emotion", "people-body", "animals-nature", "food-drink", "travel-places", "activities", "objects")
"""Groups of emoji that show an object; not symbols and flags."""


@lru_cache(maxsize=2)
def emoji_names(folder: Path) -> dict[str, tuple[str, str]]:
    """Plain hex code -> (label, "group/subgroup") of the base emoji; skin tones are listed inside them."""
    meta = json.loads((folder / "meta/groups.json").read_text(encoding="utf-8"))
    names = {}
    for emoji in json.loads((folder / "en/data.json").read_text(encoding="utf-8")):
        group = meta["groups"].get(str(emoji.get("group")))
        if group in GROUPS:
            category = f"{group}/{meta['subgroups'][str(emoji['subgroup'])]}"
            names[plain_code(emoji["hexcode"])] = (emoji["label"], category)
    return names


def plain_code(code: str) -> str:
    """Lower case without the variation selector, which not every package writes."""
    return code.lower().replace("-fe0f", "")


def caption_of(label: str) -> str:
    """The label as a sentence."""
    return f"{label[:1].upper()}{label[1:]}."
