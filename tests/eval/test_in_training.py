"""A stage is evaluated while it trains: its models are those of its resume checkpoints, its results the usual ones."""

import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from vila_ops.artifacts.kinds import Checkpoint, Pretrained
from vila_ops.artifacts.store import content
from vila_ops.cli import app
from vila_ops.config import Run
from vila_ops.eval.report import read_report
from vila_ops.pipeline import stages
from vila_ops.train import loop
from vila_ops.train.job import StageInputs
from vila_ops.train.snapshots import Snapshots

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def interrupted(run: Run) -> Path:
    """The resume folder of a stage of six steps that saves every second one, and was interrupted in its fifth."""
    own = loop.lr_multiplier

    def dies(step: int, *arguments: Any, **more: Any) -> float:
        if step == 4:
            raise KeyboardInterrupt
        return own(step, *arguments, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "lr_multiplier", dies)
        with pytest.raises(KeyboardInterrupt):
            stages.model_after(run, "align")
    (folder,) = (Path(run.resources.storage.store) / "resume").iterdir()
    for _ in range(6000):  # it is written in the background
        if (folder / "step-000004/manifest.json").exists():
            return folder
        time.sleep(0.01)
    raise AssertionError("the resume checkpoint after step 4 was not written")


@pytest.mark.slow
def test_a_checkpoint_that_is_gone_or_damaged_is_missed_with_a_warning(
    run: Run, interrupted: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Of steps 1 to 4 only 2 and 4 were saved, and 2 is damaged."""
    data, init = stages.inputs_of(run, "align")
    stage, resources = run.recipe.stages["align"], run.resources
    inputs = StageInputs(stage=stage, model=run.recipe.model, data=data, init=init, resources=resources)
    (damaged,) = (interrupted / "step-000002").glob("rank-*")
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    snapshots = Snapshots(inputs)
    assert [one.step for one in snapshots.new(every=1)] == [4]
    assert "align after steps [1, 2, 3] is not evaluated" in caplog.text
    assert "resume checkpoint step-000002 of align cannot be read" in caplog.text
    assert snapshots.new(every=1) == []
    damaged.write_bytes(whole)
    assert [one.step for one in Snapshots(inputs).new(every=2)] == [2, 4]


@pytest.mark.slow
def test_a_stage_is_evaluated_after_every_second_step_and_at_its_end(
    run: Run, model: Pretrained, interrupted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The training goes on when the evaluation first waits."""
    saved = {step: load_file(*(interrupted / f"step-00000{step}").glob("rank-*.safetensors")) for step in (2, 4)}
    waits: list[float] = []

    def trains(seconds: float) -> None:
        waits.append(seconds)
        stages.model_after(run, "align")

    monkeypatch.setattr(stages, "time", SimpleNamespace(sleep=trains))  # other threads sleep by the real one
    reports = dict(stages.evaluate_in_training(run, "align", run.recipe.stage_suite, every=2))
    assert (list(reports), len(waits)) == ([2, 4, 6], 1)
    assert reports[6] == stages.evaluate_stage(run, "align", run.recipe.stage_suite)
    assert len({read_report(report).model for report in reports.values()}) == 3
    initial = load_file(content(model) / "model.safetensors")
    for step, tensors in saved.items():
        trained = {name.removeprefix("param/model."): one for name, one in tensors.items() if name.startswith("param/")}
        assert all("multi_modal_projector" in name for name in trained)
        own = load_file(content(snapshot(run, read_report(reports[step]).model)) / "model.safetensors")
        assert own.keys() == initial.keys()
        changed = {name for name in own if not torch.equal(own[name], initial[name])}
        assert len(changed) == len(trained)
        for name in changed:
            assert any(torch.equal(own[name], one) for one in trained.values())
    storage = run.resources.storage
    command = ["evaluate", "configs/recipes/tiny.yaml", "--stage", "align", "--every", "2", "--json"]
    where = ["-s", f"resources.storage.store={storage.store}", "-s", f"resources.storage.cache={storage.cache}"]
    monkeypatch.chdir(ROOT)
    printed = CliRunner().invoke(app, [*command, *where])
    assert printed.exit_code == 0, printed.output
    assert json.loads(printed.stdout)["digest"] == reports[6].digest, "a finished stage has no resume checkpoints"


def snapshot(run: Run, digest: str) -> Checkpoint:
    """The sealed checkpoint of a digest."""
    for path in (Path(run.resources.storage.store) / "checkpoint").glob("*/manifest.json"):
        manifest = json.loads(path.read_text())
        if manifest["digest"] == digest:
            return Checkpoint(
                uri=str(path.parent), digest=digest, parents=tuple(manifest["parents"]), **manifest["facts"]
            )
    raise AssertionError(digest)


def test_steps_without_a_resume_checkpoint_are_refused(run: Run) -> None:
    reports = stages.evaluate_in_training(run, "align", run.recipe.stage_suite, every=3)
    with pytest.raises(ValueError, match="'align' saves a resume checkpoint every 2 steps, so none every 3"):
        next(reports)
