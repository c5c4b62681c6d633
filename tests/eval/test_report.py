"""Names of metrics in a report: of the suite, unique there and in MLflow."""

from pathlib import Path
from typing import Any

import pytest

from vila_ops.artifacts.attempts import attempt
from vila_ops.artifacts.kinds import BenchmarkResult
from vila_ops.artifacts.store import address, seal
from vila_ops.config import Suite
from vila_ops.eval.report import LayerPoint, Measurement, Metric, Report, compose, tracked, write_result

POPE = "held_out_pope"
POINT = {"value": 0.5, "low": 0.0, "high": 1.0}


def composed(store: Path, **benchmarks: tuple[str, list[tuple[str, str]], list[str]]) -> Report:
    """The report of results with these kinds, metrics (name and role) and metrics of layers."""
    results: dict[str, BenchmarkResult] = {}
    for name, (kind, metrics, layers) in benchmarks.items():
        at = address(BenchmarkResult, revision=1, recipe={"name": name}, parents=())
        numbers: list[Any] = [
            Metric(name=metric, role=role, n=9, lower_is_better=False, unit="", **POINT)  # type: ignore[arg-type]
            for metric, role in metrics
        ]
        points = tuple(LayerPoint(name=one, role="model", layer=layer, **POINT) for one in layers for layer in (0, 1))
        with attempt(at, store=str(store)) as folder:
            write_result(
                folder, Measurement(num_items=9, num_clusters=9, metrics=tuple(numbers), layers=points), [], {}
            )
        results[name] = seal(BenchmarkResult, at, folder, facts={"benchmark": kind, "model": "m"}, execution={})
    mixture = {"name": "m", "sources": {"a": {"kind": "jsonl", "path": "x", "render": "caption"}}}
    kinds = {name: {"kind": kind} for name, (kind, *_) in benchmarks.items()}
    suite = Suite.model_validate({"name": "s", "mixture": mixture, "split": "test", "benchmarks": kinds})
    return compose(suite, model="m", data="d", results=results)


def test_a_metric_has_the_suites_name_in_place_of_its_kind(tmp_path: Path) -> None:
    report = composed(
        tmp_path,
        objects=(POPE, [(POPE, "model"), (f"{POPE}_f1", "model"), (f"{POPE}_f1", "gap")], []),
        pope=("alignment", [("alignment", "model"), ("alignment_pope", "model")], ["alignment"]),
    )
    names = ("objects", "objects_f1", "objects_f1.gap", "pope", "pope_pope")
    assert tracked(report) == {
        f"{name}{suffix}": value
        for name in names
        for suffix, value in {"": 0.5, ".low": 0.0, ".high": 1.0, ".n": 9}.items()
    }
    assert {point.name for point in report.layers} == {"pope"}


def test_a_metric_that_only_begins_as_its_kind_does_is_refused(tmp_path: Path) -> None:
    for name in (f"{POPE}s", f"{POPE}f1", "f1"):
        refused = f"'objects' of kind '{POPE}' has a metric '{name}'; .* begins with {POPE}_"
        with pytest.raises(ValueError, match=refused):
            composed(tmp_path / name, objects=(POPE, [(name, "model")], []))


@pytest.mark.parametrize(
    ("one", "two", "name"),
    [
        (("a", POPE, [(f"{POPE}_f1", "model")], []), ("a_f1", "cider", [("cider", "model")], []), "a_f1"),
        (("a", POPE, [(POPE, "gap")], []), ("a.gap", "cider", [("cider", "model")], []), "a.gap"),
        (
            ("a", "alignment", [("alignment", "model")], ["alignment"]),
            ("a_by_layer", "cider", [("cider", "model")], []),
            "a_by_layer",
        ),
        (("a", POPE, [(POPE, "model")], []), ("a.low", "cider", [("cider", "model")], []), "a.low"),
    ],
)
def test_two_metrics_of_one_name_are_refused(one: Any, two: Any, name: str, tmp_path: Path) -> None:
    suite = {benchmark: tuple(rest) for benchmark, *rest in (one, two)}
    with pytest.raises(ValueError, match=f"have metric '{name}'; rename one of them"):
        composed(tmp_path, **suite)
