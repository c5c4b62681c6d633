"""What an evaluation measured, as files of sealed artifacts. Nothing else reads or writes these files.

result.json, items.parquet    of one benchmark on one model; `rows` has the columns of the latter
report.json                   of a suite on one model, composed of its benchmarks' results
"""

import json
import operator
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from vila_ops.artifacts.kinds import BenchmarkResult, EvalReport
from vila_ops.artifacts.store import file, manifest_of, read_manifest, reference
from vila_ops.config import Config, OfficialSuite, Suite

if TYPE_CHECKING:  # heavy: pyarrow
    from vila_ops.eval.rows import ItemRow

RESULT = "result.json"
ITEMS = "items.parquet"
OFFICIAL = "official"
"""Folder of a result with the files that a server or an official script reads."""
REPORT = "report.json"

MetricRole = Literal["model", "control", "chance", "gap"]
"""Whose number it is. gap: control minus model for losses and model minus control for the rest, so that above zero the
model uses the image."""


class Metric(Config):
    """One number of a benchmark with its 95 % interval."""

    name: str
    """The benchmark's kind, or KIND_MEASURE where it has several; in a report with the suite's name for the kind."""
    role: MetricRole
    value: float
    low: float
    high: float
    n: int
    """Number of items."""
    lower_is_better: bool
    unit: str


class ReportMetric(Metric):
    """A metric under the name that the suite gives its benchmark."""

    measure: str
    """The metric's name in the benchmark's own result."""


class SliceMetric(Metric):
    """A metric of the model on a subset of the items."""

    slice: str


class LayerPoint(Config):
    """One number of one layer of the language model with its 95 % interval; layer 0 is what enters the first one."""

    name: str
    role: MetricRole
    layer: int
    value: float
    low: float
    high: float


class ItemAnswer(Config):
    """What the model generated for one item."""

    item: str
    """Id of the item: the name of its sample, see `data.shards.named`."""
    object: str
    truth: str
    answer: str
    control: str | None = None
    """The answer for the shuffled image; None where the benchmark has no control."""


class Measurement(Config):
    """The content of a benchmark's result."""

    num_items: int
    num_clusters: int
    """Number of groups of items that are independent of each other."""
    failed: dict[str, int] = {}
    """Number of requests without an answer, by status."""
    undefined: dict[str, str] = Field(default={}, exclude_if=operator.not_)
    """Metrics that have no number or no interval on these items, with the reason."""
    metrics: tuple[Metric, ...]
    slices: tuple[SliceMetric, ...] = ()
    layers: tuple[LayerPoint, ...] = ()
    answers: tuple[ItemAnswer, ...] = ()


class ResultReference(Config):
    """The result of a benchmark in the store that holds the report."""

    address: str
    """The result's folder, relative to the store."""
    digest: str
    num_items: int
    num_clusters: int
    failed: dict[str, int] = {}
    undefined: dict[str, str] = Field(default={}, exclude_if=operator.not_)


class Report(Config):
    """The content of a report."""

    suite: str
    split: Literal["validation", "test"] | None = None
    """Of the held-out data; None where all benchmarks are on official files."""
    model: str
    """Digest of the model that was evaluated."""
    data: str | None = None
    """Digest of the dataset that the items are from; None where all benchmarks are on official files."""
    benchmarks: dict[str, ResultReference]
    """By the suite's name, the result with the scores of each item."""
    metrics: tuple[ReportMetric, ...]
    slices: tuple[SliceMetric, ...] = ()
    layers: tuple[LayerPoint, ...]
    answers: tuple[ItemAnswer, ...]


def write_result(
    folder: Path, measurement: Measurement, rows: "Sequence[ItemRow]", official: Mapping[str, bytes]
) -> None:
    """Write the files of a benchmark's result into an attempt's folder; official files by name, into OFFICIAL."""
    from vila_ops.eval.rows import write_rows

    _write(folder / RESULT, measurement)
    write_rows(folder / ITEMS, rows)
    for name, content in official.items():
        place = folder / OFFICIAL / name  # MMMU has a folder for each subject
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(content)


def read_result(result: BenchmarkResult) -> Measurement:
    """The content of a benchmark's result. Raises CorruptArtifact."""
    return Measurement.model_validate_json(file(result, RESULT).read_text())


def read_items(result: BenchmarkResult) -> "tuple[ItemRow, ...]":
    """The rows of a result's items, scores included, in the order of the requests. Raises CorruptArtifact."""
    from vila_ops.eval.rows import read_rows

    return read_rows(file(result, ITEMS), manifest_of(result)["execution"].get("seconds_of", ()))


