"""What a grid would take: shared stages once, by the planner where there is an accelerator."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from vila_ops.ablate.cells import runs_of, stages_of
from vila_ops.ablate.cost import cost_of_grid
from vila_ops.ablate.results import CellResult, CellTask, read_results, write_result
from vila_ops.artifacts.attempts import attempt
from vila_ops.artifacts.kinds import Checkpoint
from vila_ops.artifacts.store import address, seal
from vila_ops.cli import app
from vila_ops.config import Resources
from vila_ops.config.grid import load_grid
from vila_ops.config.lengths import load_lengths
from vila_ops.plan.plan import plan_run
from vila_ops.train.pace import speed_settings

ROOT = Path(__file__).parents[2]
CARD = {"name": "a card", "memory_gib": 80, "peak_tflops": 1.0, "price_per_hour": 3600.0}
LENGTHS = load_lengths(ROOT / "configs/lengths/tiny.yaml")


@pytest.fixture
def resources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Resources:
    monkeypatch.chdir(ROOT)
    where = {f"storage.{name}": str(tmp_path / name) for name in ("store", "cache", "data")}
    return Resources(launch="inline").with_changes(where)


def test_a_stage_counts_with_the_first_cell_that_needs_it(resources: Resources) -> None:
    runs = runs_of(load_grid(Path("tiny")), resources.with_changes({"train.accelerator": CARD}))
    cost = cost_of_grid(runs, LENGTHS)
    assert [(one.cell, one.seed, one.sealed, one.shared, one.runs) for one in cost.cells] == [
        ("frozen", 0, 0, 0, ("align", "pretrain", "sft")),
        ("trained", 0, 0, 1, ("pretrain", "sft")),
        ("frozen", 1, 0, 0, ("align", "pretrain", "sft")),
        ("trained", 1, 0, 1, ("pretrain", "sft")),
    ]
    plans = [plan_run(one.run, LENGTHS).stages for one in runs[:2]]
    by_hand = [*plans[0], *plans[1][1:]]
    assert cost.tokens == pytest.approx(2 * sum(one.tokens for one in by_hand))
    assert cost.hours == pytest.approx(2 * sum(one.hours or 0 for one in by_hand))
    assert cost.money == pytest.approx(2 * sum(one.cost or 0 for one in by_hand))
    assert not cost.measured


def test_what_is_not_known_is_told(resources: Resources) -> None:
    cost = cost_of_grid(runs_of(load_grid(Path("tiny")), resources))
    assert cost.tokens is None
    assert cost.hours is None
    assert cost.measured
    assert cost.unknown is not None
    assert "the lengths of mixture 'tiny_align' are not known" in cost.unknown


def test_the_pace_of_a_resumed_stage_is_that_of_the_steps_that_its_time_was_for(resources: Resources) -> None:
    """30 seconds for the last 10 of 100 steps."""
    one = runs_of(load_grid(Path("tiny")), resources)[0]
    part = next(stages_of(one))
    settings = part.stage.model_dump(mode="json", exclude={"mixture", "save_every"})
    known = part.model.model_dump(mode="json")
    for revision, model, first in ((1, known, 90), (2, {"of": "a later version"}, 0), (3, known, 100)):
        at = address(Checkpoint, revision=revision, recipe={"stage": settings}, parents=())
        with attempt(at, store=resources.storage.store) as folder:
            (folder / "model").write_bytes(b"m")
        execution = {"seconds": 30.0, "sealed": "2026", "workers": [{"first_step": first}], "model": model}
        seal(Checkpoint, at, folder, facts={"stage": "align", "step": 100}, execution=execution)
    positions = [
        plan.steps * stage.global_batch_size * stage.sequence_length
        for plan, stage in zip(plan_run(one.run, LENGTHS).stages, one.run.recipe.stages.values(), strict=True)
    ]
    pace = 30 / (10 * part.stage.global_batch_size * part.stage.sequence_length)
    assert cost_of_grid([one], LENGTHS).hours == pytest.approx(pace * sum(positions) / 3600)


def test_the_pace_of_a_file_is_that_of_the_last_attempt_too(resources: Resources, tmp_path: Path) -> None:
    """30 seconds for the last 10 of 100 steps."""
    one = runs_of(load_grid(Path("tiny")), resources)[0]
    part = next(stages_of(one))
    positions = part.stage.global_batch_size * part.stage.sequence_length
    own = {"task": "train", "name": "align", "key": "k", "seconds": 30.0, "gpu_hours": 0.0, "money": None}
    settings = speed_settings(part.stage.model_dump(mode="json"), part.model)
    made = {"positions": 100 * positions, "timed_positions": 10 * positions}
    task = CellTask.model_validate({**own, **made, "settings": settings})
    of = {"grid": "g", "cell": "c", "seed": 0, "stage": "align", "model": "m", "report": "r", "key": "0" * 64}
    empty: dict[str, Any] = {"metrics": (), "items": (), "scores": {}, "layers": (), "losses": {}, "versions": {}}
    write_result(tmp_path, CellResult.model_validate({**of, **empty, "tasks": (task,)}))
    cost = cost_of_grid([one], LENGTHS, results=read_results(tmp_path))
    plans = plan_run(one.run, LENGTHS).stages
    stages = zip(plans, one.run.recipe.stages.values(), strict=True)
    left = sum(plan.steps * stage.global_batch_size * stage.sequence_length for plan, stage in stages)
    assert cost.hours == pytest.approx(30 / (10 * positions) * left / 3600)


def test_what_two_grids_of_the_demo_take_together_is_printed(resources: Resources, tmp_path: Path) -> None:
    """For each of three seeds one align, and a pretrain and an sft of two cells of each grid."""
    file = tmp_path / "resources.yaml"
    file.write_text(yaml.safe_dump(resources.model_dump(mode="json")))
    options = ["--results", str(tmp_path / "none"), "--dry-run", "--json", "-r", str(file)]
    ran = CliRunner().invoke(app, ["ablate", "figure3_demo", "image-first_demo", *options])
    assert ran.exit_code == 0, ran.output
    trained = Counter(stage for cell in json.loads(ran.stdout)["cells"] for stage in cell["runs"])
    assert trained == {"align": 3, "pretrain": 12, "sft": 12}
    assert not (tmp_path / "none").exists()


def test_the_command_prints_a_line_for_each_cell_and_seed(resources: Resources, tmp_path: Path) -> None:
    file = tmp_path / "resources.yaml"
    file.write_text(yaml.safe_dump(resources.with_changes({"train.accelerator": CARD}).model_dump(mode="json")))
    ran = CliRunner().invoke(app, ["ablate", "tiny", "--dry-run", "--lengths", "tiny", "-r", str(file)])
    assert ran.exit_code == 0, ran.output
    rows = [line.split() for line in ran.stdout.splitlines()]
    assert rows[0][:6] == ["cell", "seed", "sealed", "shared", "to", "train"]
    assert [row[:5] for row in rows[1:5]] == [
        ["frozen", "0", "0", "0", "3"],
        ["trained", "0", "0", "1", "2"],
        ["frozen", "1", "0", "0", "3"],
        ["trained", "1", "0", "1", "2"],
    ]
    assert rows[5][:2] == ["all", "10"]
    assert not Path(resources.storage.store).exists()


def test_an_option_without_effect_is_refused(resources: Resources) -> None:
    for options in (["--lengths", "tiny"], ["--dry-run", "--page", "page.html"]):
        ran = CliRunner().invoke(app, ["ablate", "tiny", *options])
        assert ran.exit_code != 0
        assert "no effect" in f"{ran.output}{ran.exception}"
