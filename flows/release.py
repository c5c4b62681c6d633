"""The flow `vila-release`: the last stage's model becomes the champion and is served, once a person has approved it."""

from typing import Any

from prefect import State, flow
from prefect.artifacts import create_table_artifact
from prefect.flow_runs import suspend_flow_run
from prefect.input import RunInput
from prefect.states import Completed

from flows.attempt import attempt, check_work, checked_run
from flows.tasks import TASKS
from vila_ops.config import NO_CONTEXT, Recipe, Resources, Run
from vila_ops.pipeline import promotion
from vila_ops.pipeline.explain import explain_promotion


class Approval(RunInput):
    """What a person is asked on the page of the flow run."""

    approved: bool = False
    """Whether the model may become the champion and be served."""
    reason: str = ""


@flow(name="vila-release", validate_parameters=True, persist_result=False)
def promote(
    recipe: str | Recipe = "demo",
    resources: str | Resources = "laptop",
    approval: bool = False,
    overrides: tuple[str, ...] = (),
) -> dict[str, str] | State[Any]:
    """Let the gate judge the last stage's model against the champion, and serve the winner.

    With `approval` it first shows both, and ends its process until a person resumes it, whenever that is; it then runs
    from its start, where everything is sealed by then. The champion is measured too where it has no report on the final
    suite. A missing device is told before anything works, but for a champion that only MLflow's alias names. Returns
    the version that was judged, the champion, and where it is served.

    Args:
        recipe: Name of a file in configs/recipes, such as demo; a path that the worker sees; or a whole recipe
        resources: Name of a file in configs/resources, such as laptop; a path that the worker sees; or whole resources
        approval: Wait for a person, who presses Resume on the page of this run, before anything is promoted
        overrides: Settings to change, such as stages.sft.learning_rate=1e-5
    """
    run = checked_run(recipe, resources, overrides)
    return attempt(run, lambda: _work(run, approval=approval))


def _work(run: Run, *, approval: bool) -> dict[str, str] | State[Any]:
    check_work(run, explain_promotion(run), serves=True)
    candidate = promotion.candidate_of(run, tasks=TASKS, context=NO_CONTEXT)
    rows = promotion.beside_champion(run, candidate, tasks=TASKS, context=NO_CONTEXT)
    create_table_artifact(key="vila-comparison", table=rows, description="The model and the champion")
    if approval:
        asked = Approval.with_initial_data(description=_question(run, rows))
        answer = suspend_flow_run(wait_for_input=asked, key="approval")
        if not answer.approved:
            return Completed(name="Refused", message=f"A person refused the model: {answer.reason}")
    version = promotion.register_model(run, candidate.model, candidate.report, tasks=TASKS, context=NO_CONTEXT)
    served = promotion.to_serve(run.recipe, version, run.resources)
    if served is None:
        return Completed(name="Refused", message="The gate refused the model, and there is no champion to serve")
    told = {"judged": f"{version.name} {version.version}", "champion": str(served.version)}
    if run.resources.serve.started_by == "operator":  # which reads the champion itself
        return told
    return {**told, "url": TASKS.deploy(run.recipe.service, served, run.resources, NO_CONTEXT).url}


def _question(run: Run, rows: list[dict[str, str]]) -> str:
    head = list(rows[0])
    lines = [head, ["---"] * len(head), *(list(row.values()) for row in rows)]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"Shall this model go to the gate of {run.recipe.gate.model_name!r}, and be served if it passes?\n\n{table}"
