"""The flow `vila-retrain`: the next step of retraining, in a window of a schedule or after an event."""

from datetime import UTC, datetime
from typing import Any, Literal

from prefect import State, flow, runtime
from prefect.artifacts import create_markdown_artifact
from prefect.states import Completed

from flows.attempt import attempt, checked_run
from flows.tasks import TASKS
from vila_ops import doctor
from vila_ops.config import Recipe, Resources, Run
from vila_ops.config.load import policy_of
from vila_ops.config.retrain import RetrainPolicy
from vila_ops.pipeline.retrain import Retraining, begin_step, may_train, step
from vila_ops.pipeline.windows import FlowRun
from vila_ops.retrain.decisions import page


@flow(name="vila-retrain", validate_parameters=True, persist_result=False)
def retrain(
    recipe: str | Recipe = "demo",
    resources: str | Resources = "laptop",
    policy: str | RetrainPolicy = "demo",
    trigger: Literal["schedule", "event", "command"] = "command",
    overrides: tuple[str, ...] = (),
) -> dict[str, str] | State[Any]:
    """Decide whether the champion is trained on, and do it; or go on with the canary of an earlier retraining.

    A scheduled run ends at once, in the state Skipped, where its window is over or another run has it, unless a canary
    waits; one that asks for events, where nothing was delivered or rated since the last one. Returns what was decided,
    and by which rule.

    Args:
        recipe: Name of a file in configs/recipes, such as demo; a path that the worker sees; or a whole recipe
        resources: Name of a file in configs/resources, such as laptop; a path that the worker sees; or whole resources
        policy: Name of a file in configs/retrain, such as demo; a path that the worker sees; or a whole policy
        trigger: What asks; leave it at command, as the others are for schedules
        overrides: Settings to change, such as stages.sft.learning_rate=1e-5
    """
    run, rules, now = checked_run(recipe, resources, overrides), policy_of(policy), datetime.now(UTC)
    own = FlowRun(str(runtime.flow_run.id), runtime.flow_run.scheduled_start_time, ready=lambda: _check(run))
    if (why := begin_step(run, rules, own, trigger=trigger, now=now)) is not None:
        return Completed(name="Skipped", message=why)
    return attempt(run, lambda: _work(Retraining(run, rules, trigger, tasks=TASKS)))


def _check(run: Run) -> None:
    """Raise ValueError where the device that may train, or the engine of the canary that follows, is not there."""
    device = doctor.device_findings(run.resources) if may_train(run) else ()
    doctor.refuse(run, (*device, *doctor.serving(run.resources)))


def _work(one: Retraining) -> dict[str, str]:
    made = step(one)
    create_markdown_artifact(key="vila-decision", markdown=page(made), description="What was decided, and why")
    return {"subject": made.subject, "verdict": made.decided.verdict, "rule": made.decided.rule}
