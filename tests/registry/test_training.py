"""What the gate says about training data is what the manifests of its stages record."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from vila_ops.artifacts import store
from vila_ops.artifacts.kinds import Checkpoint, Dataset
from vila_ops.config import Run, load
from vila_ops.data.preprocess.prepare import prepare
from vila_ops.registry.training import training_data

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The tiny recipe, whose mixture of the last stage is compared with an evaluation set of two of its images."""
    folder = tmp_path_factory.mktemp("exam")
    records = [json.loads(line) for line in (ROOT / "tests/tiny/pairs/records.jsonl").read_text().splitlines()]
    kept = [record for record in records if record["id"] in ("dog", "cat")]
    (folder / "records.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in kept))
    for record in kept:
        shutil.copy(ROOT / f"tests/tiny/pairs/{record['id']}.png", folder)
    exam = {"exam": {"kind": "jsonl", "path": str(folder), "render": "caption"}}
    where = [f"resources.storage.{name}={folder}/{name}" for name in ("store", "cache", "data")]
    overrides = (*where, f"stages.sft.mixture.contamination={json.dumps({'sources': exam})}")
    resources = ROOT / "configs/resources/inline.yaml"
    return load(ROOT / "configs/recipes/tiny.yaml", resources=resources, overrides=overrides)


def checkpoint(run: Run, stage: str, *parents: str) -> Checkpoint:
    """A sealed checkpoint without weights."""
    root = run.resources.storage.store
    at = store.address(Checkpoint, revision=0, recipe=stage, parents=parents)
    return store.seal(Checkpoint, at, store.begin(at, store=root), facts={"stage": stage, "step": 1}, execution={})


def data_of(run: Run, stage: str) -> Dataset:
    return prepare(run.recipe.stages[stage].mixture, run.recipe.text(stage), run.resources)


def test_every_stage_says_what_its_data_was_compared_with_and_what_was_left_out(run: Run) -> None:
    align = checkpoint(run, "align", data_of(run, "align").digest, "untrained")
    sft = checkpoint(run, "sft", data_of(run, "sft").digest, align.digest)
    first, second = training_data(sft)
    assert (first.stage, first.against, first.left_out) == ("align", (), {})
    assert (second.stage, second.against, second.left_out) == ("sft", ("exam",), {"contaminated_image": 2})


def test_data_that_the_store_lacks_is_an_error(run: Run) -> None:
    orphan = checkpoint(run, "sft", "0123456789abcdef", "untrained")
    with pytest.raises(ValueError, match=r"the data of stage 'sft' \(digest 0123456789ab\) is not in"):
        training_data(orphan)


def test_a_gate_asks_for_clean_data_only_where_every_mixture_is_compared(run: Run) -> None:
    changed: dict[str, Any] = {"gate.clean_of": ["exam"]}
    with pytest.raises(ValueError, match="clean of 'exam', but mixture 'tiny_align' of stage 'align' is compared"):
        run.recipe.with_changes(changed)
    last = run.recipe.stages["sft"].mixture.contamination
    assert last is not None
    rules = {f"stages.{name}.mixture.contamination": last.model_dump() for name in run.recipe.stages}
    assert run.recipe.with_changes({**rules, **changed}).gate.clean_of == ("exam",)
