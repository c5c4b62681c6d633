"""A grid of an ablation: recipes that differ in named settings, what is measured on them, and what that may show."""

from pathlib import Path
from typing import Any

from pydantic import Field, FiniteFloat, NonNegativeInt, PositiveInt, field_validator, model_validator

from vila_ops.config.base import Config, Slug
from vila_ops.config.load import read_as
from vila_ops.errors import did_you_mean


class Cell(Config):
    """One recipe of a grid."""

    recipe: dict[str, Any] = Field(default_factory=dict)
    """Settings that are laid over the grid's recipe, as by `extends`."""
    stage: str | None = None
    """The model after this stage is measured (`base`: before the first one); None: after the last one."""
    paper: dict[str, float] = Field(default_factory=dict)
    """Numbers of the paper's table in this cell, by column; page and `--json` have them beside ours, and nothing is
    compared with them."""


class Claim(Config):
    """What two cells are to show of a metric, decided by a rule that is fixed before the run."""

    says: str
    """The claim in words."""
    cell: Slug
    """The one that is better, if the claim is right."""
    than: Slug
    over: tuple[Slug, Slug] | None = None
    """Two cells whose difference is subtracted, first minus second: `cell` gains more over `than` than the first one
    gains over the second."""
    metric: str
    """A metric of the final suite's report."""
    by: FiniteFloat = 0.0
    """In the metric's unit. The claim is shown where the whole 95 % interval of the advantage lies above this, and
    contradicted where it lies below 0. Below 0: `cell` is not worse than `than` by more than so much; the claim is
    then contradicted where the interval lies below `by` itself."""

    def cells(self) -> tuple[str, ...]:
        """The cells that it names."""
        return self.cell, self.than, *(self.over or ())

    def compared(self) -> str:
        """Its cells and `by` in words."""
        over = " more than {} over {}".format(*self.over) if self.over else ""
        by = f", by {self.by:g}" if self.by > 0 else f", not worse by more than {-self.by:g}" if self.by else ""
        return f"{self.cell} over {self.than}{over}{by}"


class Grid(Config):
    """An ablation: a cell for each recipe, each trained and measured with every seed."""

    name: Slug
    title: str
    recipe: dict[str, Any] = Field(default_factory=dict)
    """The recipe that the cells share."""
    cells: dict[Slug, Cell] = Field(min_length=2)
    """The first one is the baseline of the printed differences."""
    seeds: tuple[NonNegativeInt, ...] = (0, 1, 2)
    """Added to every seed of model and stages; 0 is the recipe as it is."""
    metrics: tuple[str, ...] = Field(min_length=1)
    """Metrics of the final suite's report that are shown."""
    claims: tuple[Claim, ...] = ()
    proxies: str = ""
    """What the metrics stand for, and of what; the page has it beside the paper's numbers."""
    resamples: PositiveInt = 10_000
    """Of the bootstrap over groups of items."""

    @field_validator("seeds")
    @classmethod
    def _seeds_differ(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if len(seeds) < 2 or len(set(seeds)) < len(seeds):
            raise ValueError(f"seeds {list(seeds)} say nothing about how far seeds differ; give two or more, each once")
        return seeds

    @model_validator(mode="after")
    def _claims_are_of_the_grid(self) -> "Grid":
        for claim in self.claims:
            for cell in claim.cells():
                if cell not in self.cells:
                    raise ValueError(
                        f"claim {claim.says!r} names cell {cell!r}; the cells are {list(self.cells)}"
                        f"{did_you_mean(cell, self.cells)}"
                    )
            if claim.metric not in self.metrics:
                raise ValueError(
                    f"claim {claim.says!r} names metric {claim.metric!r}, which is not one of metrics; add it there"
                )
        return self


def grid_of(grid: str | Grid) -> Grid:
    """A grid by its name in `configs/grids`, by the path of its file, or as a whole. Raises ValueError."""
    return load_grid(Path(grid)) if isinstance(grid, str) else grid


def load_grid(given: Path) -> Grid:
    """The grid of a name in `configs/grids`, or of a file."""
    return Grid.model_validate(read_as(Grid, given, "grids", what="a grid of an ablation"))
