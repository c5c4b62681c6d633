"""A scheduled flow that has nothing to do ends before it does anything."""

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from prefect.states import State

from flows.full_pipeline import vila
from flows.retrain import retrain
from vila_ops.config import load
from vila_ops.config.schedule import Schedule
from vila_ops.pipeline.windows import FlowRun, begin

ROOT = Path(__file__).parents[2]


def test_a_flow_whose_window_another_run_has_is_skipped(tmp_path: Path) -> None:
    """Outside of Prefect a run is due now."""
    run = load(
        ROOT / "configs/recipes/tiny.yaml",
        resources=ROOT / "configs/resources/inline.yaml",
        overrides=(f"resources.storage.store={tmp_path}/store",),
    )
    schedule = Schedule(window_hours=100_000)
    due = datetime.now(UTC)
    assert begin("tiny", schedule, FlowRun("another", due), store=run.resources.storage.store) is None
    state = vila.fn(run.recipe, run.resources, schedule=schedule)
    assert isinstance(state, State)
    assert (state.type.value, state.name) == ("COMPLETED", "Skipped")
    assert state.message is not None
    assert "belongs to run another" in state.message
    assert sorted(path.name for path in (tmp_path / "store").iterdir()) == ["format.json", "windows"]


@pytest.mark.parametrize(
    ("work", "scheduled"), [(vila.fn, {"schedule": Schedule()}), (retrain.fn, {"trigger": "schedule"})]
)
def test_a_flow_that_cannot_run_leaves_its_window_to_another(
    work: Callable[..., Any], scheduled: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On another machine the device may be there."""
    monkeypatch.chdir(ROOT)
    here = (f"resources.storage.store={tmp_path}/store", f"resources.storage.cache={tmp_path}/cache")
    with pytest.raises(ValueError, match=r"cannot run with these resources:\ndevice: "):
        work("tiny", "inline", overrides=(*here, "resources.device=gpu"), **scheduled)
    assert not (tmp_path / "store/windows").exists()
