"""Tables fit a terminal of 80 columns."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from vila_ops.cli import app
from vila_ops.cli.scores import scores
from vila_ops.cli.tables import table
from vila_ops.eval.report import Report, ReportMetric

ROOT = Path(__file__).parents[2]


def test_columns_that_do_not_fit_follow_below_with_the_first_one_again() -> None:
    rows = [("name", "a" * 40, "b" * 30, "c" * 40), ("x", "1", "2", "3")]
    assert table(rows) == [
        f"name  {'a' * 40}  {'b' * 30}",
        f"x     1{' ' * 39}  2",
        "",
        f"name  {'c' * 40}",
        "x     3",
    ]


def test_a_cell_that_is_wider_than_a_terminal_has_its_own_table() -> None:
    assert table([("a", "b" * 90, "c")]) == [f"a  {'b' * 90}", "", "a  c"]


@pytest.mark.parametrize("path", sorted((ROOT / "configs/recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_show_fits_for_every_recipe(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    done = CliRunner().invoke(app, ["show", str(path)])
    assert done.exit_code == 0, done.output
    _, *lines = done.stdout.splitlines()  # the first has the fingerprint
    assert max(map(len, lines)) <= 80


def test_scores_fit_and_name_their_intervals() -> None:
    def metric(name: str, role: str, value: float, low: float, high: float, unit: str) -> ReportMetric:
        facts = {"name": name, "role": role, "value": value, "low": low, "high": high, "n": 311, "unit": unit}
        return ReportMetric.model_validate({**facts, "lower_is_better": False, "measure": name})

    report = Report(
        suite="mine-test", split="test", model="0123456789abcdef", data="d", benchmarks={}, layers=(), answers=(),
        metrics=(
            metric("text_multiple_choice", "model", 0.39, 0.32, 0.455, "share right"),
            metric("text_multiple_choice", "chance", 0.25, 0.25, 0.25, "share right"),
            metric("cider", "gap", -0.04, -0.07, -0.017, "CIDEr-D (0 to 10)"),
        ),
    )  # fmt: skip
    lines = scores(report)
    assert lines[0] == "suite mine-test, test split, model 0123456789ab"
    assert lines[2].split()[:3] == ["score", "of", "value"]
    assert "text_multiple_choice  model   0.390   [0.320, 0.455]    311    share right" in lines
    assert "text_multiple_choice  chance  0.250                     311    share right" in lines
    assert "cider                 gap     -0.040  [-0.070, -0.017]  311    CIDEr-D (0 to 10)" in lines
    assert max(map(len, lines)) <= 80
