"""Rows to numbers: faults of rows are named, and the items table keeps every field."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.eval.benchmarks.sample import config_of, rows_of, sample_items
from vila_ops.config.benchmarks import Pope
from vila_ops.config.eval import MeasureSettings
from vila_ops.eval import scoring
from vila_ops.eval.benchmark import BenchmarkModule, Item, MetricValues, Units
from vila_ops.eval.rows import ItemRow, Response, read_responses, read_rows, write_responses, write_rows
from vila_ops.eval.scoring import score

CONFIG = config_of(Pope, version=None)
SETTINGS = MeasureSettings(bootstrap_resamples=50)
ITEMS = sample_items(CONFIG)
ROWS = rows_of(ITEMS, CONFIG, lambda item, _: item.references["label"])


def test_reordered_rows_give_the_same_numbers() -> None:
    first, second = (score(ITEMS, rows, CONFIG, SETTINGS).measurement for rows in (ROWS, ROWS[::-1]))
    assert {one.name: one.value for one in first.metrics} == {one.name: one.value for one in second.metrics}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (ROWS[1:], r"1 items have no row, such as 'COCO_val2014_000000000001.jpg:Is there a ball"),
        ([*ROWS, ROWS[3]], "has 2 rows of condition 'matched' and rotation 0; keep one"),
        (
            [*ROWS[1:], replace(ROWS[0], item="x")],
            "1 rows are of other items, such as .x.",
        ),
        ([replace(row, response=Response(status="timeout")) for row in ROWS], "all 48 requests failed"),
    ],
    ids=["missing", "doubled", "of another split", "all failed"],
)
def test_rows_that_do_not_fit_the_items_are_refused(rows: Sequence[ItemRow], message: str) -> None:
    policy = config_of(Pope, version=None, failed_items="left_out")
    with pytest.raises(ValueError, match=message):
        score(ITEMS, rows, policy, SETTINGS)


def test_a_metric_of_a_single_group_has_a_reason_in_place_of_a_number() -> None:
    """A value without an interval would look certain; what is asked of one image alone is kept and says why."""
    items = [item for item in ITEMS if item.group == ITEMS[0].group]
    scored = score(items, [row for row in ROWS if row.group == ITEMS[0].group], CONFIG, SETTINGS)
    names = {one.name for one in score(ITEMS, ROWS, CONFIG, SETTINGS).measurement.metrics}
    assert scored.measurement.metrics == ()
    assert scored.measurement.undefined.keys() == names
    reason = "12 items in 1 clusters; an interval needs at least two clusters"
    assert scored.measurement.undefined["pope_f1_official"] == reason
    assert len(scored.rows) == 12


class Fixed:
    """A benchmark with given values."""

    def __init__(self, values: list[MetricValues], scores: float = 1.0) -> None:
        self._values, self._scores = values, scores

    def score(self, items: Sequence[Item], rows: Sequence[ItemRow], config: Any) -> list[dict[str, float]]:
        return [{"x": self._scores} for _ in rows]

    def metrics(self, items: Sequence[Item], rows: Sequence[ItemRow], config: Any) -> list[MetricValues]:
        return self._values


def scored_as(benchmark: Any, monkeypatch: pytest.MonkeyPatch) -> scoring.Scored:
    module: BenchmarkModule = benchmark
    monkeypatch.setattr(scoring, "benchmark_of", lambda kind: module)
    return score(ITEMS, ROWS, CONFIG, SETTINGS)


def test_a_score_that_is_not_finite_is_refused_with_its_item(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"item 'COCO.*' has no finite score 'x'"):
        scored_as(Fixed([], scores=float("nan")), monkeypatch)


def test_slices_and_the_gap_to_a_control_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    units = Units(("a", "b", "c"), ("1", "2", "3"), (("red",), ("red", "big"), ()))
    loss = {"statistic": "ratio", "unit": "nats per token", "lower_is_better": True}
    model = MetricValues("pope_loss", units, np.array([[2.0, 1], [4, 1], [3, 1]]), **loss)  # type: ignore[arg-type]
    control = replace(model, role="control", values=np.array([[4.0, 1], [5, 1], [9, 1]]))
    accuracy = MetricValues("pope_accuracy", units, np.array([1.0, 0.0, 1.0]))
    less = replace(accuracy, role="control", values=np.array([0.0, 0.0, 1.0]))
    content = scored_as(Fixed([model, control, accuracy, less]), monkeypatch).measurement
    assert {(one.name, one.role): one.value for one in content.metrics} == pytest.approx(
        {
            ("pope_loss", "model"): 3,
            ("pope_loss", "control"): 6,
            ("pope_loss", "gap"): 3,  # above zero, the model uses the image
            ("pope_accuracy", "model"): 2 / 3,
            ("pope_accuracy", "control"): 1 / 3,
            ("pope_accuracy", "gap"): 1 / 3,
        }
    )
    # "big" is one group, which has no interval.
    assert {(one.name, one.slice): one.value for one in content.slices} == {
        ("pope_loss", "red"): 3,
        ("pope_accuracy", "red"): 0.5,
    }


def test_the_items_table_keeps_every_field(tmp_path: Path) -> None:
    rich = Response(
        answer="", finish_reason="length", nats=(1.5, 2.5), tokens=(1, 2), values=(0.25,), prompt_hash="p",
        prompt_tokens=3, answer_tokens=0, seconds=0.5,
    )  # fmt: skip
    rows = [
        ItemRow(
            "1", "g", ("s", "t"), "matched", 2, ("9", "8"), rich, "r", judge_reply="7", scores={"b": 1.0, "a": 0.5}
        ),
        ItemRow("2", "g", (), "shuffled", 0, (), Response(status="refused", detail="no"), "r"),
    ]
    write_rows(tmp_path / "items.parquet", rows)
    read = read_rows(tmp_path / "items.parquet", (0.5, 0.0))
    assert read == tuple(rows)
    assert [row.response.seconds for row in read] == [0.5, 0.0]
    assert list(read[0].scores) == ["b", "a"]
    assert (read[0].answer, read[1].answer) == ("", None)


def test_equal_rows_are_equal_bytes_whatever_time_they_took(tmp_path: Path) -> None:
    for name, seconds in (("one", 1.0), ("two", 2.0)):
        write_responses(tmp_path / name, {"k": Response(answer="yes", seconds=seconds)})
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert read_responses(tmp_path / "one") == {"k": Response(answer="yes")}
