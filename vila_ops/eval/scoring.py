"""Rows to numbers: scores of each row, metrics with intervals, slices and gaps. Pure; no model is needed."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import Any, TypeVar

import numpy as np

from vila_ops.config.benchmarks import JudgedBenchmark, OfficialBenchmark
from vila_ops.config.eval import MeasureSettings
from vila_ops.eval.benchmark import Item, MetricValues, benchmark_of
from vila_ops.eval.columns import mean_metric
from vila_ops.eval.few_shot import is_copy
from vila_ops.eval.report import ItemAnswer, LayerPoint, Measurement, Metric, SliceMetric
from vila_ops.eval.rows import ItemRow
from vila_ops.eval.statistics import Interval, UndefinedStatistic, cluster_bootstrap, paired_difference

T = TypeVar("T")
COPIED = "copied"
"""The score 1 of an answer that equals the answer of one of its demonstrations, else 0."""
ANSWERED = "_answered"
"""Ends the names of metrics that leave failed items out."""


@dataclass(frozen=True)
class Scored:
    """A benchmark's rows with their scores, and what they sum up to."""

    measurement: Measurement
    rows: tuple[ItemRow, ...]


def score(
    items: Sequence[Item],
    rows: Sequence[ItemRow],
    config: Any,
    settings: MeasureSettings,
    *,
    shown: Mapping[str, str] = MappingProxyType({}),
) -> Scored:
    """Score the rows of a benchmark and make its metrics. `config` is the benchmark's.

    `shown` has what each demonstration answers, by the ids in the rows. Raises ValueError for rows of other items, rows
    that are there twice, and a score that is not finite.
    """
    _check_rows(items, rows)
    scored = _with_copies(scored_rows(items, rows, config), shown)
    values = metric_values(items, scored, config)
    of_layers = [one for one in values if one.layer is not None]
    of_items = [one for one in values if one.layer is None]
    metrics, without_metric = _defined(_metric_makers(of_items, settings))
    layers, without_layer = _defined([(_named(one), partial(_layer, one, settings)) for one in of_layers])
    measurement = Measurement(
        num_items=len({row.item for row in rows}),
        num_clusters=len({row.group for row in rows}),
        failed=_failed(scored, config),
        undefined=without_metric | without_layer,
        metrics=tuple(metrics),
        slices=tuple(_slices(of_items, settings)),
        layers=tuple(layers),
        answers=() if isinstance(config, OfficialBenchmark) else _answers(items, scored),
    )
    return Scored(measurement, scored)


def _failed(rows: Sequence[ItemRow], config: Any) -> dict[str, int]:
    """The number of rows by what went wrong; `not_judged`: the judge gave no score to an answer."""
    failed = Counter[str](row.response.status for row in rows if not row.ok)
    if (
        isinstance(config, JudgedBenchmark)
        and config.judge
        and (unjudged := sum(row.ok and not _own_scores(row) for row in rows))
    ):
        failed["not_judged"] = unjudged
    return dict(sorted(failed.items()))


def scored_rows(items: Sequence[Item], rows: Sequence[ItemRow], config: Any) -> tuple[ItemRow, ...]:
    """The rows with their scores; failed ones have none unless they count as wrong."""
    counted = [number for number, row in enumerate(rows) if row.ok or _counts_as_wrong(row, config)]
    given = [_without_answer(rows[number]) for number in counted]
    by_number = dict(zip(counted, benchmark_of(config.kind).score(items, given, config), strict=True))
    for number, scores in by_number.items():
        if bad := [name for name, value in scores.items() if not np.isfinite(value)]:
            raise ValueError(f"item {rows[number].item!r} has no finite score {bad[0]!r}; look at its row")
    return tuple(replace(row, scores=dict(by_number.get(number, {}))) for number, row in enumerate(rows))


def metric_values(items: Sequence[Item], rows: Sequence[ItemRow], config: Any) -> list[MetricValues]:
    """The values of each metric of scored rows, as a comparison reads them; named by the policy of failed items."""
    counted = [row for row in rows if row.ok or _counts_as_wrong(row, config)]
    if not counted:
        raise ValueError(f"benchmark {config.kind!r} has no answer: all {len(rows)} requests failed; see the statuses")
    own = [replace(row, scores=_own_scores(row)) for row in counted]
    values = [*benchmark_of(config.kind).metrics(items, own, config), *_copy_rate(counted, config)]
    return [replace(one, name=_variant_name(one.name, config)) for one in values]


def _variant_name(name: str, config: Any) -> str:
    """The name of a metric with the demonstrations and the policy that its number depends on."""
    if not isinstance(config, OfficialBenchmark):
        return name
    shots = f"_{config.few_shot.variant()}" if config.few_shot else ""
    return name + shots + (ANSWERED if config.failed_items == "left_out" else "")


def _with_copies(rows: Sequence[ItemRow], shown: Mapping[str, str]) -> tuple[ItemRow, ...]:
    """The rows with the score COPIED where an answer came after demonstrations."""

    def copied(row: ItemRow) -> ItemRow:
        if not row.shots or not row.ok or row.answer is None:
            return row
        is_copied = is_copy(row.answer, [shown[shot] for shot in row.shots])
        return replace(row, scores={**row.scores, COPIED: float(is_copied)})

    return tuple(map(copied, rows))


def _own_scores(row: ItemRow) -> dict[str, float]:
    """The scores that the benchmark gave a row."""
    return {name: value for name, value in row.scores.items() if name != COPIED}


