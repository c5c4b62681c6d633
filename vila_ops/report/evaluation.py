"""The page of an evaluation: scores beside published numbers, answers with their images, origin and cost."""

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from vila_ops.artifacts.kinds import Artifact, Checkpoint, Endpoint, EvalReport
from vila_ops.artifacts.store import read_manifest
from vila_ops.eval.report import Report, ReportMetric, SliceMetric, read_report, read_result
from vila_ops.report.gallery import IMAGE_BYTES, Gallery, gallery
from vila_ops.report.scores import ScoreRow, headline, score_panels, score_rows
from vila_ops.report.template import rendered
from vila_ops.tracking.outbox import shown

if TYPE_CHECKING:
    from vila_ops.eval.job import EvalJob
    from vila_ops.eval.shown import ShownRow


@dataclass(frozen=True)
class Cost:
    """What the answers of a benchmark took."""

    requests: int
    prompt_tokens: int
    answer_tokens: int
    seconds: float
    """Sum over the requests, of a batch their shares."""


@dataclass(frozen=True)
class Origin:
    """One artifact that the report was made from."""

    what: str
    digest: str
    address: str
    """In the store; empty where it has none."""
    detail: str


@dataclass(frozen=True)
class BenchmarkPart:
    """What the page shows of one benchmark."""

    name: str
    settings: Mapping[str, Any]
    num_items: int
    num_groups: int
    failed: Mapping[str, int]
    metrics: Sequence[ReportMetric]
    slices: Sequence[SliceMetric]
    gallery: Gallery
    cost: Cost


@dataclass(frozen=True)
class Evaluation:
    """All that the page shows; equal content, equal page."""

    report: Report
    model: str
    """Its name for readers."""
    sealed: str
    """When the report was sealed, ISO 8601."""
    engine: str
    parts: tuple[BenchmarkPart, ...]
    origins: tuple[Origin, ...]


def gather(job: "EvalJob", sealed: EvalReport) -> Evaluation:
    """What the page of a report shows, of the store alone; no model is loaded. Raises CorruptArtifact."""
    from vila_ops.eval.runner import Runner  # heavy: transformers

    report, manifest = read_report(sealed), read_manifest(sealed.uri)
    every = {name: result for name in job.suite.benchmarks if (result := job.result(name)) is not None}
    metrics, slices = iter(report.metrics), iter(report.slices)  # benchmark after benchmark, as `compose` lists them
    parts = []
    with closing(Runner(job)) as runner:
        for name, result in every.items():
            content, rows = read_result(result), runner.shown(name)
            parts.append(
                BenchmarkPart(
                    name=name,
                    settings=job.suite.benchmarks[name].model_dump(mode="json"),
                    num_items=content.num_items,
                    num_groups=content.num_clusters,
                    failed=content.failed,
                    metrics=tuple(islice(metrics, len(content.metrics))),
                    slices=tuple(islice(slices, len(content.slices))),
                    gallery=gallery(rows, runner.planned(name).image_of, IMAGE_BYTES // len(every)),
                    cost=_cost(rows),
                )
            )
    return Evaluation(
        report=report,
        model=_model_name(job),
        sealed=manifest["execution"]["sealed"],
        engine=_engine([read_manifest(result.uri)["execution"] for result in every.values()]),
        parts=tuple(parts),
        origins=tuple(_origins(job, sealed, every)),
    )


def render(content: Evaluation) -> str:
    """The page as HTML; it loads nothing and runs no script."""
    rows = {part.name: score_rows(part.metrics, part.settings, part.num_items) for part in content.parts}
    sources = dict.fromkeys(one.source for own in rows.values() for row in own for one in row.published)
    return rendered(
        "evaluation.html.jinja",
        content=content,
        overview=score_panels(_headlines(rows)),
        panels={name: score_panels(own) for name, own in rows.items()},
        sources=list(sources),
        num_failed=sum(number for part in content.parts for number in part.failed.values()),
    )


def _headlines(rows: Mapping[str, Sequence[ScoreRow]]) -> list[ScoreRow]:
    return [row for own in rows.values() if (row := headline(own)) is not None]


def _cost(rows: "Sequence[ShownRow]") -> Cost:
    responses = [shown.row.response for shown in rows]
    return Cost(
        requests=len(responses),
        prompt_tokens=sum(one.prompt_tokens or 0 for one in responses),
        answer_tokens=sum(one.answer_tokens or 0 for one in responses),
        seconds=sum(one.seconds for one in responses),
    )


def _model_name(job: "EvalJob") -> str:
    match job.model:
        case Endpoint(name=name):
            return name
        case Checkpoint(stage=stage):
            return stage
    return "base"


def _engine(executions: Sequence[Mapping[str, Any]]) -> str:
    """The engines and devices that answered, as text; empty for an endpoint."""
    known = [
        f"engine {one['engine']['kind']} on {one['device']}, {one['machine']}" for one in executions if "engine" in one
    ]
    return ", ".join(dict.fromkeys(known))


def _origins(job: "EvalJob", sealed: EvalReport, results: Mapping[str, Artifact]) -> list[Origin]:
    """The report and what it was made from, the newest first."""
    listed = [_origin("report", sealed, f"suite {sealed.suite}")]
    listed += [_origin(f"result of {name}", result) for name, result in results.items()]
    if isinstance(job.model, Endpoint):
        listed.append(Origin("model", job.model.digest, "", f"{job.model.name} at {shown(job.model.url)}"))
    else:
        listed.append(_origin("model", job.model, _model_name(job)))
        listed += [Origin("the model was made from", digest, "", "") for digest in job.model.parents]
    listed += [_origin(f"files of {name}", files) for name, files in job.files.items()]
    return [*listed, _origin("held-out data", job.data)] if job.data else listed


def _origin(what: str, artifact: Artifact, detail: str = "") -> Origin:
    return Origin(what, artifact.digest, "/".join(artifact.uri.rsplit("/", 2)[1:]), detail)
