"""What grids would take before they run: stages that are sealed or shared, and tokens, hours and money of the rest.

A stage that several cells have in common counts with the first of them. Hours are the planner's where the resources
name an accelerator. Without one they are those of the most alike stage of the same tower and language model that was
timed, position by position: of the results of other cells, or sealed in the store. Evaluations are counted where
results have their time. Preparation is not counted.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property

from vila_ops.ablate.cells import CellRun, StageAt, fingerprint_of, stages_of
from vila_ops.ablate.results import CellResult
from vila_ops.config import Config, Model, Resources, Stage
from vila_ops.config.lengths import Lengths
from vila_ops.plan.plan import StagePlan, plan_run
from vila_ops.train.pace import Timed, pace_of, positions_of, sealed_timings


class CellCost(Config):
    """What one cell with one seed would take."""

    grid: str
    cell: str
    seed: int
    done: bool
    """Whether its result is in a file, so that nothing is left to do."""
    sealed: int
    """Stages that are sealed."""
    shared: int
    """Stages that another cell makes before this one."""
    runs: tuple[str, ...]
    """Stages that would train."""
    tokens: float | None
    """Of the stages that would train, image tokens included and padding left out. None: their lengths are not known."""
    hours: float | None
    money: float | None
    """None without a price in the resources."""


class GridCost(Config):
    """What grids would take."""

    cells: tuple[CellCost, ...]
    tokens: float | None
    hours: float | None
    money: float | None
    measured: bool
    """Whether hours are those of stages that were timed, not of the planner."""
    evaluations: bool
    """Whether hours count evaluations."""
    unknown: str | None
    """Why numbers are missing."""


def cost_of_grid(
    runs: Sequence[CellRun], lengths: Lengths | None = None, *, results: Mapping[str, CellResult] | None = None
) -> GridCost:
    """What runs would take, with declared lengths of samples or those of prepared mixtures.

    `results` are those in files, by their fingerprints.
    """
    done, keys = results or {}, [fingerprint_of(one) for one in runs]
    plans: dict[tuple[str, str], dict[str, StagePlan]] = {}
    unknown: str | None = None
    for one, key in zip(runs, keys, strict=True):
        if key not in done and (of := (one.grid, one.cell)) not in plans:  # seeds change no length
            try:
                plans[of] = {plan.stage: plan for plan in plan_run(one.run, lengths).stages}
            except ValueError as error:
                plans[of], unknown = {}, str(error)
    pace, seen, cells = _MeasuredPace(runs[0].run.resources, done), set[str](), list[CellCost]()
    for one, key in zip(runs, keys, strict=True):
        every = list(stages_of(one)) if key not in done else []
        new = [part for part in every if part.done is None and part.at.key not in seen]
        evaluation = 0.0 if key in done or key in seen else pace.evaluation(one.run.recipe.final_suite.name)
        seen |= {key, *(part.at.key for part in every)}
        planned = plans.get((one.grid, one.cell), {})
        cells.append(
            CellCost(
                grid=one.grid,
                cell=one.cell,
                seed=one.seed,
                done=key in done,
                sealed=sum(part.done is not None for part in every),
                shared=sum(part.done is None for part in every) - len(new),
                runs=tuple(part.stage.name for part in new),
                tokens=_sum([planned[p.stage.name].tokens if planned else None for p in new]),
                hours=_sum([evaluation, *(_hours(p, planned.get(p.stage.name), pace) for p in new)]),
                money=_sum([planned[p.stage.name].cost if planned else None for p in new]),
            )
        )
    return GridCost(
        cells=tuple(cells),
        tokens=_sum([one.tokens for one in cells]),
        hours=_sum([one.hours for one in cells]),
        money=_sum([one.money for one in cells]),
        measured=runs[0].run.resources.train.accelerator is None,
        evaluations=pace.has_evaluations,
        unknown=unknown,
    )


def _hours(part: StageAt, planned: StagePlan | None, pace: "_MeasuredPace") -> float | None:
    if planned is not None and planned.hours is not None:
        return planned.hours
    steps = planned.steps if planned else part.stage.num_steps
    seconds = pace.seconds(part.stage, part.model)
    return None if steps is None or seconds is None else seconds * positions_of(part.stage.model_dump(), steps) / 3600


class _MeasuredPace:
    """The time that stages and evaluations took, of results in files and of the sealed stages of a store."""

    def __init__(self, resources: Resources, results: Mapping[str, CellResult]) -> None:
        self._store, self._is_cpu = resources.storage.store, resources.train.accelerator is None
        self._tasks = [task for one in results.values() for task in one.tasks]

    @property
    def has_evaluations(self) -> bool:
        """Whether the time of an evaluation is known."""
        return self._is_cpu and any(task.task == "evaluate" for task in self._tasks)

    def evaluation(self, suite: str) -> float:
        """Hours of the longest evaluation on a suite, or else on any; 0 where none is known."""
        known = [task for task in self._tasks if task.task == "evaluate"] if self._is_cpu else []
        own = [task for task in known if task.name == suite] or known
        return max((task.seconds for task in own), default=0.0) / 3600

    def seconds(self, stage: Stage, model: Model) -> float | None:
        """Those of a position, of files first. None without a stage of the same parts, or for a GPU."""
        return pace_of(stage, model, self._timed) if self._is_cpu else None

    @cached_property
    def _timed(self) -> list[Timed]:
        of_files = [
            Timed(one.settings, one.seconds / one.timed_positions) for one in self._tasks if one.timed_positions
        ]
        return [*of_files, *sealed_timings(self._store)]


def _sum(values: Sequence[float | None]) -> float | None:
    """The sum; None where a value is not known. Nothing to run is 0."""
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None