def _copy_rate(rows: Sequence[ItemRow], config: Any) -> list[MetricValues]:
    """The share of answers that equal the answer of one of their demonstrations."""
    answered = [row for row in rows if COPIED in row.scores and row.rotation == 0]
    return [mean_metric(f"{config.kind}_copy_rate", answered, COPIED)] if answered else []


def _counts_as_wrong(row: ItemRow, config: Any) -> bool:
    return not row.ok and isinstance(config, OfficialBenchmark) and config.failed_items == "wrong"


def _without_answer(row: ItemRow) -> ItemRow:
    """A failed row as a scorer sees it: whatever came before the failure is no answer."""
    return row if row.ok else replace(row, response=replace(row.response, answer=None))


def _check_rows(items: Sequence[Item], rows: Sequence[ItemRow]) -> None:
    known = {item.id for item in items}
    if unknown := [row.item for row in rows if row.item not in known]:
        raise ValueError(f"{len(unknown)} rows are of other items, such as {unknown[0]!r}; they are of another version")
    keys = Counter((row.item, row.condition, row.rotation) for row in rows)
    key, times = keys.most_common(1)[0]
    if times > 1:
        raise ValueError(f"item {key[0]!r} has {times} rows of condition {key[1]!r} and rotation {key[2]}; keep one")
    if missing := known - {row.item for row in rows}:
        raise ValueError(f"{len(missing)} items have no row, such as {min(missing)!r}; every item needs one")


def _metric_makers(values: Sequence[MetricValues], settings: MeasureSettings) -> list[tuple[str, Callable[[], Metric]]]:
    """Each metric by its name, and after a control the gap between it and the model, as `MetricRole` states it."""
    makers: list[tuple[str, Callable[[], Metric]]] = []
    models = {one.name: one for one in values if one.role == "model"}
    for one in values:
        makers.append((_named(one), partial(_whole, one, settings)))
        if one.role == "control" and one.gap and one.name in models:
            makers.append((f"{one.name}.gap", partial(_gap, models[one.name], one, settings)))
    return makers


def _defined(makers: Sequence[tuple[str, Callable[[], T]]]) -> tuple[list[T], dict[str, str]]:
    """What can be made, and by name why the rest has no number or interval, such as items of a single group."""
    made, undefined = [], dict[str, str]()
    for name, make in makers:
        try:
            made.append(make())
        except UndefinedStatistic as error:
            undefined[name] = str(error)
    return made, undefined


def _named(one: MetricValues) -> str:
    """The name of a metric with its role and layer."""
    role = "" if one.role == "model" else f".{one.role}"
    return f"{one.name}{role}" + ("" if one.layer is None else f" of layer {one.layer}")


def _whole(one: MetricValues, settings: MeasureSettings) -> Metric:
    return _metric(one, _interval(one, settings))


def _gap(model: MetricValues, control: MetricValues, settings: MeasureSettings) -> Metric:
    row_of = {name: row for row, name in enumerate(control.units.names)}
    both = [number for number, name in enumerate(model.units.names) if name in row_of]
    ours = model.values[both]
    theirs = control.values[[row_of[model.units.names[number]] for number in both]]
    pair = (theirs, ours) if model.lower_is_better else (ours, theirs)
    interval = paired_difference(
        *pair,
        [model.units.groups[number] for number in both],
        statistic=model.statistic,
        resamples=settings.bootstrap_resamples,
        seed=settings.seed,
    )
    return _metric(replace(model, role="gap", lower_is_better=False), interval)


def _slices(values: Sequence[MetricValues], settings: MeasureSettings) -> list[SliceMetric]:
    """The model's metrics of each slice; a slice of one group has no interval and is left out."""
    listed = []
    for one in values:
        if one.role != "model":
            continue
        rows: dict[str, list[int]] = {}
        for number, names in enumerate(one.units.slices):
            for name in names:
                rows.setdefault(name, []).append(number)
        for name in sorted(rows):
            try:
                interval = _interval(one, settings, rows[name])
            except UndefinedStatistic:
                continue
            listed.append(SliceMetric(**dict(_metric(one, interval)), slice=name))
    return listed


def _layer(one: MetricValues, settings: MeasureSettings) -> LayerPoint:
    assert one.layer is not None
    interval = _interval(one, settings)
    return LayerPoint(
        name=one.name, role=one.role, layer=one.layer, value=interval.value, low=interval.low, high=interval.high
    )


def _interval(one: MetricValues, settings: MeasureSettings, rows: Sequence[int] | None = None) -> Interval:
    numbers = range(len(one.units.names)) if rows is None else rows
    return cluster_bootstrap(
        one.values if rows is None else one.values[list(rows)],
        [one.units.groups[number] for number in numbers],
        statistic=one.statistic,
        resamples=settings.bootstrap_resamples,
        seed=settings.seed,
    )


def _metric(one: MetricValues, interval: Interval) -> Metric:
    return Metric(
        name=one.name,
        role=one.role,
        value=interval.value,
        low=interval.low,
        high=interval.high,
        n=interval.n,
        lower_is_better=one.lower_is_better,
        unit=one.unit,
    )


def _answers(items: Sequence[Item], rows: Sequence[ItemRow]) -> tuple[ItemAnswer, ...]:
    """What the model generated for each item, with its demonstration's answer as the truth."""
    control = {row.item: row.answer for row in rows if row.condition == "shuffled"}
    truths = {item.id: item.answer for item in items}
    return tuple(
        ItemAnswer(
            item=row.item, object=row.group, truth=truths[row.item], answer=row.answer, control=control.get(row.item)
        )
        for row in rows
        if row.condition == "matched" and row.rotation == 0 and row.answer is not None and not row.response.nats
    )
