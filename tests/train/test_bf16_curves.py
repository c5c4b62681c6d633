"""Losses in bf16 follow those of the engine that kept fp32 weights under autocast, which are recorded.

benchmarks/bf16_curves.py says where they come from. It compares all 200 steps of three seeds, and its result is
committed; here are the first steps of one seed.
"""

import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vila_ops.train.metrics import MetricsLogger, StepMetrics

ROOT = Path(__file__).parents[2]


class EnoughSteps(Exception):
    """Ends a stage."""


@pytest.fixture
def curves(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The benchmark as a module."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    monkeypatch.chdir(ROOT)
    return importlib.import_module("bf16_curves")


def test_the_committed_curves_lie_within_the_spread_of_the_recorded_seeds(curves: Any) -> None:
    recorded = json.loads(curves.RECORDED.read_text())
    result = json.loads((ROOT / "benchmarks/results/bf16_curves.json").read_text())
    seeds = np.array([curves.points(recorded[seed]) for seed in "012"])
    ours = np.array([result["points"][seed] for seed in "012"])
    assert ours.shape == seeds.shape == (3, 200 // 20 + 200 // 50)
    assert (np.abs(ours - seeds) <= np.ptp(seeds, axis=0)).all()
    assert result["fp32_farthest"] <= 1e-6


@pytest.mark.slow
def test_the_first_steps_follow_the_recorded_ones(curves: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded = json.loads(curves.RECORDED.read_text())
    least, most = (way([np.mean(recorded[seed]["loss"][: curves.WINDOW]) for seed in "012"]) for way in (min, max))
    losses: list[float] = []

    def logged(self: MetricsLogger, step: int, totals: StepMetrics, **_: Any) -> None:
        losses.append(totals.loss)
        if step == curves.WINDOW:
            raise EnoughSteps

    monkeypatch.setattr(MetricsLogger, "log_step", logged)
    monkeypatch.setattr(curves.loop, "RowLoader", curves.loop.RowLoader)  # which the benchmark replaces
    with pytest.raises(EnoughSteps):
        curves.curve(tmp_path, 0)
    assert losses == pytest.approx(recorded["0"]["loss"][: curves.WINDOW], abs=most - least)
