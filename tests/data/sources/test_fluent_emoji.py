import json
from collections.abc import Callable
from pathlib import Path

import pytest

from vila_ops.config.package import Package
from vila_ops.config.sources import FluentEmoji
from vila_ops.data.records import Dropped, Image, Record, Turn
from vila_ops.data.sources.fluent_emoji import keys

ReadAll = Callable[[FluentEmoji, dict[str, Path]], list[list[Record | Dropped]]]

RENDERS = Package(registry="npm", name="@a/renders", version="1.0.0", sha256="0" * 64, licence="MIT")
NAMES = Package(registry="npm", name="names", version="2.0.0", sha256="1" * 64, licence="MIT")
SOURCE = FluentEmoji(render="caption", package=RENDERS, names=NAMES)
EMOJI = [
    {"label": "red apple", "hexcode": "1F34E", "group": 4, "subgroup": 42},
    {"label": "T-Rex", "hexcode": "1F996", "group": 3, "subgroup": 37},
    {"label": "airplane", "hexcode": "2708", "group": 5, "subgroup": 56},
    {"label": "waving hand", "hexcode": "1F44B", "group": 1, "subgroup": 16, "skins": [{"hexcode": "1F44B-1F3FB"}]},
    {"label": "regional indicator A", "hexcode": "1F1E6"},
]
GROUPS = {
    "groups": {"1": "people-body", "3": "animals-nature", "4": "food-drink", "5": "travel-places"},
    "subgroups": {"16": "hand", "37": "animal-reptile", "42": "food-fruit", "56": "transport-air"},
}


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    renders, names = tmp_path / "renders", tmp_path / "names"
    (renders / "assets").mkdir(parents=True)
    for stem in ("1f34e", "1f996", "2708-fe0f", "1f44b", "1f44b-1f3fb", "1f1e6"):
        (renders / f"assets/{stem}.webp").write_bytes(stem.encode())
    (names / "en").mkdir(parents=True)
    (names / "meta").mkdir()
    (names / "en/data.json").write_text(json.dumps(EMOJI))
    (names / "meta/groups.json").write_text(json.dumps(GROUPS))
    return {"@a/renders": renders, "names": names}


def test_keys_are_of_our_groups_without_skin_tones(folders: dict[str, Path]):
    assert keys(folders["@a/renders"], folders["names"]) == ["1f34e", "1f44b", "1f996", "2708-fe0f"]


def test_a_render_is_captioned_with_its_name(folders: dict[str, Path], read_all: ReadAll):
    assert read_all(SOURCE, folders)[0] == [
        Record(
            id="1f34e",
            object="apple",
            turns=(Turn("document", (Image(b"1f34e"), "Red apple.")),),
            category="food-drink/food-fruit",
            licence="MIT",
            provenance="npm:@a/renders@1.0.0/assets/1f34e.webp",
        )
    ]


def test_capitals_of_a_name_are_kept_and_the_variation_selector_does_not_matter(
    folders: dict[str, Path], read_all: ReadAll
):
    _, _, (rex,), (airplane,) = read_all(SOURCE, folders)
    assert isinstance(rex, Record)
    assert isinstance(airplane, Record)
    assert (rex.turns[0].parts[1], airplane.turns[0].parts[1]) == ("T-Rex.", "Airplane.")


def test_it_needs_the_renders_and_the_names():
    assert SOURCE.packages() == (RENDERS, NAMES)
