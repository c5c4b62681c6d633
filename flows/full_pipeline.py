"""The flow `vila`: every task, from data to a served model."""

import logging
from pathlib import Path
from typing import Any

from prefect import State, flow, runtime, settings
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.states import Completed

from flows.tasks import TASKS
from vila_ops.config import Run, RunContext, load
from vila_ops.config.schedule import Schedule
from vila_ops.pipeline import windows
from vila_ops.pipeline.run import run_pipeline
from vila_ops.report import summary


@flow(name="vila", validate_parameters=True, persist_result=False)
def vila(run: Run | None = None, schedule: Schedule | None = None) -> dict[str, str] | State[Any]:
    """Prepare, train stage by stage, evaluate after each, register, deploy. Sealed results are reused.

    Without `run` it runs the demo's recipe on this machine. Returns the models' digests and the paths of the report.
    With `schedule` it ends at once, in the state Skipped, where its window is over or another run has it.
    """
    run = run or load(Path("configs/recipes/demo.yaml"), resources=Path("configs/resources/laptop.yaml"))
    due, flow_run, store = runtime.flow_run.scheduled_start_time, str(runtime.flow_run.id), run.resources.storage.store
    if schedule and (why := windows.begin(run.recipe.name, schedule, due=due, flow_run=flow_run, store=store)):
        return Completed(name="Skipped", message=why)
    logging.getLogger("vila_ops").setLevel(logging.INFO)  # Prefect gives the logger handlers, but no level
    summary.check(run)
    address = settings.PREFECT_UI_URL.value()  # None without a server's address
    context = RunContext(links={"prefect": address} if address else {})
    outcome = run_pipeline(run, TASKS, context=context, flow_run=runtime.flow_run.id)
    page = summary.write(run, outcome)
    create_markdown_artifact(key="vila-report", markdown=summary.markdown(page.summary), description="The run")
    create_table_artifact(key="vila-stages", table=summary.table(page.summary), description="The stages")
    return {"report": page.html, "summary": page.json, **{n: c.digest for n, c in outcome.checkpoints().items()}}
