"""Train files, which demonstrations are from: the sample of a test split under the names of the train split."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.eval.benchmarks.sample import SAMPLES, config_of, sample_items
from vila_ops.config.benchmarks import (
    ChartQa,
    CocoCaptions,
    DocVqa,
    Flickr30kCaptions,
    Gqa,
    Mmmu,
    OkVqa,
    ScienceQa,
    TextVqa,
    VizWiz,
    VqaV2,
)
from vila_ops.eval.benchmark import benchmark_of


def renamed(folder: Path, old: str, new: str) -> None:
    """Rename a split in the names and the texts of the files of a folder."""
    for path in sorted(folder.rglob("*"), key=lambda path: -len(path.parts)):
        if path.suffix in (".json", ".tsv", ".txt"):
            path.write_text(re.sub(old, new, path.read_text()))
        if (name := re.sub(old, new, path.name)) != path.name:
            path.rename(path.with_name(name))


def of_pids(folder: Path) -> None:
    splits = json.loads((folder / "pid_splits.json").read_text())
    (folder / "pid_splits.json").write_text(json.dumps({"train": splits["test"], "test": []}))
    (folder / "test").rename(folder / "train")


SPLITS: list[tuple[Any, Callable[[Path], None]]] = [
    (VqaV2, lambda folder: renamed(folder, "val2014", "train2014")),
    (OkVqa, lambda folder: renamed(folder, "val2014", "train2014")),
    (TextVqa, lambda folder: renamed(folder, '(?<=_)val(?=.json)|(?<=")val(?=")', "train")),
    (Gqa, lambda folder: renamed(folder, "testdev_balanced", "train_balanced")),
    (VizWiz, lambda folder: renamed(folder, "^val$|^val(?=.json)|(?<=VizWiz_)val", "train")),
    (ScienceQa, of_pids),
    (ChartQa, lambda folder: renamed(folder, "^test", "train")),
    (DocVqa, lambda folder: renamed(folder, '^val|(?<=")val(?=")', "train")),
    (CocoCaptions, lambda folder: renamed(folder, '(?<=")test(?=")', "restval")),
    (Flickr30kCaptions, lambda folder: renamed(folder, '(?<=")test(?=")', "train")),
    (Mmmu, lambda folder: renamed(folder, "^validation(?=-)", "dev")),
]


@pytest.mark.parametrize(("kind", "change"), SPLITS, ids=[kind.model_fields["kind"].default for kind, _ in SPLITS])
def test_train_items_are_those_of_the_train_file(kind: Any, change: Any, tmp_path: Path) -> None:
    config = config_of(kind)
    without_train = shutil.ignore_patterns("*train2014*")
    folder = Path(shutil.copytree(SAMPLES / config.kind, tmp_path / config.kind, ignore=without_train))
    change(folder)
    module: Any = benchmark_of(config.kind)
    asked = [(item.parts, item.answer, item.references) for item in sample_items(config)]
    trained = [(item.parts, item.answer, item.references) for item in module.train_items(folder, config)]
    assert [one for one in trained if one in asked] == asked
    assert all(answer for _, answer, _ in trained)
    ids = {item.id for item in module.train_items(folder, config)}
    assert config.kind != "chartqa" or not ids & {item.id for item in sample_items(config)}


def test_the_sample_has_a_train_file_with_the_most_frequent_answers() -> None:
    config: Any = config_of(OkVqa)
    module: Any = benchmark_of("okvqa")
    items = list(module.train_items(SAMPLES / "okvqa", config))
    assert len(items) == 10
    assert len({item.group for item in items}) == 5
    assert [item.answer for item in items[:3]] == ["noon", "sunscreen", "doctor"]
    assert not any(item.problem() for item in items)
