"""The summary of a pipeline run, read from the sealed manifests and from the serving replica."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from vila_ops import tracking
from vila_ops.artifacts import output
from vila_ops.artifacts.execution import versions
from vila_ops.artifacts.kinds import Artifact, Checkpoint, EvalReport
from vila_ops.artifacts.store import read_manifest, store_of
from vila_ops.config import NO_CONTEXT, Run, RunContext, Suite
from vila_ops.config.run import BASE
from vila_ops.data.shards import data_url, index_of, named, samples_of
from vila_ops.eval.evaluate import job_of
from vila_ops.eval.job import EvalJob
from vila_ops.eval.report import Report, ReportMetric, name_in_suite, read_report, read_result, result_of
from vila_ops.pipeline.cost import cost_of
from vila_ops.pipeline.run import Outcome
from vila_ops.pipeline.stages import evaluate_stage
from vila_ops.report import evaluation
from vila_ops.report.baselines import published
from vila_ops.report.captions import captions
from vila_ops.report.layers import draw
from vila_ops.report.page import render
from vila_ops.serve import endpoint
from vila_ops.serve.credentials import authorization
from vila_ops.serve.sample_query import body, curl
from vila_ops.train.curve import curve_of

BEGINS = {
    "summary.json": '{\n "recipe": "',
    "report.html": output.HTML,
    "evaluation.html": output.HTML,
    "ask.json": '{"model": "',
}
"""The files of a report, and the text that each begins with."""
Json = dict[str, Any]
Curves = Mapping[str, Sequence[Json]]


class OfModel(NamedTuple):
    """A report with the name of its model."""

    model: str
    sealed: EvalReport
    report: Report


@dataclass(frozen=True)
class Content:
    """What a report shows."""

    summary: Json
    """All but the rest, as JSON values."""
    curves: Curves
    """The losses by step of each stage."""
    images: Mapping[str, str]
    """The image of each caption by its item, as a data URL."""


@dataclass(frozen=True)
class Page:
    """The files of a report."""

    json: str
    html: str


def gather(run: Run, outcome: Outcome) -> Content:
    """Read what the report shows: sealed artifacts, the runs that MLflow has, and what the replica says of itself."""
    reports = [OfModel(name, sealed, read_report(sealed)) for name, sealed in _reports(outcome)]
    curves = {name: curve_of(checkpoint) for name, checkpoint in outcome.checkpoints().items()}
    shown, images = _captions(run, outcome, reports[-1])
    return Content(_summary(run, outcome, reports, curves, shown), curves, images)


def write(run: Run, outcome: Outcome, content: Content) -> Page:
    """Write the files of a report into `<scratch>/<recipe name>`; ask.json only where something is served."""
    folder = _folder(run)
    folder.mkdir(parents=True, exist_ok=True)
    texts = {
        "summary.json": json.dumps(content.summary, indent=1),
        "report.html": render(content.summary, content.curves, content.images),
    }
    if not _is_page_of(folder / "evaluation.html", outcome.report):  # an unchanged run imports nothing heavy
        texts["evaluation.html"] = evaluation.render(evaluation.gather(_final_job(run, outcome), outcome.report))
    if outcome.answer:
        texts["ask.json"] = body(outcome.answer)
    for name, text in texts.items():
        output.write_file(folder / name, text, begins=BEGINS[name])
    return Page(str(folder / "summary.json"), str(folder / "report.html"))


def _is_page_of(page: Path, report: EvalReport) -> bool:
    """Whether a page is of this report, whose digest it names."""
    return page.is_file() and report.digest in page.read_text(encoding="utf-8")


def _final_job(run: Run, outcome: Outcome) -> EvalJob:
    """The last model on the final suite."""
    held_out = outcome.datasets[run.recipe.final_suite.mixture.name]
    return job_of(run.recipe.final_suite, list(outcome.models.values())[-1], held_out, run.resources)


def check(run: Run) -> None:
    """Raise ValueError where `write` would replace a file that it did not write."""
    folder = _folder(run)
    if folder.is_dir():
        for name, begins in BEGINS.items():
            output.check_file(folder / name, begins=begins)
    elif folder.exists() or folder.is_symlink():
        raise ValueError(
            f"{folder}, the folder of the report, is a file that vila-ops did not write; move the file away, or rename "
            f"the recipe"
        )


def _summary(run: Run, outcome: Outcome, reports: Sequence[OfModel], curves: Curves, captions: Sequence[Json]) -> Json:
    stages = [_stage(checkpoint, curves[name]) for name, checkpoint in outcome.checkpoints().items()]
    uri, parent = run.resources.tracking.uri, outcome.context.parent_run
    pages = tracking.pages(uri, [parent, *(stage["mlflow_run"] for stage in stages)])
    return {
        "recipe": run.recipe.name,
        "fingerprint": run.recipe.fingerprint(),
        "started": outcome.started,
        "seconds": outcome.seconds,
        "launch": run.resources.launch,
        "links": {
            "mlflow": uri,
            "prefect": outcome.context.links.get("prefect"),
            "endpoint": outcome.deployment.url if outcome.deployment else None,
        },
        "prefect_flow_run": outcome.flow_run,
        "mlflow": {
            "parent_run": parent,
            "page": parent and pages.runs.get(parent),
            "runs": pages.all_runs,
            "model": run.recipe.gate.model_name,
            "version": outcome.version.version if outcome.version else None,
            "promoted": bool(outcome.version and outcome.version.promoted),
        },
        "stages": [{**stage, "mlflow_page": pages.runs.get(stage["mlflow_run"])} for stage in stages],
        "tasks": _tasks(outcome),
        "cost": [cost_of(*one, run.resources).model_dump(mode="json") for one in _made(outcome)],
        "metrics": _metrics(run, reports),
        "layers": [point for one in reports[:-1] for point in layers_of(one.model, one.report)],
        "captions": captions,
        "answer": _answer(outcome),
        "serving": _serving(outcome),
        "versions": versions(),
    }


def draw_layers(run: Run, out: Path, context: RunContext = NO_CONTEXT) -> Json:
    """Write the alignment by layer of the base model and of every stage's model as an SVG; returns its points.

    Trains and measures what is missing. Raises ValueError where the recipe's stage suite does not measure it, and,
    before any work, for a file that vila-ops did not write.
    """
    output.check_file(out, begins=output.MARK)
    names = [BASE, *run.recipe.stages]
    suite = run.recipe.stage_suite
    reports = {name: read_report(evaluate_stage(run, name, suite, context=context)) for name in names}
    points = [point for name, report in reports.items() for point in layers_of(name, report)]
    drawn = draw(points)
    if drawn is None:
        raise ValueError(
            f"stage_suite {run.recipe.stage_suite.name!r} has no benchmark of kind alignment; add one to its benchmarks"
        )
    output.write_file(out, output.MARK + drawn, begins=output.MARK)
    return {"plot": str(out), "layers": points}


def markdown(summary: Json) -> str:
    """The summary as a few lines for Prefect's page."""
    mlflow = summary["mlflow"]
    lines = [f"# {summary['recipe']}: {summary['seconds']:.0f} s", ""]
    if mlflow["page"]:
        model = f"{summary['links']['mlflow']}/#/models/{mlflow['model']}/versions/{mlflow['version']}"
        lines.append(f"MLflow: [the run]({mlflow['page']}), [{mlflow['model']} version {mlflow['version']}]({model})")
    if summary["answer"]:
        answer = summary["answer"]
        lines += ["", f"*{answer['question']}* {answer['reply']} (truth: {answer['truth']})"]
    return "\n".join(lines)


