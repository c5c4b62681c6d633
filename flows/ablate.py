"""The flow `vila-ablate`: the recipes of a grid with every seed, and what they show."""

from pathlib import Path

from prefect import flow
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.client.schemas.objects import State

from flows.attempt import attempt, check_work, checked_run
from flows.tasks import TASKS
from vila_ops.ablate.cells import runs_of
from vila_ops.ablate.measure import measure
from vila_ops.ablate.results import scores_of
from vila_ops.ablate.verdicts import grid_result
from vila_ops.config import Resources, load_resources
from vila_ops.config.grid import Grid, grid_of
from vila_ops.pipeline.explain import explain_evaluate
from vila_ops.report import ablation


@flow(name="vila-ablate", validate_parameters=True, persist_result=False)
def ablate(grid: str | Grid = "table1_demo", resources: str | Resources = "laptop") -> dict[str, str] | State[None]:
    """Train and measure the recipes of a grid with every seed. What is sealed is reused, so a stopped grid goes on.

    Returns the verdict on each claim.

    Args:
        grid: Name of a file in configs/grids, such as table1_demo; a path that the worker sees; or a whole grid
        resources: Name of a file in configs/resources, such as laptop; a path that the worker sees; or whole resources
    """
    wanted = grid_of(grid)
    loaded = load_resources(Path(resources)) if isinstance(resources, str) else resources
    run = checked_run(runs_of(wanted, loaded)[0].run.recipe, loaded, ())
    return attempt(run, lambda: _work(wanted, loaded))


def _work(grid: Grid, resources: Resources) -> dict[str, str]:
    runs = runs_of(grid, resources)
    evaluations = ((one.run, one.stage, one.run.recipe.final_suite) for one in runs)
    check_work(runs[0].run, (step for one in evaluations for step in explain_evaluate(*one)), serves=False)
    measured = measure([grid], resources, tasks=TASKS)[grid.name]
    result = grid_result(grid, scores_of(grid, measured))
    rows = [
        {"claim": one.claim.says, "verdict": one.verdict, "metric": one.claim.metric}
        | one.advantage.model_dump(exclude={"by_seed"})
        for one in result.claims
    ]
    create_table_artifact(key="vila-claims", table=rows, description=grid.title)
    create_markdown_artifact(key="vila-grid", markdown=ablation.markdown(result, measured))
    return {one.claim.says: one.verdict for one in result.claims}
