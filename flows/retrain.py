"""The flow `vila-retrain`: the next step of retraining, in a window of a schedule or after an event."""

import logging
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from prefect import State, flow, runtime
from prefect.artifacts import create_markdown_artifact
from prefect.states import Completed

from flows.tasks import TASKS
from vila_ops.config import Run, load
from vila_ops.config.load import load_policy
from vila_ops.config.retrain import RetrainPolicy
from vila_ops.pipeline import retrain as retraining
from vila_ops.retrain.decisions import page


@flow(name="vila-retrain", validate_parameters=True, persist_result=False)
def retrain(
    run: Run | None = None,
    policy: RetrainPolicy | None = None,
    trigger: Literal["schedule", "event", "command"] = "command",
) -> dict[str, str] | State[Any]:
    """Decide whether the champion is trained on, and do it; or go on with the canary of an earlier retraining.

    Without `run` and `policy` they are the demo's. A scheduled run ends at once, in the state Skipped, where its window
    is over or another run has it, unless a canary waits; one that asks for events, where nothing was delivered or rated
    since the last one.
    """
    run = run or load(Path("configs/recipes/demo.yaml"), resources=Path("configs/resources/laptop.yaml"))
    policy = policy or load_policy(Path("configs/retrain/demo.yaml"))
    flow_run, due, now = str(runtime.flow_run.id), runtime.flow_run.scheduled_start_time, datetime.now(UTC)
    why = retraining.begin_step(run, policy, trigger=trigger, flow_run=flow_run, due=due, now=now)
    if why is not None:
        return Completed(name="Skipped", message=why)
    logging.getLogger("vila_ops").setLevel(logging.INFO)
    made = retraining.step(retraining.Retraining(run, policy, trigger, now, tasks=TASKS))
    create_markdown_artifact(key="vila-decision", markdown=page(made), description="What was decided, and why")
    return {"subject": made.subject, "verdict": made.decided.verdict, "rule": made.decided.rule}