def table(summary: Json) -> list[Json]:
    """The stages as a table for Prefect's page, each with a link to its MLflow run."""
    return [
        {
            "stage": stage["name"],
            "steps": stage["steps"],
            "seconds": round(stage["seconds"], 1),
            "training loss": f"{stage['loss_first']:.3f} to {stage['loss_last']:.3f}",
            "validation loss": f"{stage['validation_first']:.3f} to {stage['validation_last']:.3f}",
            "MLflow": f"[curves]({stage['mlflow_page']})" if stage["mlflow_page"] else "",
            "digest": stage["digest"],
        }
        for stage in summary["stages"]
    ]


def models_table(summary: Json) -> list[Json]:
    """The scores of the models on the stage suite, a column for each model, with 95 % intervals."""
    names = [BASE, *(stage["name"] for stage in summary["stages"])]
    first = next((metric["suite"] for metric in summary["metrics"]), None)  # the stage suite's come first
    told = [metric for metric in summary["metrics"] if metric["role"] == "model" and metric["suite"] == first]
    shown: dict[str, Json] = {}
    for metric in told:
        row = shown.setdefault(metric["name"], {"metric": metric["name"], **dict.fromkeys(names, "")})
        row[metric["model"]] = f"{metric['value']:.4g} [{metric['low']:.4g}, {metric['high']:.4g}]"
    return list(shown.values())


def _folder(run: Run) -> Path:
    return run.resources.storage.scratch() / run.recipe.name


def _stage(checkpoint: Checkpoint, rows: Sequence[Json]) -> Json:
    manifest = read_manifest(checkpoint.uri)
    losses = [row["loss"] for row in rows if "loss" in row]
    held_out = [row["validation_loss"] for row in rows if "validation_loss" in row]
    return {
        "name": checkpoint.stage,
        "steps": checkpoint.step,
        "seconds": manifest["execution"]["seconds"],
        "digest": checkpoint.digest,
        "loss_first": losses[0],
        "loss_last": losses[-1],
        "validation_first": held_out[0],
        "validation_last": held_out[-1],
        "workers": manifest["execution"]["workers"],
        "mlflow_run": manifest["execution"].get("mlflow_run"),
    }


