"""`verify_resume` detects a resume that is not exact."""

import random
from pathlib import Path
from typing import Any

import pytest

from tests.seed import SEED
from vila_ops.config import Stage
from vila_ops.train.sample_log import first_mismatch, global_batches
from vila_ops.train.verify_resume import ResumeTrial, shortened, summary, verify_resume

INEXACT = """
import torch
from vila_ops.train.engine import MOMENTS, PlainEngine
honest = PlainEngine.restore
def restore(engine, states, *, step):
    changed = {name: own | {MOMENTS[0]: own[MOMENTS[0]] * 1.01} for name, own in states.items()}
    honest(engine, changed, step=step)
PlainEngine.restore = restore
"""
"""Restores first moments 1 % too large. Python imports a module `sitecustomize` when it starts."""


@pytest.fixture
def trial(bench: Any, make_stage: Any, tmp_path: Path) -> ResumeTrial:
    stage = make_stage(bench.mixture, trainable=["projector", "language_model"], num_steps=None, epochs=2)
    resources = bench.resources.with_changes({"storage.store": str(tmp_path / "store")})
    return ResumeTrial(
        stage=shortened(stage, steps=16), model=bench.model, data=bench.data, init=bench.init, resources=resources
    )


@pytest.mark.slow
def test_a_resume_that_is_not_exact_is_found(
    trial: ResumeTrial, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text(INEXACT)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{Path(__file__).parents[2]}")
    progress: list[str] = []
    verdict = verify_resume(trial, kills=30, report=progress.append, draw=random.Random(SEED))
    assert verdict.kills < 30, "it ends with the first pass that differs"
    assert len([line for line in progress if line.startswith("kill ")]) == verdict.kills
    first, *others = verdict.differences
    assert first.startswith("the curves differ first at step ")
    assert others == ["the bytes of ['curve.json', 'model.safetensors'] differ"], "it read the same samples"
    assert verdict.kept is not None
    assert {path.name for path in Path(verdict.kept).iterdir()} >= {"unbroken", f"killed-{verdict.passes}"}
    assert summary(verdict)[0].startswith("NOT EQUAL")


@pytest.mark.slow
def test_what_a_stage_read_is_told_by_rank_and_step(trial: ResumeTrial, tmp_path: Path) -> None:
    """Another order of samples is a mismatch, and so are the samples of another step."""
    one = trial.in_store(str(tmp_path / "one"))
    seed = Stage.model_validate({**one.stage.model_dump(), "seed": 1, "num_steps": 2})
    other = ResumeTrial.model_validate({**one.in_store(str(tmp_path / "two")).model_dump(), "stage": seed.model_dump()})
    for each in (one, other):
        each.train()
    batches = global_batches(one.samples())
    assert list(batches) == list(range(16))
    assert {len(rows) for rows in batches.values()} == {one.stage.global_batch_size}
    assert first_mismatch(one.samples(), batches) is None
    stray = first_mismatch(other.samples(), batches)
    assert stray is not None
    assert stray.step == 0
    late = [read._replace(step=read.step + 1) for read in one.samples()]
    assert first_mismatch(late, batches) is not None
    half = [read._replace(world_size=2, rank=1, rows=read.rows[1:]) for read in one.samples()]
    assert first_mismatch(half, batches) is None
    assert first_mismatch([read._replace(rank=0) for read in half], batches) is not None


def test_a_variant_is_short_saves_often_and_says_what_it_changed(make_stage: Any, bench: Any) -> None:
    stage: Stage = make_stage(bench.mixture, save_every=500, validate_every=2, num_steps=None, epochs=1)
    variant = shortened(stage, steps=60)
    assert (variant.num_steps, variant.epochs, variant.save_every, variant.validate_every) == (60, None, 6, 2)
    assert Stage.model_validate({**variant.model_dump(), "save_every": 500, "num_steps": None, "epochs": 1}) == stage
