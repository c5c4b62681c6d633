"""The page of a comparison, of sealed reports on a small ChartQA."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.eval.charts import METRIC, checkpoint_of, sealed_report, suite_of, write_charts
from tests.report.parsed import HOSTILE, Page, check_accessible, check_loads_nothing
from vila_ops.artifacts.kinds import EvalReport
from vila_ops.cli import app
from vila_ops.config import Resources
from vila_ops.eval.compare_reports import ReportComparison, compare_reports
from vila_ops.report import comparison
from vila_ops.report.comparison import CARDS, images_of, render

CHARTS = 12
OLD = {f"human-{chart}" for chart in range(8)}
NEW = {f"human-{chart}" for chart in range(1, 10)} | {f"augmented-{chart}" for chart in range(4)}


@pytest.fixture(scope="module")
def resources(tmp_path_factory: pytest.TempPathFactory) -> Resources:
    folder = tmp_path_factory.mktemp("charts")
    files = write_charts(folder / "files", CHARTS)
    questions = files / "chartqa/test/test_human.json"
    records = json.loads(questions.read_text())
    records[0]["query"] = HOSTILE
    questions.write_text(json.dumps(records))
    where = {"storage.store": str(folder / "store"), "storage.cache": str(folder / "cache")}
    return Resources(launch="inline").with_changes({**where, "storage.benchmarks": str(files)})


@pytest.fixture(scope="module")
def old(resources: Resources) -> EvalReport:
    return sealed_report(resources, checkpoint_of("old"), OLD)


@pytest.fixture(scope="module")
def new(resources: Resources) -> EvalReport:
    return sealed_report(resources, checkpoint_of("new"), NEW)


@pytest.fixture(scope="module")
def compared(old: EvalReport, new: EvalReport) -> ReportComparison:
    return compare_reports({"before": old, "after": new}, metrics=(METRIC,))


@pytest.fixture(scope="module")
def html(compared: ReportComparison) -> str:
    return render(compared, images_of(compared))


def test_the_difference_is_that_of_right_answers_by_hand(html: str, compared: ReportComparison) -> None:
    [metric] = compared.comparison.metrics
    (row,) = [row for row in Page(html).rows if row[0].startswith(METRIC)]
    assert row[0] == f"{METRIC} {metric.verdict}"
    interval = f"[{metric.overall.low:+.3f}, {metric.overall.high:+.3f}]".replace("-", "−")
    assert row[2:5] == [f"+{5 / 24:.3f} {interval}", f"{8 / 24:.3f}", f"{13 / 24:.3f}"]
    assert row[5] == f"{metric.p_holm:.3f} alone {metric.p:.3f}"
    assert row[6] == f"{metric.detectable:.3f}"
    assert row[7] == "24 12 groups, 7 differ"


def test_slices_are_those_of_the_two_files(html: str) -> None:
    rows = {row[0]: row for row in Page(html).rows}
    assert [rows["human"][column] for column in (2, 3, 4)] == [f"{8 / 12:.3f}", f"{9 / 12:.3f}", "12"]
    assert [rows["augmented"][column] for column in (2, 3, 4)] == ["0.000", f"{4 / 12:.3f}", "12"]


def test_each_disagreement_is_shown_with_its_image_and_both_answers(html: str, compared: ReportComparison) -> None:
    page = Page(html)
    assert len(OLD ^ NEW) <= CARDS
    for item in OLD ^ NEW:
        assert item in page.text
    assert [image["src"] for image in page.all("img")] == [
        url for one in compared.disagreements for url in images_of(compared)["charts", one.item]
    ]
    assert all((image["src"] or "").startswith("data:image/jpeg;base64,") for image in page.all("img"))
    lost = page.text[page.text.index("human-0") :]
    assert lost[: lost.index("Differs by")].endswith("Expected yes A yes scored 1 B no scored 0 ")


def test_the_page_loads_nothing_and_what_a_file_says_is_only_text(html: str) -> None:
    check_loads_nothing(html)
    check_accessible(html)
    assert HOSTILE in Page(html).text


def test_a_name_is_only_text(old: EvalReport, new: EvalReport) -> None:
    named = compare_reports({HOSTILE: old, f"{HOSTILE}2": new}, metrics=(METRIC,))
    check_loads_nothing(render(named, {}))


def test_what_is_not_compared_is_told(resources: Resources, old: EvalReport) -> None:
    both = suite_of("both").with_changes(
        {"benchmarks": {**suite_of().benchmarks, "other": suite_of().benchmarks["charts"]}}
    )
    other = sealed_report(resources, checkpoint_of("both"), NEW, both)
    text = Page(render(compare_reports({"before": old, "after": other}), {})).text
    assert "Not compared: other of B: the baseline was not measured on it" in text


def test_images_are_bounded(compared: ReportComparison, monkeypatch: pytest.MonkeyPatch) -> None:
    every = images_of(compared)
    one = len(every["charts", compared.disagreements[0].item][0])
    monkeypatch.setattr(comparison, "IMAGE_BYTES", one + 10)
    assert sum(len(url) for urls in images_of(compared).values() for url in urls) <= one + 10
    assert len(every) == len(OLD ^ NEW)


def test_the_same_reports_give_the_same_bytes(html: str, old: EvalReport, new: EvalReport) -> None:
    again = compare_reports({"before": old, "after": new}, metrics=(METRIC,))
    assert render(again, images_of(again)) == html


def test_an_image_from_elsewhere_is_refused(compared: ReportComparison) -> None:
    with pytest.raises(ValueError, match="is not in the page"):
        render(compared, {("charts", "human-0"): ["https://example.test/a.png"]})


def test_the_command_writes_the_page_and_replaces_only_its_own(
    old: EvalReport, new: EvalReport, tmp_path: Path
) -> None:
    page = tmp_path / "page.html"
    for _ in range(2):
        assert CliRunner().invoke(app, ["compare", old.uri, new.uri, "--out", str(page)]).exit_code == 0
    assert "charts_official" in page.read_text()
    assert str(Path(old.uri).parents[1]) not in page.read_text()
    page.write_text("mine")
    refused = CliRunner().invoke(app, ["compare", old.uri, new.uri, "--out", str(page)])
    assert "vila-ops did not write it" in str(refused.exception)
    assert page.read_text() == "mine"
