"""The flow `vila`: every task, from data to a served model."""

import logging
from pathlib import Path

from prefect import flow, runtime, settings
from prefect.artifacts import create_markdown_artifact, create_table_artifact

from flows.tasks import TASKS
from vila_ops.config import Run, RunContext, load
from vila_ops.pipeline.run import run_pipeline
from vila_ops.report import summary


@flow(name="vila", validate_parameters=True, persist_result=False)
def vila(run: Run | None = None) -> dict[str, str]:
    """Prepare, train stage by stage, evaluate after each, register, deploy. Sealed results are reused.

    Without `run` it runs the demo's recipe on this machine. Returns the models' digests and the paths of the report.
    """
    run = run or load(Path("configs/recipes/demo.yaml"), resources=Path("configs/resources/laptop.yaml"))
    logging.getLogger("vila_ops").setLevel(logging.INFO)  # Prefect gives the logger handlers, but no level
    summary.check(run)
    address = settings.PREFECT_UI_URL.value()  # None without a server's address
    context = RunContext(links={"prefect": address} if address else {})
    outcome = run_pipeline(run, TASKS, context=context, flow_run=runtime.flow_run.id)
    page = summary.write(run, outcome)
    create_markdown_artifact(key="vila-report", markdown=summary.markdown(page.summary), description="The run")
    create_table_artifact(key="vila-stages", table=summary.table(page.summary), description="The stages")
    return {"report": page.html, "summary": page.json, **{n: c.digest for n, c in outcome.checkpoints().items()}}
