"""A grid on the tiny recipe: its runs, what they share, and that a second call makes nothing."""

from pathlib import Path
from typing import Any

import pytest

from flows import ablate as flow
from tests.report.parsed import Page, check_accessible, check_loads_nothing
from vila_ops.ablate.cells import measure, runs_of, scores_of
from vila_ops.ablate.cost import cost_of_grid
from vila_ops.ablate.results import grid_result
from vila_ops.artifacts.kinds import Checkpoint
from vila_ops.artifacts.listing import sealed
from vila_ops.artifacts.store import read_manifest
from vila_ops.config import Resources, load
from vila_ops.config.grid import Grid, load_grid
from vila_ops.config.load import read
from vila_ops.eval.report import read_report
from vila_ops.pipeline.stages import TASKS, evaluate_stage
from vila_ops.report import ablation

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
        measure(grid, resources)
    assert not Path(resources.storage.store).exists()


def test_a_metric_that_the_suite_does_not_measure_is_named_before_anything_is_trained(resources: Resources) -> None:
    with pytest.raises(ValueError, match=r"'pope_f1', which final_suite 'tiny' of cell 'frozen' does not measure"):
        measure(quick().with_changes({"metrics": ["caption_loss", "pope_f1"]}), resources)
    assert not Path(resources.storage.store).exists()


def test_a_cell_may_measure_the_model_after_an_earlier_stage(resources: Resources) -> None:
    grid = quick().with_changes({"cells.frozen.stage": "align"})
    assert {(one.cell, one.stage, *one.stages()) for one in runs_of(grid, resources)} == {
        ("frozen", "align", "align"),
        ("trained", "sft", "align", "pretrain", "sft"),
    }
    with pytest.raises(ValueError, match=r"after stage 'aling', and its recipe has .*did you mean 'align'"):
        runs_of(grid.with_changes({"cells.frozen.stage": "aling"}), resources)


@pytest.mark.slow
def test_a_grid_trains_what_its_cells_do_not_share_and_then_nothing(
    resources: Resources, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    grid = quick()
    measured = measure(grid, resources)
    trained = list(sealed(Checkpoint, store=resources.storage.store))
    assert sorted(one.stage for one in trained) == ["align"] * 2 + ["pretrain"] * 4 + ["sft"] * 4
    result = grid_result(grid, scores_of(grid, measured))
    for cell, value in result.metrics[0].values.items():
        reports = [
            read_report(evaluate_stage(one.run, "sft", one.run.recipe.final_suite))
            for one in runs_of(grid, resources)
            if one.cell == cell
        ]
        own = [m.value for report in reports for m in report.metrics if (m.name, m.role) == ("caption_loss", "model")]
        assert value.by_seed == pytest.approx(own)
    assert list(sealed(Checkpoint, store=resources.storage.store)) == trained

    cost = cost_of_grid(runs_of(grid.with_changes({"seeds": [0, 1, 2]}), resources))
    assert [(one.sealed, one.shared, one.runs) for one in cost.cells] == [
        *[(3, 0, ())] * 4,
        (0, 0, ("align", "pretrain", "sft")),
        (0, 1, ("pretrain", "sft")),
    ]
    seconds = {read_manifest(one.uri)["execution"]["seconds"] for one in trained}
    assert 5 * min(seconds) <= (cost.hours or 0) * 3600 <= 5 * max(seconds)  # as many positions as each of those had
    assert cost.measured
    other = grid.with_changes({"recipe.model.language_model.hidden_size": 32, "seeds": [0, 1]})
    assert cost_of_grid(runs_of(other, resources)).hours is None  # no stage of this language model was measured

    for page in (tmp_path / "grid.html", tmp_path / "grid.md"):
        ablation.write(page, result, measured)
    html = (tmp_path / "grid.html").read_text()
    check_loads_nothing(html)
    check_accessible(html)
    positions = {row[0]: row[1] for row in Page(html).rows if len(row) == 5 and "," in row[1]}
    assert positions == {"frozen": "1,536", "trained": "1,536", ablation.ALL: "2,560"}  # of 256 in a stage
    assert f"| {ablation.ALL} | 2,560 |" in (tmp_path / "grid.md").read_text()

    told: list[dict[str, Any]] = []
    monkeypatch.setattr(flow, "TASKS", TASKS)
    for artifact in ("create_table_artifact", "create_markdown_artifact"):
        monkeypatch.setattr(flow, artifact, lambda **shown: told.append(shown))
    assert flow._work(grid, resources) == {result.claims[0].claim.says: result.claims[0].verdict}
    assert [one["key"] for one in told] == ["vila-claims", "vila-grid"]
    assert told[1]["markdown"] == (tmp_path / "grid.md").read_text()
