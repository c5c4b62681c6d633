"""A store with something sealed at every address of the tiny recipe, without computing any of it."""

from pathlib import Path
from typing import Any

from vila_ops.artifacts import store
from vila_ops.artifacts.kinds import Artifact, BenchmarkResult, Checkpoint, Dataset, EvalReport, Pretrained
from vila_ops.config import Resources, Run, Suite, load
from vila_ops.data.preprocess import prepare
from vila_ops.eval import evaluate
from vila_ops.model import assemble
from vila_ops.pipeline.stages import suite_text
from vila_ops.train import stage as training
from vila_ops.train.job import StageInputs

ROOT = Path(__file__).parents[2]


def tiny_run(resources: Resources) -> Run:
    """The tiny recipe, whose paths are relative to the repository."""
    recipe = load(ROOT / "configs/recipes/tiny.yaml", resources=ROOT / "configs/resources/inline.yaml").recipe
    return Run(recipe=recipe, resources=resources)


def make(kind: type[Artifact], at: store.Address, run: Run, **facts: Any) -> Any:
    """An artifact of a few bytes at an address."""
    attempt = store.begin(at, store=run.resources.storage.store)
    (attempt / "content").write_text(at.key)
    execution = {"sealed": "2020-01-01T00:00:00+00:00", "model": run.recipe.model.model_dump(mode="json")}
    return store.seal(kind, at, attempt, facts=facts, execution=execution)


def seal_all(run: Run) -> None:
    """Seal something at the address of each artifact of a run."""
    recipe, resources = run.recipe, run.resources

    def dataset(mixture: Any, text: Any) -> Any:
        at = prepare.address_of(mixture, text, resources)
        return make(Dataset, at, run, num_samples=1, num_tokens=1)

    def report(suite: Suite, model: Any) -> None:
        job = evaluate.job_of(suite, model, held_out, resources)
        for name, one in suite.benchmarks.items():
            make(BenchmarkResult, job.address(name), run, benchmark=one.kind, model=model.digest)
        at = evaluate.address_of(job, evaluate.results_of(job))
        make(EvalReport, at, run, suite=suite.name, model=model.digest)

    held_out = dataset(recipe.final_suite.mixture, suite_text(recipe, "sft"))
    model = make(Pretrained, assemble.address_of(recipe.model), run)
    report(recipe.stage_suite, model)
    for name, stage in recipe.stages.items():
        data = dataset(stage.mixture, recipe.text(name))
        inputs = StageInputs(stage=stage, model=recipe.model, data=data, init=model, resources=resources)
        model = make(Checkpoint, training.address_of(inputs), run, stage=name, step=6)
        report(recipe.stage_suite, model)
    report(recipe.final_suite, model)
