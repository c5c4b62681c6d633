import json
from collections.abc import Callable
from pathlib import Path

import pytest

from vila_ops.config.package import Package
from vila_ops.config.sources import EmojiDatasource, FluentEmoji
from vila_ops.data.records import Dropped, Image, Record, Turn
from vila_ops.data.sources.emoji_datasource import keys

ReadAll = Callable[[EmojiDatasource | FluentEmoji, dict[str, Path]], list[list[Record | Dropped]]]

IMAGES = Package(registry="npm", name="flat", version="1.0.0", sha256="0" * 64, licence="CC-BY-4.0")
RENDERS = Package(registry="npm", name="renders", version="1.0.0", sha256="2" * 64, licence="MIT")
NAMES = Package(registry="npm", name="names", version="2.0.0", sha256="1" * 64, licence="MIT")
EMOJI = [
    {"label": "red apple", "hexcode": "1F34E", "group": 4, "subgroup": 42},
    {"label": "airplane", "hexcode": "2708", "group": 5, "subgroup": 56},
    {"label": "waving hand", "hexcode": "1F44B", "group": 1, "subgroup": 16, "skins": [{"hexcode": "1F44B-1F3FB"}]},
]
GROUPS = {
    "groups": {"1": "people-body", "4": "food-drink", "5": "travel-places"},
    "subgroups": {"16": "hand", "42": "food-fruit", "56": "transport-air"},
}


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    flat, renders, names = (tmp_path / name for name in ("flat", "renders", "names"))
    (flat / "img/vendor/64").mkdir(parents=True)
    (flat / "img/vendor/sheets").mkdir()
    (renders / "assets").mkdir(parents=True)
    for stem in ("1f34e", "2708-fe0f", "1f44b", "1f44b-1f3fb", "0023-fe0f-20e3"):
        (flat / f"img/vendor/64/{stem}.png").write_bytes(stem.encode())
        (renders / f"assets/{stem.replace('-fe0f', '')}.webp").write_bytes(b"r")
    (flat / "img/vendor/sheets/1f34e.png").write_bytes(b"a sheet")
    (names / "en").mkdir(parents=True)
    (names / "meta").mkdir()
    (names / "en/data.json").write_text(json.dumps(EMOJI))
    (names / "meta/groups.json").write_text(json.dumps(GROUPS))
    return {"flat": flat, "renders": renders, "names": names}


def test_keys_are_the_small_images_of_our_groups_without_skin_tones(folders: dict[str, Path]) -> None:
    small = "img/vendor/64"
    assert keys(folders["flat"], folders["names"]) == [
        f"{small}/{stem}.png" for stem in ("1f34e", "1f44b", "2708-fe0f")
    ]


def test_an_emoji_is_the_same_object_with_the_same_caption_in_both_styles(
    folders: dict[str, Path], read_all: ReadAll
) -> None:
    flat = read_all(EmojiDatasource(render="caption", package=IMAGES, names=NAMES), folders)
    assert flat[0] == [
        Record(
            id="1f34e",
            object="apple",
            turns=(Turn("document", (Image(b"1f34e"), "Red apple.")),),
            category="food-drink/food-fruit",
            licence="CC-BY-4.0",
            provenance="npm:flat@1.0.0/img/vendor/64/1f34e.png",
        )
    ]
    other = read_all(FluentEmoji(render="caption", package=RENDERS, names=NAMES), folders)
    named = [[(one.object, one.category) for (one,) in style if isinstance(one, Record)] for style in (flat, other)]
    assert named[0] == named[1]
    assert len(named[0]) == 3
