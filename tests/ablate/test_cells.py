"""A grid on the tiny recipe: its runs, what they share, and that files of results take the place of a store."""

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn
from xml.etree import ElementTree

import pytest
import yaml
from typer.testing import CliRunner

from flows import ablate as flow
from tests.report.parsed import Page, check_accessible, check_loads_nothing
from vila_ops.ablate.cells import fingerprint_of, not_here, runs_of, runs_of_all
from vila_ops.ablate.cost import cost_of_grid
from vila_ops.ablate.measure import from_files, measure
from vila_ops.ablate.results import CellResult, read_results, scores_of
from vila_ops.ablate.verdicts import GridResult, grid_result
from vila_ops.artifacts.kinds import Checkpoint
from vila_ops.artifacts.listing import sealed
from vila_ops.artifacts.store import read_manifest
from vila_ops.cli import app
from vila_ops.config import Resources, Run, load
from vila_ops.config.grid import Grid, load_grid
from vila_ops.config.load import read
from vila_ops.eval.report import read_report
from vila_ops.pipeline.stages import TASKS, Tasks, evaluate_stage
from vila_ops.report import ablation
from vila_ops.report.words import signed

ROOT = Path(__file__).parents[2]
INLINE = ROOT / "configs/resources/inline.yaml"


def resources_in(folder: Path) -> Resources:
    """Resources with a store of their own."""
    run = load(ROOT / "configs/recipes/tiny.yaml", resources=INLINE)
    return run.resources.with_changes({f"storage.{name}": str(folder / name) for name in ("store", "cache", "data")})


@pytest.fixture
def resources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Resources:
    monkeypatch.chdir(ROOT)
    return resources_in(tmp_path)


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
        measure([grid], resources)
    assert not Path(resources.storage.store).exists()


def test_a_metric_that_the_suite_does_not_measure_is_named_before_anything_is_trained(resources: Resources) -> None:
    with pytest.raises(ValueError, match=r"'pope_f1', which final_suite 'tiny' of cell 'frozen' does not measure"):
        measure([quick().with_changes({"metrics": ["caption_loss", "pope_f1"]})], resources)
    assert not Path(resources.storage.store).exists()


def test_a_cell_may_measure_the_model_after_an_earlier_stage(resources: Resources) -> None:
    grid = quick().with_changes({"cells.frozen.stage": "align"})
    assert {(one.cell, one.stage, *one.stages()) for one in runs_of(grid, resources)} == {
        ("frozen", "align", "align"),
        ("trained", "sft", "align", "pretrain", "sft"),
    }
    with pytest.raises(ValueError, match=r"after stage 'aling', and its recipe has .*did you mean 'align'"):
        runs_of(grid.with_changes({"cells.frozen.stage": "aling"}), resources)


def test_the_first_seed_of_every_grid_comes_before_the_next_seed(resources: Resources) -> None:
    one, other = quick(), quick().with_changes({"name": "other", "seeds": [0, 2]})
    assert [(run.grid, run.cell, run.seed) for run in runs_of_all([one, other], resources)] == [
        ("tiny-grid", "frozen", 0),
        ("tiny-grid", "trained", 0),
        ("other", "frozen", 0),
        ("other", "trained", 0),
        ("tiny-grid", "frozen", 1),
        ("tiny-grid", "trained", 1),
        ("other", "frozen", 2),
        ("other", "trained", 2),
    ]
    turned = runs_of_all([one, other.with_changes({"seeds": [2, 0]})], resources)
    order = [("tiny-grid", 0), ("other", 2), ("tiny-grid", 1), ("other", 0)]
    assert [(run.grid, run.seed) for run in turned[::2]] == order
    with pytest.raises(ValueError, match="grid 'tiny-grid' is given 2 times"):
        runs_of_all([one, one], resources)


def test_a_fingerprint_is_of_what_gives_other_numbers(resources: Resources) -> None:
    def fingerprints(grid: Grid) -> list[str]:
        return [fingerprint_of(one) for one in runs_of(grid, resources)]

    own = fingerprints(quick())
    assert len(set(own)) == 4
    assert fingerprints(quick().with_changes({"name": "other", "title": "Other", "claims": []})) == own
    assert not set(own) & set(fingerprints(quick().with_changes({"recipe.final_suite.max_objects": 11})))
    assert not set(own) & set(fingerprints(quick().with_changes({"recipe.stages.align.learning_rate": 1e-4})))
    vllm = resources.with_changes({"evaluate.engine": {"kind": "vllm"}})
    assert not set(own) & {fingerprint_of(one) for one in runs_of(quick(), vllm)}


