"""Damage in sealed shards and datasets: nothing is made of it, and the printed way out works."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vila_ops.artifacts.kinds import Dataset
from vila_ops.artifacts.store import opened, verify
from vila_ops.config import Mixture, Resources, Stage, TextFormat
from vila_ops.data.loading.loader import RowLoader
from vila_ops.data.preprocess.prepare import prepare
from vila_ops.data.shards import index_of, samples_of
from vila_ops.errors import CorruptArtifact

Prepare = Callable[..., Dataset]


@pytest.fixture
def prepared(make_resources: Any, make_text: Any, tiny: Path, tmp_path: Path) -> Prepare:
    """Prepares a mixture of some of the tiny sources."""
    text: TextFormat = make_text()

    def make(*names: str, store: str = "work") -> Dataset:
        renders = {"pairs": "caption", "definitions": "definition"}
        sources = {name: {"kind": "jsonl", "path": str(tiny / name), "render": renders[name]} for name in names}
        mixture = Mixture.model_validate({"name": "own", "sources": sources, "shard_bytes": 40_000})
        resources: Resources = make_resources(tmp_path / store)
        return prepare(mixture, text, resources)

    return make


def shard_of(dataset: Dataset) -> Path:
    """The first shard with samples."""
    found = sorted(Path(dataset.uri).parents[1].glob("shard/*/*/shard.tar"))
    return next(path.parent for path in found if path.stat().st_nlink > 1)


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def follow(message: str, away: Path) -> list[str]:
    """Do what the message says; returns what it named."""
    found = re.search(r"move (?:all of )?(.+) away and run again", message)
    assert found, message
    away.mkdir(exist_ok=True)
    for folder in found[1].split(", "):
        shutil.move(folder, away / "-".join(Path(folder).parts[-2:]))
    return found[1].split(", ")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["index.parquet", "counts.json", "dropped.parquet", "shard.tar"])
def test_a_new_revision_takes_nothing_from_a_damaged_shard(name: str, prepared: Prepare, tmp_path: Path) -> None:
    sound = prepared("definitions", "pairs", store="undamaged").digest
    first = prepared("definitions")
    shard = shard_of(first)
    if name == "counts.json":
        text = (shard / name).read_text()
        digit = re.search(r"[1-9]", text)
        assert digit
        (shard / name).write_text(f"{text[: digit.start()]}{int(digit[0]) % 9 + 1}{text[digit.end() :]}")
    else:
        flip(shard / name, (shard / name).stat().st_size // 2)
    with pytest.raises(CorruptArtifact, match=rf"{shard}/{re.escape(name)} has sha256") as told:
        prepared("definitions", "pairs")
    assert len(list(tmp_path.glob("work/**/dataset/*/manifest.json"))) == 1
    linking = [first.uri] if name == "shard.tar" else []
    assert follow(str(told.value), tmp_path / "away") == [str(shard.parent), *linking]
    again = prepared("definitions", "pairs")
    verify(again)
    assert again.digest == sound


def test_the_way_out_of_a_damaged_dataset_works(prepared: Prepare, make_stage: Any, tmp_path: Path) -> None:
    made = prepared("pairs")
    index = index_of(made).to_pylist()
    tar = opened(made).places[index[0]["shard"]][0]
    flip(Path(tar), Path(tar).stat().st_size // 2)
    source = {"kind": "jsonl", "path": "unread", "render": "caption"}
    mixture = Mixture.model_validate({"name": "own", "sources": {"pairs": source}})
    stage: Stage = make_stage(mixture, global_batch_size=16, num_steps=4)
    rows = RowLoader(opened(made).file, digest=made.digest, stage=stage, cache=tmp_path / "plans")
    shared = next(path for path in tmp_path.glob("work/**/shard/*/*/shard.tar") if path.samefile(tar))
    for read in (lambda: list(samples_of(made, index)), lambda: [rows.batch(step) for step in range(4)]):
        with pytest.raises(CorruptArtifact, match=rf"{tar} has sha256") as told:
            read()
        assert str(shared.parents[1]) in str(told.value)
    assert set(follow(str(told.value), tmp_path / "away")) == {made.uri, str(shared.parents[1])}
    again = prepared("pairs")
    verify(again)
    assert again == made
    assert list(samples_of(again, index))
