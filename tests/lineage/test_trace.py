"""`trace` walks from any id up to the raw files and down to the reports, and tells it as OpenLineage events."""

import json
import uuid
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from tests.pipeline.sealed import ROOT, seal_all, tiny_run
from vila_ops.artifacts.kinds import Checkpoint, ModelVersion
from vila_ops.artifacts.listing import sealed
from vila_ops.cli import app
from vila_ops.config import Resources, Run
from vila_ops.registry.alias_register import move

BENCHMARKS = 7
"""Of each suite of the tiny recipe."""


@pytest.fixture
def tiny(make_resources: Callable[..., Resources], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.chdir(ROOT)
    run = tiny_run(make_resources(tmp_path))
    seal_all(run)
    return run


@pytest.fixture
def said(tiny: Run, tmp_path: Path) -> Callable[..., str]:
    """What the command prints."""
    file = tmp_path / "resources.yaml"
    file.write_text(yaml.safe_dump(tiny.resources.model_dump(mode="json")))

    def ask(*arguments: str) -> str:
        done = CliRunner().invoke(app, ["trace", *arguments, "-r", str(file)], catch_exceptions=False)
        assert done.exit_code == 0
        return done.stdout

    return ask


def checkpoints(run: Run) -> dict[str, Checkpoint]:
    return {one.stage: one for one in sealed(Checkpoint, store=run.resources.storage.store)}


def kinds(nodes: list[dict[str, Any]]) -> list[str]:
    return sorted(f"{node['kind']} {node['name']}" for node in nodes)


def test_a_model_comes_from_its_data_and_the_stages_before_it_and_its_scores_come_from_it(
    tiny: Run, said: Callable[..., str]
) -> None:
    models = checkpoints(tiny)
    traced = json.loads(said(models["pretrain"].digest[:12], "--json"))
    assert traced["asked"]["uri"] == models["pretrain"].uri
    assert kinds(traced["up"]) == [
        "checkpoint align", "dataset tiny_align", "dataset tiny_pretrain", "pretrained ",
        "raw ", "raw documents", "raw pairs",
    ]  # fmt: skip
    down = kinds(traced["down"])
    assert [one for one in down if not one.startswith("score")] == [
        "checkpoint sft", "report tiny", "report tiny_probe", "report tiny_probe",
    ]  # fmt: skip
    assert len(down) == 4 + 3 * BENCHMARKS


def test_every_kind_of_id_leads_to_the_same_artifact(tiny: Run, said: Callable[..., str]) -> None:
    model = checkpoints(tiny)["sft"]
    version = ModelVersion(name="tiny", version=3, checkpoint=model, promoted=False)
    move("tiny", {"champion": version}, over=None, reason="", store=tiny.resources.storage.store)
    response = f"chatcmpl-{model.digest[:16]}-{'0' * 32}"  # 16 digits of the model
    ids = (model.digest, model.uri, "tiny@champion", "models:/tiny/3", response)
    traced = [json.loads(said(one, "--json")) for one in ids]
    assert all(one == traced[0] for one in traced)
    assert traced[0]["asked"]["versions"] == ["tiny 3 (champion)"]
    assert traced[0]["recipe"]["stage"]["learning_rate"] == tiny.recipe.stages["sft"].learning_rate
    first, *lines = said("tiny@champion").splitlines()
    assert first == f"checkpoint sft {model.digest[:12]} = tiny 3 (champion)"
    assert lines.index("made from") < lines.index(f"  checkpoint pretrain {model.parents[1][:12]}")
    assert sum(line.startswith("  score ") for line in lines) == 2 * BENCHMARKS


def test_what_is_not_there_is_told_with_what_may_be_asked(tiny: Run, said: Callable[..., str]) -> None:
    with pytest.raises(ValueError, match="has nothing named '0000000000'; give a digest"):
        said("0000000000")
    with pytest.raises(ValueError, match="the id of a response of a model in this store"):
        said(f"chatcmpl-{'0' * 16}-{'0' * 32}")
    with pytest.raises(ValueError, match="no version with the alias 'previous'"):
        said("tiny@previous")
    with pytest.raises(ValueError, match="has the alias 'best'; it may be champion, challenger, previous"):
        said("tiny@best")


def test_openlineage_has_a_start_and_an_end_of_each_run_and_data_that_join_them(
    tiny: Run, said: Callable[..., str]
) -> None:
    """The required fields are those of RunEvent, Run, Job and Dataset in the specification 2-0-2."""
    model = checkpoints(tiny)["sft"]
    events = [json.loads(line) for line in said(model.digest, "--openlineage").splitlines()]
    traced = json.loads(said(model.digest, "--json"))
    made = [node for node in (traced["asked"], *traced["up"], *traced["down"]) if node["uri"]]
    by_run: dict[str, list[str]] = {}
    for event in events:
        assert {"eventType", "eventTime", "run", "job", "producer", "schemaURL"} <= event.keys()
        assert event["schemaURL"] == "https://openlineage.io/spec/2-0-2/OpenLineage.json#/$defs/RunEvent"
        assert datetime.fromisoformat(event["eventTime"]).tzinfo is not None
        named = (event["job"], *event["inputs"], *event.get("outputs", ()))
        assert all(set(one) == {"namespace", "name"} for one in named)
        by_run.setdefault(str(uuid.UUID(event["run"]["runId"])), []).append(event["eventType"])
    assert len(by_run) == len(made)
    assert {tuple(sorted(types)) for types in by_run.values()} == {("COMPLETE", "START")}
    outputs = [one["name"] for event in events for one in event.get("outputs", ())]
    assert sorted(outputs) == sorted(f"{node['kind']}/{node['digest']}" for node in made)
    (trained,) = (event for event in events if event["job"]["name"] == "checkpoint/sft" and "outputs" in event)
    assert [one["name"] for one in trained["inputs"]] == [
        f"dataset/{model.parents[0]}", f"checkpoint/{model.parents[1]}",
    ]  # fmt: skip