def test_raw_data_that_is_not_on_this_machine_is_named(
    resources: Resources, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, *_ = runs_of(quick(), resources)
    assert not_here(one) == []
    monkeypatch.chdir(tmp_path)  # to which the paths of the tiny recipe are relative
    assert not_here(one) == ["tiny_align", "tiny_pretrain", "tiny_sft", "tiny_held_out"]


def test_a_fingerprint_has_the_content_of_official_files(resources: Resources, tmp_path: Path) -> None:
    def fingerprint() -> str:
        changes = {"recipe.final_suite.benchmarks.pope": read(ROOT / "configs/benchmarks/pope.yaml")}
        return fingerprint_of(runs_of(quick().with_changes(changes), own)[0])

    own = resources.with_changes({"storage.benchmarks": str(tmp_path / "official")})
    found = [fingerprint()]
    shutil.copytree(ROOT / "docs/samples/pope", tmp_path / "official/pope")
    found += [fingerprint(), fingerprint()]
    assert found[1] == found[2]
    changed = next(path for path in sorted((tmp_path / "official/pope").rglob("*")) if path.is_file())
    changed.write_bytes(changed.read_bytes() + b"\n")
    found.append(fingerprint())
    assert len(set(found)) == 3
    assert not Path(own.storage.store).exists()


@dataclass(frozen=True)
class Measured:
    """A quick grid that was run, and the files of its results."""

    resources: Resources
    folder: Path
    grid: Grid
    results: list[CellResult]
    shown: GridResult


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Measured:
    root, grid = tmp_path_factory.mktemp("grid"), quick()
    resources, folder = resources_in(root), root / "results"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        results = measure([grid], resources, folder=folder)[grid.name]
    return Measured(resources, folder, grid, results, grid_result(grid, scores_of(grid, results)))


@pytest.mark.slow
def test_a_grid_trains_what_its_cells_do_not_share_and_then_nothing(
    measured: Measured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    grid, resources = measured.grid, measured.resources
    trained = list(sealed(Checkpoint, store=resources.storage.store))
    assert sorted(one.stage for one in trained) == ["align"] * 2 + ["pretrain"] * 4 + ["sft"] * 4
    for cell, value in measured.shown.metrics[0].values.items():
        reports = [
            read_report(evaluate_stage(one.run, "sft", one.run.recipe.final_suite))
            for one in runs_of(grid, resources)
            if one.cell == cell
        ]
        own = [m.value for report in reports for m in report.metrics if (m.name, m.role) == ("caption_loss", "model")]
        assert value.by_seed == pytest.approx(own)
    assert measure([grid], resources)[grid.name] == measured.results
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


@pytest.mark.slow
def test_the_page_of_a_grid_has_what_its_cells_took(
    measured: Measured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    for page in (tmp_path / "grid.html", tmp_path / "grid.md"):
        ablation.write(page, measured.shown, measured.results)
    html = (tmp_path / "grid.html").read_text()
    check_loads_nothing(html)
    check_accessible(html)
    positions = {row[0]: row[1] for row in Page(html).rows if len(row) == 5 and "," in row[1]}
    assert positions == {"frozen": "1,536", "trained": "1,536", ablation.ALL: "2,560"}  # of 256 in a stage
    text = (tmp_path / "grid.md").read_text()
    assert f"| {ablation.ALL} | 2,560 |" in text
    images = re.findall(r"^!\[(.*)\]\((.*)\)$", text, flags=re.MULTILINE)
    assert images == [(stage, f"grid.{stage}.svg") for stage in ("align", "pretrain", "sft")]
    for stage, name in images:
        drawn = ElementTree.fromstring((tmp_path / name).read_text())
        named = {one.text for one in drawn.iter("{http://www.w3.org/2000/svg}text")}
        assert {"frozen", "trained"} <= {cell for one in named if one for cell in one.split(", ")}, stage
    (row,) = [line for line in text.splitlines() if line.startswith(f"| {measured.shown.claims[0].claim.says} |")]
    assert row.endswith(f"| {' '.join(map(signed, measured.shown.claims[0].advantage.by_seed))} |")

    told: list[dict[str, Any]] = []
    monkeypatch.setattr(flow, "TASKS", TASKS)
    for artifact in ("create_table_artifact", "create_markdown_artifact"):
        monkeypatch.setattr(flow, artifact, lambda **shown: told.append(shown))
    claim = measured.shown.claims[0]
    assert flow._work(measured.grid, measured.resources) == {claim.claim.says: claim.verdict}
    assert [one["key"] for one in told] == ["vila-claims", "vila-grid"]
    assert told[1]["markdown"] == ablation.markdown(measured.shown, measured.results)


class Trained(Exception):
    """A task was asked for."""


def refused(*_: object) -> NoReturn:
    raise Trained


NOTHING = Tasks(assemble=refused, prepare=refused, train_stage=refused, evaluate=refused)


@pytest.mark.slow
def test_a_machine_with_an_empty_store_takes_every_result_from_its_file(
    measured: Measured, resources: Resources, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = measured.grid
    taken = measure([grid], resources, folder=measured.folder, tasks=NOTHING)[grid.name]
    assert not Path(resources.storage.store).exists()
    for suffix in ("html", "md"):
        pages = [tmp_path / name / f"grid.{suffix}" for name in ("store", "files")]
        for page, results in zip(pages, (measured.results, taken), strict=True):
            page.parent.mkdir(exist_ok=True)
            ablation.write(page, grid_result(grid, scores_of(grid, results)), results)
        assert pages[0].read_text() == pages[1].read_text()
    cells = {"mine": grid.cells["trained"], "yours": {"stage": "align"}}
    other = grid.with_changes({"name": "other", "cells": cells, "claims": []})
    asked: list[tuple[str, str]] = []
    opened: list[str] = []

    @contextmanager
    def opening(_: Resources, name: str, **__: object) -> Iterator[None]:
        opened.append(name)
        yield

    def trains(run: Run, stage: str, *_: object, **__: object) -> NoReturn:
        asked.append((run.recipe.name, stage))
        raise Trained

    monkeypatch.setattr("vila_ops.ablate.measure.evaluate_stage", trains)
    monkeypatch.setattr("vila_ops.tracking.open_run", opening)
    with pytest.raises(Trained):
        measure([grid, other], resources, folder=measured.folder)
    assert asked == [("other-yours", "align")]
    assert opened == ["other"]
    cost = cost_of_grid(runs_of(other, resources), results=read_results(measured.folder))
    assert [(one.cell, one.seed, one.done, one.runs) for one in cost.cells] == [
        ("mine", 0, True, ()),
        ("yours", 0, False, ("align",)),
        ("mine", 1, True, ()),
        ("yours", 1, False, ("align",)),
    ]
    timed = [task for one in measured.results for task in one.tasks if task.name in ("align", "tiny")]
    assert 0 < (cost.hours or 0) * 3600 <= 4 * max(task.seconds for task in timed)
    assert cost.evaluations


@pytest.mark.slow
def test_a_model_before_later_stages_needs_none_of_them(
    measured: Measured, resources: Resources, tmp_path: Path
) -> None:
    folder = shutil.copytree(measured.folder, tmp_path / "results")
    cells = {"base": {"stage": "base"}, "trained": measured.grid.cells["trained"]}
    grid = measured.grid.with_changes({"cells": cells, "claims": []})
    results = measure([grid], resources, folder=folder)[grid.name]
    assert [(one.cell, one.stage, list(one.losses)) for one in results if one.seed == 0] == [
        ("base", "base", []),
        ("trained", "sft", ["align", "pretrain", "sft"]),
    ]
    assert not list(sealed(Checkpoint, store=resources.storage.store))


@pytest.mark.slow
def test_a_file_of_other_settings_is_named_and_kept_and_its_cell_runs_again(
    measured: Measured, resources: Resources, caplog: pytest.LogCaptureFixture
) -> None:
    before = {path.name: path.read_bytes() for path in measured.folder.iterdir()}
    assert len(before) == 4
    changed = measured.grid.with_changes({"recipe.stages.sft.learning_rate": 1e-4})
    with pytest.raises(Trained):
        measure([changed], resources, folder=measured.folder, tasks=NOTHING)
    for name in before:
        assert f"{name} is of other settings or of another version of vila-ops, so cell" in caplog.text
    assert {path.name: path.read_bytes() for path in measured.folder.iterdir()} == before


@pytest.mark.slow
def test_a_file_names_no_place_of_its_machine(measured: Measured) -> None:
    for path in measured.folder.iterdir():
        text = path.read_text()
        assert str(ROOT) not in text
        assert str(measured.folder.parent) not in text
        assert text == json.dumps(json.loads(text), sort_keys=True, indent=1) + "\n"
        kept = json.loads(text)
        assert path.name == f"tiny-grid.{kept['cell']}.{kept['seed']}.{kept['key'][:16]}.json"
        assert list(kept["scores"]) == ["caption_loss", "text_loss"]
        assert [(task["task"], task["name"]) for task in kept["tasks"]] == [
            ("train", "align"),
            ("train", "pretrain"),
            ("train", "sft"),
            ("evaluate", "tiny"),
        ]


@pytest.mark.slow
def test_a_file_that_is_no_result_is_refused_before_anything_is_trained(
    measured: Measured, resources: Resources, tmp_path: Path
) -> None:
    (tmp_path / "results").mkdir()
    whole = next(measured.folder.iterdir())
    cut = tmp_path / "results" / whole.name
    cut.write_bytes(whole.read_bytes()[:1000])
    with pytest.raises(ValueError, match=rf"{whole.name} is no result of a cell .*; restore it, or move it away"):
        measure([measured.grid], resources, folder=tmp_path / "results", tasks=NOTHING)
    with pytest.raises(ValueError, match="is a file; name a folder"):
        measure([measured.grid], resources, folder=cut, tasks=NOTHING)
    cut.write_text("")
    with pytest.raises(ValueError, match=r"this version reads \(Invalid JSON"):
        measure([measured.grid], resources, folder=cut.parent, tasks=NOTHING)


def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_trained(
    resources: Resources, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"where no file can be written .*; name another folder"):
        measure([quick()], resources, folder=tmp_path / "file/results", tasks=NOTHING)


@pytest.mark.slow
def test_a_metric_that_files_lack_is_named_before_another_cell_is_trained(
    measured: Measured, resources: Resources
) -> None:
    cells = {"yours": {"stage": "align"}, "mine": measured.grid.cells["trained"]}
    metrics = ["caption_loss", "caption_loss_best"]
    other = measured.grid.with_changes({"name": "other", "cells": cells, "claims": [], "metrics": metrics})
    with pytest.raises(ValueError, match="'other' shows 'caption_loss_best', and the report of its cell 'mine' has no"):
        measure([other], resources, folder=measured.folder, tasks=NOTHING)


@pytest.mark.slow
def test_a_grid_that_is_not_decided_hides_no_other_one(
    measured: Measured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    grids = [measured.grid.with_changes({"name": "bad"}), measured.grid]
    for grid in grids:
        (tmp_path / f"{grid.name}.yaml").write_text(yaml.safe_dump(grid.model_dump(mode="json")))
    bad = [one.with_changes({"scores": {}}) for one in measured.results]
    results = {"bad": bad, measured.grid.name: measured.results}
    monkeypatch.setattr("vila_ops.ablate.measure.measure", lambda *_, **__: results)
    ran = CliRunner().invoke(app, ["ablate", *(str(tmp_path / f"{grid.name}.yaml") for grid in grids)])
    assert f": {measured.grid.claims[0].says} (" in ran.stdout
    assert ran.exit_code != 0
    assert "grid 'bad' is not decided: grid 'bad' shows 'caption_loss'" in f"{ran.output}{ran.exception}"


@pytest.mark.slow
def test_of_two_files_of_one_fingerprint_the_first_by_name_counts(
    measured: Measured, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = shutil.copytree(measured.folder, tmp_path / "results")
    first, *_ = sorted(folder.iterdir())
    tree = json.loads(first.read_text())
    (folder / "zz.json").write_text(json.dumps({**tree, "grid": "other"}))
    assert read_results(folder) == read_results(measured.folder)
    assert f"{first.name} and zz.json are of one model on one suite; {first.name} counts" in caplog.text


def renamed(folder: Path, to: Path, **changes: Any) -> Path:
    """The files of results in another folder, as another version would have made them: with other keys."""
    to.mkdir()
    for path in folder.iterdir():
        tree = {**json.loads(path.read_text()), **changes}
        tree["key"] = f"{'0' * 16}{tree['key']}"
        (to / f"{tree['grid']}.{tree['cell']}.{tree['seed']}.{'0' * 16}.json").write_text(
            json.dumps(tree, sort_keys=True, indent=1) + "\n"
        )
    return to


@pytest.mark.slow
def test_files_of_another_version_give_the_page_and_nothing_is_trained(
    measured: Measured, resources: Resources, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid, folder = measured.grid, renamed(measured.folder, tmp_path / "old")
    with pytest.raises(Trained):
        measure([grid], resources, folder=folder, tasks=NOTHING)
    taken = from_files([grid], resources, folder)[grid.name]
    assert grid_result(grid, scores_of(grid, taken)) == measured.shown
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(grid.model_dump(mode="json")))
    options = ("--results", str(folder), "--from-files")
    ran = CliRunner().invoke(
        app, ["ablate", str(tmp_path / "grid.yaml"), *options, "--page", str(tmp_path / "grid.md")]
    )
    assert ran.exit_code == 0, ran.output
    text = (tmp_path / "grid.md").read_text()
    ours = {one.versions["vila-ops"] for one in taken}
    assert len(ours) == 1
    assert text.count(f"| {ours.pop()} |") == 4
    assert not Path(resources.storage.store).exists()
    for changes in (options[-1:], (*options, "--dry-run")):
        ran = CliRunner().invoke(app, ["ablate", str(tmp_path / "grid.yaml"), *changes])
        assert "--from-files reads the folder that --results names" in f"{ran.output}{ran.exception}"


@pytest.mark.slow
def test_what_files_lack_or_have_twice_is_named(measured: Measured, resources: Resources, tmp_path: Path) -> None:
    grid, folder = measured.grid, renamed(measured.folder, tmp_path / "old")
    for path in measured.folder.iterdir():
        shutil.copy(path, folder)
    assert from_files([grid], resources, folder)[grid.name] == measured.results  # those of this version
    changed = grid.with_changes({"recipe.stages.sft.learning_rate": 1e-4})
    with pytest.raises(ValueError, match=r"cell frozen of tiny-grid with seed 0 has 2 files, and none of this version"):
        from_files([changed], resources, folder)
    (folder / f"tiny-grid.trained.1.{'0' * 16}.json").unlink()
    next(folder.glob("tiny-grid.trained.1.*")).unlink()
    with pytest.raises(ValueError, match=r"1 of 4 cells and seeds have no file: tiny-grid\.trained\.1"):
        from_files([grid], resources, folder)


@pytest.mark.slow
def test_a_file_names_the_cells_of_other_grids_that_use_it(
    measured: Measured, resources: Resources, tmp_path: Path
) -> None:
    folder = shutil.copytree(measured.folder, tmp_path / "results")
    cells = {"mine": measured.grid.cells["trained"], "yours": measured.grid.cells["frozen"]}
    other = measured.grid.with_changes({"name": "other", "cells": cells, "claims": []})
    measure([other], resources, folder=folder, tasks=NOTHING)
    assert len(list(folder.iterdir())) == 4
    taken = from_files([other], resources, renamed(folder, tmp_path / "old"))["other"]
    assert [(one.cell, one.seed) for one in taken] == [("mine", 0), ("yours", 0), ("mine", 1), ("yours", 1)]
    by_name = {(one.cell, one.seed): one.model for one in measured.results}
    assert [one.model for one in taken] == [by_name[cell, seed] for seed in (0, 1) for cell in ("trained", "frozen")]


@pytest.mark.slow
def test_files_of_different_versions_of_torch_are_told(
    measured: Measured, resources: Resources, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = shutil.copytree(measured.folder, tmp_path / "results")
    path = next(folder.glob("tiny-grid.trained.1.*"))
    tree = json.loads(path.read_text())
    own, tree["versions"]["torch"] = tree["versions"]["torch"], "1.0"
    path.write_text(json.dumps(tree, sort_keys=True, indent=1) + "\n")
    taken = measure([measured.grid], resources, folder=folder, tasks=NOTHING)[measured.grid.name]
    told = f"different versions of torch: 1.0 (trained 1); {own} (frozen 0, trained 0, frozen 1)"
    assert f"grid tiny-grid: results were made with {told}" in caplog.text
    assert told in ablation.markdown(measured.shown, taken)
    assert told in ablation.render(measured.shown, taken)