def compose(
    suite: Suite | OfficialSuite, *, model: str, data: str | None, results: Mapping[str, BenchmarkResult]
) -> Report:
    """The report of a suite on a model; model and data are digests, the results are by the suite's names.

    Raises ValueError where two metrics would have one name, in the report or in MLflow.
    """
    measured = {name: read_result(results[name]) for name in suite.benchmarks}
    kinds = {name: benchmark.kind for name, benchmark in suite.benchmarks.items()}
    report = Report(
        suite=suite.name,
        split=suite.split if isinstance(suite, Suite) else None,
        model=model,
        data=data,
        benchmarks={name: _reference(results[name], one) for name, one in measured.items()},
        metrics=tuple(
            ReportMetric(
                **{**dict(metric), "name": name_in_suite(metric.name, kinds[name], name), "measure": metric.name}
            )
            for name, one in measured.items()
            for metric in one.metrics
        ),
        slices=tuple(
            SliceMetric(**{**dict(metric), "name": name_in_suite(metric.name, kinds[name], name)})
            for name, one in measured.items()
            for metric in one.slices
        ),
        layers=tuple(
            LayerPoint(**{**dict(point), "name": name_in_suite(point.name, kinds[name], name)})
            for name, one in measured.items()
            for point in one.layers
        ),
        answers=tuple(answer for one in measured.values() for answer in one.answers),
    )
    _check_names(report)
    return report


def write_report(folder: Path, report: Report) -> Path:
    """Write the file of a report into an attempt's folder; returns the file."""
    _write(folder / REPORT, report)
    return folder / REPORT


def read_report(report: EvalReport) -> Report:
    """The content of a report. Raises CorruptArtifact."""
    return Report.model_validate_json(file(report, REPORT).read_text())


def result_of(sealed: ResultReference, *, store: str) -> BenchmarkResult:
    """The result of a benchmark that a report of a store refers to. Raises CorruptArtifact."""
    uri = f"{store}/{sealed.address}"
    result = reference(BenchmarkResult, uri, read_manifest(uri))
    return BenchmarkResult(**{**dict(result), "digest": sealed.digest})


def tracked(report: Report) -> dict[str, float]:
    """The metrics by their names in MLflow: NAME for the model's own, NAME.ROLE for the others.

    Each has three more beside it: its name with .low and .high for the interval, and with .n for the number of items.
    """
    return {name: value for metric in report.metrics for name, value in _tracked(metric).items()}


def _tracked(metric: Metric) -> dict[str, float]:
    name = _tracked_name(metric.name, metric.role)
    return {name: metric.value, f"{name}.low": metric.low, f"{name}.high": metric.high, f"{name}.n": metric.n}


def tracked_layers(report: Report) -> list[tuple[int, dict[str, float]]]:
    """The values of layers and their intervals for MLflow, where the layer is the step."""
    return [(point.layer, _tracked_layer(point)) for point in report.layers]


def _tracked_layer(point: LayerPoint) -> dict[str, float]:
    name = _tracked_name(f"{point.name}_by_layer", point.role)
    return {name: point.value, f"{name}.low": point.low, f"{name}.high": point.high}


def _check_names(report: Report) -> None:
    layers = {name for point in report.layers for name in _tracked_layer(point)}
    names = Counter([*(name for metric in report.metrics for name in _tracked(metric)), *layers])
    if twice := sorted(name for name, count in names.items() if count > 1):
        raise ValueError(
            f"suite {report.suite!r}: two of its benchmarks {list(report.benchmarks)} have metric {twice[0]!r}; "
            f"rename one of them (what they measured is kept)"
        )


def _tracked_name(name: str, role: MetricRole) -> str:
    return name if role == "model" else f"{name}.{role}"


def name_in_suite(name: str, kind: str, benchmark: str) -> str:
    """A metric's name with the suite's name of the benchmark in place of its kind. Raises ValueError."""
    if name == kind:
        return benchmark
    if not name.startswith(f"{kind}_"):
        raise ValueError(
            f"benchmark {benchmark!r} of kind {kind!r} has a metric {name!r}; a metric has the kind's name, or begins "
            f"with {kind}_: rename it in the benchmark, and raise its REVISION"
        )
    return f"{benchmark}_{name.removeprefix(f'{kind}_')}"


def _reference(result: BenchmarkResult, measurement: Measurement) -> ResultReference:
    return ResultReference(
        address="/".join(result.uri.rsplit("/", 2)[1:]),
        digest=result.digest,
        num_items=measurement.num_items,
        num_clusters=measurement.num_clusters,
        failed=measurement.failed,
        undefined=measurement.undefined,
    )


def _write(path: Path, content: Config) -> None:
    values: dict[str, Any] = content.model_dump(mode="json", exclude_none=True)
    path.write_text(json.dumps(values, indent=1, sort_keys=True))