def _tasks(outcome: Outcome) -> list[Json]:
    return [_sealing(*one, outcome) for one in _made(outcome)] + list(_reconciling(outcome))


def _made(outcome: Outcome) -> list[tuple[str, str, str]]:
    """The task, the name and the place of each sealed artifact."""
    made: list[tuple[str, str, Artifact]] = [("assemble", BASE, outcome.models[BASE])]
    made += [("prepare", name, dataset) for name, dataset in outcome.datasets.items()]
    made += [("train_stage", name, checkpoint) for name, checkpoint in outcome.checkpoints().items()]
    made += [("evaluate", f"{name} on {report.suite}", report) for name, report in _reports(outcome)]
    return [(task, name, artifact.uri) for task, name, artifact in made]


def _sealing(task: str, name: str, uri: str, outcome: Outcome) -> Json:
    manifest = read_manifest(uri)
    execution = manifest["execution"]
    return {
        "task": task,
        "name": name,
        "digest": manifest["digest"],
        "seconds": execution["seconds"],
        "reused": execution["sealed"] < outcome.started,
        "workers": execution["workers"],
    }


def _reconciling(outcome: Outcome) -> Iterator[Json]:
    """The tasks `register` and `deploy`, which seal nothing and are never reused; the digest is the model's."""
    if outcome.version:
        name, digest = f"{outcome.version.name} {outcome.version.version}", outcome.version.checkpoint.digest
        yield _reconciled("register", name, digest, outcome)
    if outcome.deployment:
        yield _reconciled("deploy", outcome.deployment.url, outcome.deployment.model, outcome)


def _reconciled(task: str, name: str, digest: str, outcome: Outcome) -> Json:
    seconds = outcome.reconciled[task]
    return {"task": task, "name": name, "digest": digest, "seconds": seconds, "reused": None, "workers": []}


def _reports(outcome: Outcome) -> list[tuple[str, EvalReport]]:
    """Every report with the name of its model, in the order of the run."""
    return [*outcome.stage_reports.items(), (list(outcome.stage_reports)[-1], outcome.report)]


def _metrics(run: Run, reports: Sequence[OfModel]) -> list[Json]:
    """The metrics of every report with their models, and with published numbers of the same measurement."""
    suites: list[Suite] = [*(run.recipe.stage_suite for _ in reports[:-1]), run.recipe.final_suite]
    metrics = []
    for suite, (model, _, report) in zip(suites, reports, strict=True):
        own = {"model": model, "suite": report.suite, "split": report.split}
        metrics += [
            {**own, **dict(metric), "published": _published(suite, report, metric)} for metric in report.metrics
        ]
    return metrics


def _published(suite: Suite, report: Report, metric: ReportMetric) -> list[Json]:
    for name, benchmark in suite.benchmarks.items():
        is_of = f"{metric.measure}_".startswith(f"{benchmark.kind}_")
        if metric.role == "model" and is_of and name_in_suite(metric.measure, benchmark.kind, name) == metric.name:
            settings, items = benchmark.model_dump(mode="json"), report.benchmarks[name].num_items
            return [dict(one) for one in published(metric.measure, settings, items)]
    return []


def layers_of(name: str, report: Report) -> list[Json]:
    """The numbers of each layer in a report, with the name of its model."""
    return [{"model": name, **dict(point)} for point in report.layers]


def _answer(outcome: Outcome) -> Json | None:
    if outcome.answer is None:
        return None
    return {**outcome.answer.model_dump(), "curl": curl(outcome.answer.url, body(outcome.answer))}


def _serving(outcome: Outcome) -> Json:
    """The replica's answer to a health request now."""
    if outcome.deployment is None:
        return {}
    url = outcome.deployment.url
    response = endpoint.client(url).get(f"{url}/health", headers=authorization(), timeout=30)
    health: Json = response.raise_for_status().json()
    return health


def _captions(run: Run, outcome: Outcome, last: OfModel) -> tuple[list[Json], dict[str, str]]:
    """The final model's captions and answers, and the image of each item that is shown, as a data URL."""
    suite, root = run.recipe.final_suite, store_of(last.sealed.uri)
    held_out = outcome.datasets[suite.mixture.name]
    rows = {row["name"]: row for row in named(index_of(held_out).to_pylist()) if row["num_images"]}
    measured = {name: read_result(result_of(last.report.benchmarks[name], store=root)) for name in suite.benchmarks}
    answers = {name: [one for one in content.answers if one.item in rows] for name, content in measured.items()}
    own = {"model": last.model, "suite": suite.name, "split": suite.split}
    listed = [{**own, **part} for part in captions(answers, suite.benchmarks)]
    shown = {one["item"]: rows[one["item"]] for part in listed for one in part["shown"]}
    samples = zip(shown, samples_of(held_out, shown.values()), strict=True)
    return listed, {item: data_url(sample.images[0]) for item, sample in samples}
