"""A store with something sealed at every address of the tiny recipe, without computing any of it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from vila_ops.artifacts import store
from vila_ops.artifacts.kinds import Artifact, BenchmarkResult, Checkpoint, Dataset, EvalReport, Pretrained
from vila_ops.config import Resources, Run, Suite, load
from vila_ops.data.preprocess import prepare
from vila_ops.eval import evaluate
from vila_ops.eval.report import Report, ReportMetric, write_report
from vila_ops.model import assemble
from vila_ops.pipeline.stages import suite_text
from vila_ops.train import stage as training
from vila_ops.train.job import StageInputs

ROOT = Path(__file__).parents[2]
SECONDS = 1800.0
"""What each task took, with one GPU."""
TEXT_LOSSES = {"base": 3.0, "align": 2.5, "pretrain": 2.6, "sft": 2.2}
"""Of the model after each stage, on every suite."""


def tiny_run(resources: Resources) -> Run:
    """The tiny recipe, whose paths are relative to the repository."""
    recipe = load(ROOT / "configs/recipes/tiny.yaml", resources=ROOT / "configs/resources/inline.yaml").recipe
    return Run(recipe=recipe, resources=resources)


def make(
    kind: type[Artifact], at: store.Address, run: Run, write: Callable[[Path], object] = lambda _: None, **facts: Any
) -> Any:
    """An artifact of a few bytes at an address."""
    attempt = store.begin(at, store=run.resources.storage.store)
    (attempt / "content").write_text(at.key)
    write(attempt)
    execution = {
        "sealed": "2020-01-01T00:00:00+00:00",
        "seconds": SECONDS,
        "workers": [{"rank": 0, "device": "cuda:0, NVIDIA H100 80GB HBM3, CUDA 13.0"}],
        "model": run.recipe.model.model_dump(mode="json"),
    }
    return store.seal(kind, at, attempt, facts=facts, execution=execution)


def seal_all(run: Run) -> None:
    """Seal something at the address of each artifact of a run."""
    recipe = run.recipe
    held_out = held_out_of(run)
    model = make(Pretrained, assemble.address_of(recipe.model), run)
    seal_report(run, recipe.stage_suite, "base", model, held_out)
    for name, stage in recipe.stages.items():
        data = _dataset(run, stage.mixture, recipe.text(name))
        inputs = StageInputs(stage=stage, model=recipe.model, data=data, init=model, resources=run.resources)
        model = make(Checkpoint, training.address_of(inputs), run, stage=name, step=6)
        seal_report(run, recipe.stage_suite, name, model, held_out)
    seal_report(run, recipe.final_suite, name, model, held_out)


def held_out_of(run: Run) -> Dataset:
    """The data of the final suite."""
    return _dataset(run, run.recipe.final_suite.mixture, suite_text(run.recipe, "sft"))


def seal_report(run: Run, suite: Suite, stage: str, model: Any, held_out: Dataset) -> None:
    """The report of a model on a suite, and the results that it is composed of."""
    job = evaluate.job_of(suite, model, held_out, run.resources)
    for name, one in suite.benchmarks.items():
        make(BenchmarkResult, job.address(name), run, benchmark=one.kind, model=model.digest)
    loss = TEXT_LOSSES[stage]
    metric = ReportMetric(
        name="text_loss", measure="text_loss", role="model", value=loss, low=loss, high=loss, n=9,
        lower_is_better=True, unit="nats per token",
    )  # fmt: skip
    content = Report(suite=suite.name, model=model.digest, benchmarks={}, metrics=(metric,), layers=(), answers=())
    at = evaluate.address_of(job, evaluate.results_of(job))
    make(EvalReport, at, run, lambda folder: write_report(folder, content), suite=suite.name, model=model.digest)


def _dataset(run: Run, mixture: Any, text: Any) -> Any:
    at = prepare.address_of(mixture, text, run.resources)
    return make(Dataset, at, run, num_samples=1, num_tokens=1)
