"""The page of a grid, of scores and tasks by hand."""

from pathlib import Path
from typing import Any

import pytest

from tests.ablate.test_verdicts import constant, grid
from tests.report.parsed import HOSTILE, Page, check_accessible, check_loads_nothing
from vila_ops.ablate.results import CellResult, CellTask
from vila_ops.ablate.verdicts import GridResult, grid_result
from vila_ops.artifacts.output import MARK
from vila_ops.eval.report import LayerPoint
from vila_ops.report import ablation

CELLS = {"a": {"paper": {"0-shot": 66.8}}, "b": {"paper": {"MMLU": 51, "0-shot": 69.0}}}
SCORES = {"accuracy": {"a": constant(0.1, 0.1, 0.2, 0.2), "b": constant(0.3, 0.3, 0.5, 0.5)}}


def result(**changes: Any) -> GridResult:
    return grid_result(grid(cells=CELLS, **changes), SCORES)


def task(key: str, **changes: Any) -> CellTask:
    own = {"task": "train", "name": "sft", "key": key, "seconds": 1800, "gpu_hours": 0.5}
    return CellTask.model_validate({**own, "positions": 1000, "money": 2.0, **changes})


def cell(name: str, seed: int, *tasks: CellTask, loss: float = 4.0) -> CellResult:
    points = [(0, 0.1 + seed / 10), (1, 0.3)]
    return CellResult(
        **bare(name, seed),
        tasks=tasks,
        losses={"sft": tuple((step, loss) for step in range(4))},
        layers=tuple(
            LayerPoint(name="alignment", role="model", layer=layer, value=value, low=value - 0.01, high=value + 0.02)
            for layer, value in points
        ),
    )


def bare(name: str, seed: int) -> dict[str, Any]:
    told = {"stage": "sft", "model": f"model of {name}", "report": f"report of {name}", "key": "f"}
    return {"grid": "g", "cell": name, "seed": seed, **told, "metrics": (), "items": (), "scores": {}, "versions": {}}


MEASURED = [
    cell("a", 0, task("a0"), task("shared", name="align")),
    cell("a", 1, task("a1"), loss=2.0),
    cell("b", 0, task("b0"), task("shared", name="align")),
    cell("b", 1, task("b1"), loss=2.0),
]


@pytest.fixture(scope="module")
def html() -> str:
    return ablation.render(result(), MEASURED)


def test_a_claim_has_its_verdict_and_advantage(html: str) -> None:
    (row,) = [row for row in Page(html).rows if row[0] == "b is better"]
    # advantages of the seeds: 0.2, 0.2, 0.3, 0.3; Student's interval over them has half a width of 0.0919
    assert row[1:] == [
        "shown",
        "accuracy",
        "b over a, by 0.1",
        "+0.250 [+0.158, +0.342]",
        "+0.200 +0.200 +0.300 +0.300",
    ]


def test_the_paper_s_numbers_are_as_printed_and_what_it_lacks_is_a_dash(html: str) -> None:
    assert [row for row in Page(html).rows if row[1:] in (["–", "66.8"], ["51", "69.0"])] == [
        ["a", "–", "66.8"],
        ["b", "51", "69.0"],
    ]


def test_a_shared_task_counts_once_in_the_sum(html: str) -> None:
    rows = {row[0]: row[1:] for row in Page(html).rows if len(row) == 5 and row[1].endswith(",000")}
    assert rows["a"] == ["3,000", "1.500", "1.500", "6.000"]
    assert rows[ablation.ALL] == ["5,000", "2.500", "2.500", "10.000"]


def test_cells_with_the_same_stage_share_its_line() -> None:
    assert list(ablation.losses_of(MEASURED)["sft"]) == ["a", "b"]
    other = [cell("c", 0, task("a0")), cell("c", 1, task("a1"), loss=2.0)]
    lines = ablation.losses_of([*MEASURED, *other])["sft"]
    assert list(lines) == ["a, c", "b"]
    assert lines["b"] == [(step, 3.0) for step in range(4)]  # the mean of both seeds


