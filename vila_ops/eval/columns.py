"""The two columns of official metrics as scores of a row, and as metrics over rows. Pure."""

from collections.abc import Sequence

import numpy as np

from vila_ops.eval.benchmark import MetricValues, Units
from vila_ops.eval.metrics.columns import Columns
from vila_ops.eval.rows import ItemRow
from vila_ops.eval.statistics import FloatArray

COLUMNS = ("official", "corrected")
WRONG = Columns(official=0.0, corrected=0.0)
"""The score of a failed row that counts."""


def in_columns(scores: Columns, measure: str = "") -> dict[str, float]:
    """The scores of a row, as MEASURE_official and MEASURE_corrected, or without a measure."""
    return {named(measure, "official"): scores.official, named(measure, "corrected"): scores.corrected}


def mean_metrics(kind: str, rows: Sequence[ItemRow], measure: str = "") -> list[MetricValues]:
    """The mean of both columns of a measure over rows, as KIND_MEASURE_COLUMN."""
    return [mean_metric(named(kind, measure, column), rows, named(measure, column)) for column in COLUMNS]


def mean_metric(name: str, rows: Sequence[ItemRow], score: str) -> MetricValues:
    """The mean of one score over rows."""
    return MetricValues(name, Units.of(rows), np.array([row.scores[score] for row in rows]))


def macro_metrics(kind: str, rows: Sequence[ItemRow]) -> list[MetricValues]:
    """The mean over slices of the mean over each slice's rows, as KIND_macro_COLUMN; a row is in one slice.

    The values are (score x weight, weight) with weight = rows / (slices x rows of the slice), and their ratio is that
    mean: also where a resample has another number of rows of a slice.
    """
    sizes: dict[str, int] = {}
    for row in rows:
        sizes[row.slices[0]] = sizes.get(row.slices[0], 0) + 1
    weights = np.array([len(rows) / (len(sizes) * sizes[row.slices[0]]) for row in rows])
    return [
        MetricValues(named(kind, "macro", column), Units.of(rows), _weighted(rows, column, weights), "ratio")
        for column in COLUMNS
    ]


def _weighted(rows: Sequence[ItemRow], score: str, weights: FloatArray) -> FloatArray:
    return np.stack([weights * [row.scores[score] for row in rows], weights], axis=1)


def named(*parts: str) -> str:
    """A name of those parts that are not empty."""
    return "_".join(part for part in parts if part)


def share_or_zero(sums: FloatArray) -> FloatArray:
    """A statistic: column 0 / column 1, and 0 where column 1 is 0; (..., 2) -> (...)."""
    share: FloatArray = np.divide(sums[..., 0], sums[..., 1], out=np.zeros(sums.shape[:-1]), where=sums[..., 1] > 0)
    return share
