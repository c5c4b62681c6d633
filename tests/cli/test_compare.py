"""`vila-ops compare` prints a table that fits a terminal, and says what it cannot compare."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from tests.eval.charts import METRIC, checkpoint_of, sealed_report, suite_of, write_charts
from vila_ops.cli import app
from vila_ops.config import Resources

ROOT = Path(__file__).parents[2]
OLD = [f"human-{chart}" for chart in range(6)]
NEW = [f"human-{chart}" for chart in range(12)]


@pytest.fixture(scope="module")
def resources(tmp_path_factory: pytest.TempPathFactory) -> Resources:
    folder = tmp_path_factory.mktemp("charts")
    where = {"storage.store": str(folder / "store"), "storage.cache": str(folder / "cache")}
    files = {"storage.benchmarks": str(write_charts(folder / "files", 12))}
    return Resources(launch="inline").with_changes({**where, **files})


@pytest.fixture(scope="module")
def old(resources: Resources) -> str:
    return sealed_report(resources, checkpoint_of("old"), OLD).uri


@pytest.fixture(scope="module")
def new(resources: Resources) -> str:
    return sealed_report(resources, checkpoint_of("new"), NEW).uri


def compare(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["compare", *arguments])


def test_the_table_fits_a_terminal_and_says_who_is_better(old: str, new: str) -> None:
    result = compare(old, new, "--slices", "--disagreements", "1")
    assert result.exit_code == 0, result.exception
    lines = result.stdout.splitlines()
    assert lines[0] == f"A  {old}"
    assert all(len(line) <= 80 for line in lines if old not in line and new not in line)
    first, second = (line.split() for line in lines if line.startswith("  official "))
    assert first[:4] == ["official", "0.500", "0.250", "+0.250"]
    # Six charts gain one right answer each, so 2 of 64 sign flips are as far: mid-p 1/64.
    assert first[-3:] == ["better", "0.016", "0.016"]
    assert second[-3:] == ["6", "24", "12"]  # items that differ, items, charts
    assert [line.split()[:4] for line in lines if line.startswith("human ")] == [["human", "1.000", "0.500", "+0.500"]]
    assert f"{METRIC}, item human-6" in lines
    assert "   asked: human question 6?" in lines
    assert "   A: 'no', scored 0" in lines
    assert "   B: 'yes', scored 1" in lines


def test_slices_are_printed_on_request_and_a_metric_may_be_chosen(old: str, new: str) -> None:
    result = compare(old, new, "--metric", "charts_corrected")
    assert "2 slices are not shown: --slices prints them" in result.stderr
    assert "  official" not in result.stdout


def test_several_candidates_have_letters(resources: Resources, old: str, new: str) -> None:
    worse = sealed_report(resources, checkpoint_of("worse"), OLD[1:]).uri
    lines = compare(old, new, worse, "--metric", METRIC).stdout.splitlines()
    assert lines[4] == f"C  {worse}"
    assert [line.split()[:3] for line in lines if line.startswith("  official")][:2] == [
        ["official", "B", "0.500"],
        ["official", "C", "0.208"],
    ]
    assert all(len(line) <= 80 for line in lines[6:])


def test_json_is_one_object(old: str, new: str) -> None:
    content = json.loads(compare(old, new, "--json").stdout)
    assert [one["name"] for one in content["models"]] == [old, new]
    overall = content["comparison"]["metrics"][0]["overall"]
    assert (overall["baseline"], overall["candidate"]) == (0.25, 0.5)


def test_what_is_not_compared_is_named(resources: Resources, old: str) -> None:
    suite = suite_of().with_changes({"benchmarks": {"other": suite_of().benchmarks["charts"].model_dump()}})
    both = suite.with_changes({"benchmarks": {**suite.benchmarks, **suite_of().benchmarks}})
    result = compare(old, sealed_report(resources, checkpoint_of("both"), NEW, both).uri)
    assert "not compared: other of B: the baseline was not measured on it" in result.stdout
    alone = compare(old, sealed_report(resources, checkpoint_of("alone"), NEW, suite).uri)
    assert alone.exit_code == 1
    assert "have nothing in common: charts of" in str(alone.exception)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("a",), "only a is given; a comparison needs a second model"),
        (("a", "b", "a"), "a is given twice"),
        (("nowhere", "b"), "'nowhere' is no report: give the folder that `vila-ops evaluate` prints, a recipe"),
        (("toy@champion", "b"), "the registry is MLflow's: set resources.tracking.uri"),
        (("models:/toy/3", "b"), "the registry is MLflow's: set resources.tracking.uri"),
        (("0123456789abcdef0123456789abcdef", "b"), "is MLflow's: set resources.tracking.uri"),
    ],
)
def test_references_that_name_no_report_are_refused(arguments: tuple[str, ...], message: str, tmp_path: Path) -> None:
    resources = tmp_path / "resources.yaml"
    resources.write_text(f"launch: inline\nstorage: {{store: {tmp_path}/store}}\n")
    result = compare(*arguments, "-r", str(resources))
    assert result.exit_code == 1
    assert message in str(result.exception)


def test_an_artifact_that_is_no_report_is_told_by_its_kind(resources: Resources, old: str) -> None:
    store = Path(resources.storage.store)
    score = next((store / "score").iterdir())
    assert f"{score} is a score, not a report" in str(compare(old, str(score)).exception)


def test_a_recipe_without_a_report_says_how_to_make_one(
    old: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    resources = tmp_path / "resources.yaml"
    resources.write_text(f"launch: inline\nstorage: {{store: {tmp_path}/store}}\n")
    result = compare(old, "configs/recipes/tiny.yaml", "-r", str(resources))
    assert (
        "recipe 'tiny' has no report yet: its untrained model was not assembled; make it with `vila-ops evaluate "
        in (str(result.exception))
    )
    assert "configs/recipes/tiny.yaml --stage sft --final`" in str(result.exception)
    assert not (tmp_path / "store").exists()