def test_layers_are_the_mean_over_seeds_with_its_interval_over_seeds() -> None:
    """Student's t with one degree of freedom is 12.7062, and the standard error half the distance of two seeds."""
    first = ablation.layer_points(MEASURED)[0]
    assert (first["model"], first["role"], first["layer"]) == ("a", "model", 0)
    half = 12.7062 * 0.05
    assert (first["value"], first["low"], first["high"]) == pytest.approx((0.15, 0.15 - half, 0.15 + half))


def test_layers_of_shuffled_images_are_lines_of_their_own() -> None:
    def both(one: CellResult) -> CellResult:
        layers = [point.model_dump() for point in one.layers]
        return one.with_changes({"layers": [*layers, *({**point, "role": "control"} for point in layers)]})

    cells = [both(one) for one in MEASURED]
    lines = [(point["model"], point["role"], point["layer"]) for point in ablation.layer_points(cells)]
    assert lines == [(cell, role, layer) for cell in "ab" for role in ("model", "control") for layer in (0, 1)]
    assert "- a, shuffled: 0.150, 0.300" in ablation.markdown(result(), cells)
    assert "a, shuffled from 0.150 to 0.300" in ablation.render(result(), cells)


def test_drawings_are_files_beside_a_page_in_markdown(tmp_path: Path) -> None:
    ablation.write(tmp_path / "page.md", result(), MEASURED)
    text = (tmp_path / "page.md").read_text()
    for title in ("sft", "layers"):
        assert f"![{title}](page.{title}.svg)" in text
        assert (tmp_path / f"page.{title}.svg").read_text().startswith(f"{MARK}<svg ")
    assert "![" not in ablation.markdown(result(), MEASURED)


def test_the_page_says_by_what_it_measures_and_which_version_made_it(tmp_path: Path) -> None:
    told = "Text skill is <a loss>."
    cells = [one.with_changes({"versions": {"vila-ops": "0.1.0 abc", "torch": f"2.{one.seed}"}}) for one in MEASURED]
    page = Page(ablation.render(result(proxies=told), cells))
    text = ablation.markdown(result(proxies=told), cells)
    differ = "different versions of torch: 2.0 (a 0, b 0); 2.1 (a 1, b 1)"
    for one in (page.text, text):
        assert told in one
        assert differ in one
        assert "0.1.0 abc" in one


def test_the_page_loads_nothing_and_what_a_grid_says_is_only_text() -> None:
    claim = {"says": HOSTILE, "cell": "b", "than": "a", "metric": "accuracy"}
    html = ablation.render(result(title=HOSTILE, claims=[claim]), MEASURED)
    check_loads_nothing(html)
    check_accessible(html)
    assert HOSTILE in Page(html).text


def test_a_grid_without_claims_losses_or_layers_has_a_page() -> None:
    cells = [CellResult(**bare(name, 0), tasks=(), losses={}, layers=()) for name in CELLS]
    html = ablation.render(result(claims=[]), cells)
    check_accessible(html)
    assert "The grid has no claim" in Page(html).text
    assert "## Alignment" not in ablation.markdown(result(claims=[]), cells)


def test_markdown_has_the_same_tables() -> None:
    text = ablation.markdown(result(), MEASURED)
    assert text.startswith(MARK)
    by_seed = "+0.200 +0.200 +0.300 +0.300"
    assert f"| b is better | shown | accuracy | b over a, by 0.1 | +0.250 [+0.158, +0.342] | {by_seed} |" in text
    assert "| cell | paper: MMLU | paper: 0-shot | accuracy (higher is better) |" in text
    assert "| a | – | 66.8 | 0.150 [" in text
    assert f"| {ablation.ALL} | 5,000 | 2.50 | 2.50 | 10.000 |" in text
    assert "| sft | a | 3.000 | 3.000 |" in text


def test_only_pages_of_ours_are_replaced(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a page is \.html or \.md"):
        ablation.check(tmp_path / "page.pdf")
    (tmp_path / "page.md").write_text("mine")
    with pytest.raises(ValueError, match="vila-ops did not write it"):
        ablation.check(tmp_path / "page.md")
