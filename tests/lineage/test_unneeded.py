"""`gc --keep RECIPE` frees what neither a recipe nor a registered version needs, and nothing that a task may read."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from tests.pipeline.sealed import ROOT, make, seal_all, tiny_run
from vila_ops import leftovers
from vila_ops.artifacts.kinds import Answers, Checkpoint, ModelVersion
from vila_ops.artifacts.leases import hold
from vila_ops.artifacts.listing import sealed
from vila_ops.artifacts.store import Address, address, content, find_manifest
from vila_ops.cli import app
from vila_ops.config import Resources, Run
from vila_ops.data.preprocess.prepare import prepare
from vila_ops.lineage.unneeded import unneeded
from vila_ops.pipeline.explain import explain
from vila_ops.registry.alias_register import move

TINY = "configs/recipes/tiny.yaml"


@pytest.fixture
def tiny(make_resources: Callable[..., Resources], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Everything of the tiny recipe is sealed, and of a variant whose last stage differs."""
    monkeypatch.chdir(ROOT)
    run = tiny_run(make_resources(tmp_path))
    seal_all(run)
    seal_all(variant(run))
    return run


def variant(run: Run) -> Run:
    return Run(recipe=run.recipe.with_changes({"stages.sft.learning_rate": 1e-3}), resources=run.resources)


@pytest.fixture
def gc(tiny: Run, tmp_path: Path) -> Callable[..., list[dict[str, Any]]]:
    """Runs the command; returns the sealed artifacts that it lists."""
    file = tmp_path / "resources.yaml"
    file.write_text(yaml.safe_dump(tiny.resources.model_dump(mode="json")))

    def run(*more: str) -> list[dict[str, Any]]:
        done = CliRunner().invoke(app, ["gc", "-r", str(file), "--json", *more], catch_exceptions=False)
        assert done.exit_code == 0, done.stderr
        return [one for one in json.loads(done.stdout) if one["sealed"]]

    return run


def models(run: Run) -> dict[str, Checkpoint]:
    """The two models after the last stage, by whose they are."""
    own = {step.uri for step in explain(run)}
    last = [one for one in sealed(Checkpoint, store=run.resources.storage.store) if one.stage == "sft"]
    return {"recipe" if one.uri in own else "variant": one for one in last}


def listed(found: list[dict[str, Any]]) -> list[str]:
    return sorted({one["sealed"]["kind"] for one in found})


def test_what_only_a_variant_needs_is_listed_and_freed_and_the_recipe_needs_nothing_again(
    tiny: Run, gc: Callable[..., list[dict[str, Any]]]
) -> None:
    answers = address(Answers, revision=1, recipe={"requests": []}, parents=(models(tiny)["variant"].digest,))
    make(Answers, answers, tiny, model=models(tiny)["variant"].digest)
    kept = address(Answers, revision=1, recipe={"requests": []}, parents=(models(tiny)["recipe"].digest,))
    make(Answers, kept, tiny, model=models(tiny)["recipe"].digest)
    assert gc() == [], "without --keep nothing sealed is listed"
    found = gc("--keep", TINY)
    assert listed(found) == ["answers", "checkpoint", "report", "score"]
    assert [one["place"] for one in found if one["sealed"]["kind"] == "checkpoint"] == [models(tiny)["variant"].uri]
    assert len(found) == 1 + 1 + 2 * 7 + 2
    before = {step.uri for step in explain(tiny)}
    assert find_manifest(found[0]["place"]) is not None, "without --delete nothing is removed"
    gc("--keep", TINY, "--delete")
    assert all(find_manifest(one["place"]) is None for one in found)
    assert {step.uri for step in explain(tiny)} == before
    assert find_manifest(kept.uri(tiny.resources.storage.store)) is not None
    assert gc("--keep", TINY) == []


def test_a_registered_version_stays_with_all_that_is_known_of_it(
    tiny: Run, gc: Callable[..., list[dict[str, Any]]]
) -> None:
    version = ModelVersion(name="tiny", version=1, checkpoint=models(tiny)["variant"], promoted=False)
    move("tiny", {"champion": version}, over=None, reason="", store=tiny.resources.storage.store)
    assert gc("--keep", TINY) == []


def test_what_was_sealed_within_the_grace_time_stays(tiny: Run) -> None:
    keep = [tiny]
    assert leftovers.find(tiny.resources, grace_hours=24.0, keep=keep) != []
    assert leftovers.find(tiny.resources, grace_hours=24.0 * 365 * 100, keep=keep) == []


def test_nothing_sealed_is_removed_while_a_task_may_read_it(tiny: Run, gc: Callable[..., list[dict[str, Any]]]) -> None:
    store = tiny.resources.storage.store
    (model,) = (one for one in leftovers.find(tiny.resources, grace_hours=1, keep=[tiny]) if "checkpoint" in one.what)
    with hold(Address("checkpoint", "another", None, ()), store=store):
        assert {one["kept"] for one in gc("--keep", TINY, "--delete")} == {leftovers.MAY_READ}
        with pytest.raises(ValueError, match="may be in use: a process holds a lease"):
            leftovers.remove(model, store=store)  # which was listed before
    assert find_manifest(model.place) is not None


def test_the_only_model_of_a_stage_that_is_whole_is_not_removed(tiny: Run) -> None:
    (model,) = (one for one in leftovers.find(tiny.resources, grace_hours=1, keep=[tiny]) if "checkpoint" in one.what)
    (content(models(tiny)["recipe"]) / "content").write_text("damaged")
    with pytest.raises(ValueError, match="is the only model of stage 'sft' that is whole"):
        leftovers.remove(model, store=tiny.resources.storage.store)
    assert find_manifest(model.place) is not None


def test_one_model_of_each_stage_stays_where_nothing_needs_any(tiny: Run) -> None:
    other = tiny.recipe.with_changes({"model.language_model.hidden_size": 32})
    found = leftovers.find(tiny.resources, grace_hours=1, keep=[Run(recipe=other, resources=tiny.resources)])
    left = {one.uri for one in sealed(Checkpoint, store=tiny.resources.storage.store)} - {one.place for one in found}
    stages = [one.stage for one in sealed(Checkpoint, store=tiny.resources.storage.store) if one.uri in left]
    assert sorted(stages) == ["align", "pretrain", "sft"]


def test_surveys_stay_with_the_dataset_that_was_decided_on_them_and_scans_with_none(
    make_resources: Callable[..., Resources], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    run = tiny_run(make_resources(tmp_path))
    near = run.recipe.with_changes({"stages.align.mixture.near_duplicates": {"image_bits": 2}})
    prepare(near.stages["align"].mixture, near.text("align"), run.resources)

    def lost(keep: Run) -> set[str]:
        return {one.kind for one in unneeded(run.resources, [keep], grace_seconds=-60)}

    assert lost(Run(recipe=near, resources=run.resources)) == {"raw_scan"}
    assert lost(run) == {"raw_scan", "survey", "shard", "dataset"}
