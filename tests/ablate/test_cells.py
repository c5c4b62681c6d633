"""A grid on the tiny recipe: its runs, what they share, and that a second call makes nothing."""

from pathlib import Path
from typing import Any

import pytest

from vila_ops.ablate.cells import runs_of, scores_of
from vila_ops.ablate.results import grid_result
from vila_ops.artifacts.kinds import Checkpoint
from vila_ops.artifacts.listing import sealed
from vila_ops.config import Resources, load
from vila_ops.config.grid import Grid, load_grid
from vila_ops.config.load import read
from vila_ops.eval.report import read_report
from vila_ops.pipeline.stages import evaluate_stage

ROOT = Path(__file__).parents[2]
INLINE = ROOT / "configs/resources/inline.yaml"


@pytest.fixture
def resources(tmp_path: Path) -> Resources:
    """Resources with a store of their own."""
    run = load(ROOT / "configs/recipes/tiny.yaml", resources=INLINE)
    return run.resources.with_changes({f"storage.{name}": str(tmp_path / name) for name in ("store", "cache")})


def quick() -> Grid:
    """The shipped grid with one step a stage and one benchmark."""
    tree: dict[str, Any] = read(ROOT / "configs/grids/tiny.yaml")
    for stage in tree["recipe"]["stages"].values():
        stage |= {"num_steps": 1, "validate_every": 1, "save_every": 1}
    suite = tree["recipe"]["final_suite"]
    measured = ("caption_loss", "text_loss")  # by which the recipe's gate decides
    suite["benchmarks"] = {name: suite["benchmarks"][name] for name in measured}
    return Grid.model_validate({**tree, "metrics": ["caption_loss"], "resamples": 200})


def test_cells_differ_in_their_settings_and_seeds_alone(resources: Resources) -> None:
    grid = load_grid(Path("tiny"))
    runs = {(one.cell, one.seed): one.run.recipe for one in runs_of(grid, resources)}
    plain = load(ROOT / "configs/recipes/tiny.yaml", resources=INLINE).recipe
    assert runs["trained", 0].with_changes({"name": "tiny"}) == plain
    assert runs["frozen", 0].stages["align"] == plain.stages["align"]
    assert runs["frozen", 0].stages["pretrain"] == plain.stages["pretrain"].with_changes({"trainable": ["projector"]})
    assert runs["trained", 1].model == plain.model.with_changes({"seed": plain.model.seed + 1})
    assert {stage.seed for stage in runs["trained", 1].stages.values()} == {
        stage.seed + 1 for stage in plain.stages.values()
    }


def test_a_wrong_cell_is_named_before_anything_is_trained(resources: Resources) -> None:
    grid = quick().with_changes({"cells.frozen.recipe": {"stages": {"pretrain": {"trainable": ["projektor"]}}}})
    with pytest.raises(ValueError, match="cell 'frozen' of grid 'tiny-grid'"):
        scores_of(grid, resources)
    assert not Path(resources.storage.store).exists()


def test_a_metric_that_the_suite_does_not_measure_is_named_before_anything_is_trained(resources: Resources) -> None:
    with pytest.raises(ValueError, match=r"'pope_f1', which final_suite 'tiny' of cell 'frozen' does not measure"):
        scores_of(quick().with_changes({"metrics": ["caption_loss", "pope_f1"]}), resources)
    assert not Path(resources.storage.store).exists()


@pytest.mark.slow
def test_a_grid_trains_what_its_cells_do_not_share_and_then_nothing(
    resources: Resources, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    grid = quick()
    scores = scores_of(grid, resources)
    trained = list(sealed(Checkpoint, store=resources.storage.store))
    assert sorted(one.stage for one in trained) == ["align"] * 2 + ["pretrain"] * 4 + ["sft"] * 4
    result = grid_result(grid, scores)
    for cell, value in result.metrics[0].values.items():
        reports = [
            read_report(evaluate_stage(one.run, "sft", one.run.recipe.final_suite))
            for one in runs_of(grid, resources)
            if one.cell == cell
        ]
        own = [m.value for report in reports for m in report.metrics if (m.name, m.role) == ("caption_loss", "model")]
        assert value.by_seed == pytest.approx(own)
    assert list(sealed(Checkpoint, store=resources.storage.store)) == trained
