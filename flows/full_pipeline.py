"""The flow `vila`: every task, from data to a served model."""

from collections.abc import Sequence
from functools import cache
from typing import Any

from prefect import State, flow, runtime, settings
from prefect.states import Completed

from flows import pages
from flows.attempt import attempt, check_work, checked_run
from flows.tasks import TASKS
from vila_ops.config import Recipe, Resources, Run, RunContext
from vila_ops.config.schedule import Schedule
from vila_ops.pipeline import windows
from vila_ops.pipeline.explain import Step, explain
from vila_ops.pipeline.run import run_pipeline
from vila_ops.report import summary
from vila_ops.report.page import compile_templates

compile_templates()  # each run writes a report; this takes no time of a run's own


@flow(name="vila", validate_parameters=True, persist_result=False)
def vila(
    recipe: str | Recipe = "demo",
    resources: str | Resources = "laptop",
    overrides: tuple[str, ...] = (),
    schedule: Schedule | None = None,
) -> dict[str, str] | State[Any]:
    """Prepare, train stage by stage, evaluate after each, register, deploy. Sealed results are reused.

    Returns the models' digests and the paths of the report.

    Args:
        recipe: Name of a file in configs/recipes, such as demo; a path that the worker sees; or a whole recipe
        resources: Name of a file in configs/resources, such as laptop; a path that the worker sees; or whole resources
        overrides: Settings to change, such as stages.sft.learning_rate=1e-5
        schedule: Only for schedules: a run ends at once where its window is over or another run has it
    """
    run = checked_run(recipe, resources, overrides)
    summary.check(run)
    steps = cache(lambda: _checked_steps(run))  # before a window is claimed, and once
    own = windows.FlowRun(str(runtime.flow_run.id), runtime.flow_run.scheduled_start_time, ready=steps)
    if schedule and (why := windows.begin(run.recipe.name, schedule, own, store=run.resources.storage.store)):
        return Completed(name="Skipped", message=why)
    return attempt(run, lambda: _work(run, steps()))


def _checked_steps(run: Run) -> list[Step]:
    steps = explain(run)
    check_work(run, steps, serves=run.resources.tracking.uri is not None)
    return steps


def _work(run: Run, steps: Sequence[Step]) -> dict[str, str]:
    address = settings.PREFECT_UI_URL.value()  # None without a server's address
    context = RunContext(links={"prefect": address} if address else {})
    with pages.opened() as page:
        page.show_plan(steps)
        progress = pages.TaskProgress(page, steps)
        outcome = run_pipeline(run, progress.counting(TASKS), context=context, flow_run=runtime.flow_run.id)
        content = summary.gather(run, outcome)
        page.show_outcome(content.summary)
        progress.close()
        files = summary.write(run, outcome, content)
    return {"report": files.html, "summary": files.json, **{n: c.digest for n, c in outcome.checkpoints().items()}}
