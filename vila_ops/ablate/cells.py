"""The runs of grids, what each is made of, and the fingerprint by which its result is known on any machine."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from vila_ops.artifacts import store
from vila_ops.artifacts.kinds import BenchmarkFiles, Checkpoint, Dataset, Pretrained
from vila_ops.config import Mixture, Model, Resources, Run, Stage, TextFormat, fingerprint
from vila_ops.config.benchmarks import OfficialBenchmark
from vila_ops.config.few_shot import TrainFile
from vila_ops.config.grid import Grid
from vila_ops.config.load import merge
from vila_ops.config.run import BASE
from vila_ops.data.preprocess import prepare
from vila_ops.errors import did_you_mean
from vila_ops.eval.job import EvalJob
from vila_ops.model import assemble
from vila_ops.pipeline.explain import UNMADE, unmade
from vila_ops.pipeline.stages import Weights, suite_text
from vila_ops.train import stage as training
from vila_ops.train.job import StageInputs


@dataclass(frozen=True)
class CellRun:
    """A cell with one seed."""

    grid: str
    cell: str
    seed: int
    run: Run
    stage: str
    """The model after it is measured."""

    def stages(self) -> list[str]:
        """The stages that it trains, in order."""
        names = list(self.run.recipe.stages)
        return names[: names.index(self.stage) + 1] if self.stage != BASE else []

    @property
    def name(self) -> str:
        """GRID.CELL.SEED."""
        return f"{self.grid}.{self.cell}.{self.seed}"

    def __str__(self) -> str:
        return f"cell {self.cell} of {self.grid} with seed {self.seed}"


@dataclass(frozen=True)
class StageAt:
    """A stage of a cell and its place in the store, sealed or not."""

    stage: Stage
    model: Model
    at: store.Address
    done: Checkpoint | None


def runs_of_all(grids: Sequence[Grid], resources: Resources) -> list[CellRun]:
    """The runs of several grids: all cells of all grids with the first seed of their grid, then with the next one.

    Raises ValueError for a wrong setting, and for a grid that is given twice.
    """
    names = [grid.name for grid in grids]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"grid {twice[0]!r} is given {len(twice)} times; give each grid once")
    placed = [(grid.seeds.index(one.seed), one) for grid in grids for one in runs_of(grid, resources)]
    return [one for _, one in sorted(placed, key=lambda pair: pair[0])]


def runs_of(grid: Grid, resources: Resources) -> list[CellRun]:
    """The runs of a grid: all cells with the first seed, then with the next. Raises ValueError for a wrong setting.

    Cells share what they have in common by address: data, stages before the first difference, and evaluations of them.
    """
    return [_run(grid, name, seed, resources) for seed in grid.seeds for name in grid.cells]


def _run(grid: Grid, cell: str, seed: int, resources: Resources) -> CellRun:
    recipe = {**merge(grid.recipe, grid.cells[cell].recipe), "name": f"{grid.name}-{cell}"}
    try:
        run = Run.model_validate({"recipe": recipe, "resources": resources.model_dump(mode="json")})
    except ValueError as error:
        raise ValueError(f"cell {cell!r} of grid {grid.name!r}: {error}") from error
    suite, stages = run.recipe.final_suite, [BASE, *run.recipe.stages]
    stage = grid.cells[cell].stage or stages[-1]
    if stage not in stages:
        raise ValueError(
            f"cell {cell!r} of grid {grid.name!r} measures the model after stage {stage!r}, and its recipe has "
            f"{stages}{did_you_mean(stage, stages)}"
        )
    if unmeasured := [metric for metric in grid.metrics if not suite.measures(metric)]:
        raise ValueError(
            f"grid {grid.name!r} shows {unmeasured[0]!r}, which final_suite {suite.name!r} of cell {cell!r} does not "
            f"measure; its benchmarks are {list(suite.benchmarks)}"
        )
    seeds = {f"stages.{name}.seed": one.seed + seed for name, one in run.recipe.stages.items()}
    changes: dict[str, Any] = {**seeds, "model.seed": run.recipe.model.seed + seed}
    run = run.with_changes({f"recipe.{key}": value for key, value in changes.items()})
    return CellRun(grid.name, cell, seed, run, stage)


def stages_of(one: CellRun, *, in_store: bool = True) -> Iterator[StageAt]:
    """The stages of a cell in order. Nothing is made, and raw data need not be on this machine.

    `in_store=False`: as if nothing was sealed, so that the addresses are the same on every machine.
    """
    recipe, resources = one.run.recipe, one.run.resources
    model: Weights | None = assemble.assembled(recipe.model, resources) if in_store else None
    model = model or Pretrained(uri="", digest=unmade(assemble.address_of(recipe.model)))
    for name in one.stages():
        stage = recipe.stages[name]
        data = _data(stage.mixture, recipe.text(name), resources, in_store=in_store)
        shape = recipe.model_of(name)
        inputs = StageInputs(stage=stage, model=shape, data=data, init=model, resources=resources)
        at = training.address_of(inputs)
        done = store.find(Checkpoint, at, store=resources.storage.store) if in_store else None
        model = done or Checkpoint(uri="", digest=unmade(at), stage=name, step=0)
        yield StageAt(stage, shape, at, done)


def fingerprint_of(one: CellRun) -> str:
    """What a result of a cell depends on but the machine: the addresses of the results of its benchmarks.

    It is the same whatever a store holds, and for cells of two grids that are one model measured on the same suite. Raw
    data and official files enter by their content where they are on this machine, else by their settings: it is the
    same on two machines if both have them, or neither.
    """
    recipe, suite, resources = one.run.recipe, one.run.recipe.final_suite, one.run.resources
    places = [part.at for part in stages_of(one, in_store=False)] or [assemble.address_of(recipe.model)]
    held_out = _data(suite.mixture, suite_text(recipe, one.stage), resources, in_store=False)
    official = {name: of for name, of in suite.benchmarks.items() if isinstance(of, OfficialBenchmark)}
    job = EvalJob(
        suite=suite,
        model=Pretrained(uri="", digest=unmade(places[-1])),
        data=held_out,
        files={name: _files(of, resources) for name, of in official.items()},
        pools={
            name: _files(of, resources, train=True)
            for name, of in official.items()
            if of.few_shot and isinstance(of.few_shot.pool, TrainFile)
        },
        resources=resources,
    )
    return fingerprint({name: job.address(name).key for name in suite.benchmarks})


def not_here(one: CellRun) -> list[str]:
    """The mixtures of a cell that enter its fingerprint by their settings: their raw data is not on this machine."""
    recipe = one.run.recipe
    read = {recipe.stages[name].mixture.name: (recipe.stages[name].mixture, recipe.text(name)) for name in one.stages()}
    read[recipe.final_suite.mixture.name] = recipe.final_suite.mixture, suite_text(recipe, one.stage)
    return [name for name, (mixture, text) in read.items() if _address(mixture, text, one.run.resources) is None]


def _files(benchmark: OfficialBenchmark, resources: Resources, *, train: bool = False) -> BenchmarkFiles:
    """A reference to official files, or to the train file, with a digest that stands for them."""
    from vila_ops.eval import sealed  # heavy: Pillow

    try:
        digest = unmade(sealed.address_of(benchmark, resources, train=train))
    except (ValueError, OSError):  # they are not on this machine
        digest = UNMADE + fingerprint([benchmark.model_dump(mode="json"), train])
    return BenchmarkFiles(uri="", digest=digest, benchmark="", num_items=0, num_unreadable=0)


def _data(mixture: Mixture, text: TextFormat, resources: Resources, *, in_store: bool) -> Dataset:
    """The prepared mixture, or a reference with a digest that stands for it."""
    at = _address(mixture, text, resources)
    if in_store and at and (done := prepare.prepared(mixture, text, resources)):
        return done
    settings = [mixture.model_dump(mode="json"), text.model_dump(mode="json")]
    digest = unmade(at) if at else UNMADE + fingerprint(settings)
    return Dataset(uri="", digest=digest, num_samples=0, num_tokens=0)


def _address(mixture: Mixture, text: TextFormat, resources: Resources) -> store.Address | None:
    """The place of a prepared mixture; None where its raw data is not on this machine."""
    try:
        return prepare.address_of(mixture, text, resources)
    except (ValueError, OSError):
        return None
