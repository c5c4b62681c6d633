"""The flow `vila-evaluate`: the model after a stage on a suite."""

from pathlib import Path

from prefect import flow
from prefect.artifacts import create_table_artifact
from prefect.client.schemas.objects import State

from flows.attempt import attempt, check_work, checked_run
from flows.tasks import TASKS
from vila_ops.config import OfficialSuite, Recipe, Resources, Run, Suite, load_suite
from vila_ops.eval.report import read_report
from vila_ops.pipeline.explain import explain_evaluate
from vila_ops.pipeline.stages import evaluate_stage, last_stage


@flow(name="vila-evaluate", validate_parameters=True, persist_result=False)
def evaluate(
    recipe: str | Recipe = "demo",
    resources: str | Resources = "laptop",
    stage: str = "",
    suite: str = "final",
    overrides: tuple[str, ...] = (),
) -> dict[str, str] | State[None]:
    """Measure the model after a stage. What is sealed is reused; stages before it that are missing are trained.

    Returns the digest and the place of the report.

    Args:
        recipe: Name of a file in configs/recipes, such as demo; a path that the worker sees; or a whole recipe
        resources: Name of a file in configs/resources, such as laptop; a path that the worker sees; or whole resources
        stage: Name of a stage, or base for the untrained model; empty for the last stage
        suite: final or stage for a suite of the recipe; or the path of a file of official benchmarks
        overrides: Settings to change, such as stages.sft.learning_rate=1e-5
    """
    run = checked_run(recipe, resources, overrides)
    chosen = _suite(run, suite)
    return attempt(run, lambda: _work(run, stage or last_stage(run.recipe), chosen))


def _work(run: Run, stage: str, suite: Suite | OfficialSuite) -> dict[str, str]:
    check_work(run, explain_evaluate(run, stage, suite), serves=False)
    report = evaluate_stage(run, stage, suite, tasks=TASKS)
    rows = [
        {key: getattr(metric, key) for key in ("name", "role", "value", "low", "high", "n")}
        for metric in read_report(report).metrics
    ]
    create_table_artifact(key="vila-scores", table=rows, description=f"{stage} on {suite.name}")
    return {"report": report.uri, "digest": report.digest}


def _suite(run: Run, suite: str) -> Suite | OfficialSuite:
    own = {"final": run.recipe.final_suite, "stage": run.recipe.stage_suite}
    return own[suite] if suite in own else load_suite(Path(suite))
