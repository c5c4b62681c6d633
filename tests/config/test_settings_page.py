"""docs/settings.md: its tables are those of the classes, and its recipe is one."""

import json
import os
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

import pytest
from PIL import Image
from typer.testing import CliRunner

from vila_ops.cli import app
from vila_ops.config.base import Config
from vila_ops.config.run import Run
from vila_ops.config.sources import Rendering

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/settings.md").read_text()
MICRO_MODEL = (
    "model={vision_tower: {kind: random}, projector: {kind: mlp_gelu}, image_size: 28, patch_size: 14, "
    f"language_model: {{kind: random, tokenizer: {ROOT}/tests/tiny/tokenizer}}}}"
)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """The page's recipe where it says, beside the committed pieces."""
    (tmp_path / "configs/recipes").mkdir(parents=True)
    for piece in ("models", "mixtures", "services", "sources", "stages", "suites"):
        os.symlink(ROOT / "configs" / piece, tmp_path / "configs" / piece)
    file = tmp_path / "configs/recipes/mine.yaml"
    file.write_text(PAGE.partition("```yaml\n")[2].partition("```")[0])
    return file


@pytest.fixture
def resources(tmp_path: Path) -> Path:
    file = tmp_path / "resources.yaml"
    file.write_text("{launch: inline, storage: {store: store, data: data, cache: cache}}")
    return file


def run(*words: str | Path) -> str:
    result = CliRunner().invoke(app, list(map(str, words)))
    assert result.exit_code == 0, result.output
    return result.stdout


def reachable(kind: Any) -> Iterator[type[Config]]:
    """The config classes that a type leads to."""
    if isinstance(kind, type) and issubclass(kind, Config):
        yield kind
        for field in kind.model_fields.values():
            yield from reachable(field.annotation)
    for one in get_args(kind):
        yield from reachable(one)


def rows() -> dict[str, dict[str, list[str]]]:
    """By heading and key, the other cells."""
    found: dict[str, dict[str, list[str]]] = {}
    for part in re.split(r"^### ", PAGE, flags=re.MULTILINE)[1:]:
        lines = [line[2:-2].split(" | ") for line in part.splitlines() if line.startswith("| `")]
        found[part.split("\n")[0]] = {cells[0].strip("`"): cells[1:] for cells in lines}
    return found


def test_the_page_is_what_make_settings_writes(docs_script: Callable[[str], ModuleType]) -> None:
    made = docs_script("settings")
    assert PAGE.partition(made.START)[2].partition(made.END)[0].strip() == "\n".join(made.lines()).strip()


def test_every_setting_of_a_run_is_on_the_page() -> None:
    classes = set(reachable(Run)) - {Run}
    assert len(classes) > 50
    table = rows()
    for one in classes:
        listed = {key for parent in one.__mro__ for key in table.get(parent.__name__, {})}
        assert one.__name__ in table
        assert set(one.model_fields) <= listed


def test_no_link_of_the_page_leads_nowhere() -> None:
    headings = re.findall(r"^##+ (.*)$", PAGE, flags=re.MULTILINE)
    anchors = {re.sub(r"[^a-z0-9_ -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    assert set(re.findall(r"\]\(#([^)]*)\)", PAGE)) <= anchors


@pytest.mark.parametrize(
    ("heading", "key", "cells"),
    [
        ("Stage", "learning_rate", ["number > 0", "required"]),
        ("Stage", "warmup_ratio", ["number ≥ 0, < 1", "`0.03`"]),
        ("Stage", "max_grad_norm", ["number > 0, or `null`", "`1.0`"]),
        ("Stage", "precision", ["`fp32` or `bf16`", "required"]),
        ("Lora", "kind", ["`lora`", "required"]),
        ("Jpeg", "quality", ["whole number from 1 to 100", "`95`"]),
        ("Model", "weights", ["[`folder`](#folderweights), or `null`", "`null`"]),
        ("Mixture", "split", ["[`Split`](#split)", "its defaults"]),
        ("Recipe", "stages", ["mapping, key: text; value: [`Stage`](#stage)", "required"]),
        ("Rule", "max_regression", ["number ≥ 0, or `null`", "`null`"]),
        ("Package", "sha256", ["64 hexadecimal digits", "required"]),
        ("Table", "render", ["`caption` or `conversation`", "`caption`"]),
    ],
)  # fmt: skip
def test_a_row_says_in_words_what_its_field_takes(heading: str, key: str, cells: list[str]) -> None:
    assert rows()[heading][key][:2] == cells


def test_the_text_under_a_field_or_its_type_is_its_meaning() -> None:
    table = rows()
    assert table["Stage"]["num_steps"][2] == "Number of optimizer steps; give either this or `epochs`."
    assert table["Model"]["image_aspect_ratio"][2].startswith("How an image becomes a square. pad: the whole image")
    assert "`null`: it is not clipped" in table["Stage"]["max_grad_norm"][2]


def test_every_rendering_is_explained() -> None:
    for word in get_args(Rendering):
        assert f"\n| `{word}` | " in PAGE.partition("## What `render` makes")[2].partition("<!-- made")[0]


def test_the_page_s_recipe_loads_and_shows_what_it_trains(recipe: Path, resources: Path) -> None:
    said = run("show", recipe, "-r", resources)
    assert re.search(r"^align +projector ", said, flags=re.MULTILINE)
    assert "1 epoch" in said


def test_the_page_s_recipe_trains(recipe: Path, resources: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """On the images and the table that it names, with a micro-model in the place of the demo's."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine/images").mkdir(parents=True)
    names = [f"{number}.png" for number in range(40)]
    for number, name in enumerate(names):
        Image.new("RGB", (30, 20), (number * 6, 0, 0)).save(tmp_path / "mine/images" / name)
    (tmp_path / "mine/captions.csv").write_text("image,text\n" + "".join(f"{name},A red square.\n" for name in names))
    made = json.loads(run("train", recipe, "-r", resources, "--stage", "align", "-s", MICRO_MODEL, "--json"))
    assert made["stage"] == "align"
    assert made["step"] >= 1


def test_the_page_s_overrides_are_taken(recipe: Path, resources: Path) -> None:
    words = [word for line in PAGE.splitlines() if line.startswith("-s ") for word in shlex.split(line)]
    shown = json.loads(run("show", recipe, "-r", resources, *words, "--json"))
    stage = shown["recipe"]["stages"]["align"]
    assert stage["learning_rate"] == 5e-4
    assert stage["tuning"] == {"kind": "lora", "rank": 16, "alpha": 16.0, "dropout": 0.05, "quantise": None}
    assert shown["resources"]["train"]["micro_batch_size"] == 2
