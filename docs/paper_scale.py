"""Writes the tables of docs/paper-scale.md from the planner: `make paper-scale`, about a minute."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from vila_ops.cli.tables import short
from vila_ops.config import Run, load
from vila_ops.config.base import fingerprint
from vila_ops.config.lengths import load_lengths
from vila_ops.plan.plan import Plan, StagePlan, plan_run

ROOT = Path(__file__).parents[1]
PAGE = Path(__file__).with_name("paper-scale.md")
START, END = "<!-- made by docs/paper_scale.py -->", "<!-- end -->"
LENGTHS = ROOT / "configs/lengths/vila.yaml"
UTILISATION = 0.5
PRICE = 2.0
"""Of one A100 for an hour."""
ASSUMED = (f"resources.train.mfu={UTILISATION}", f"resources.train.accelerator.price_per_hour={PRICE}")
NO_FEATURES = "resources.storage.features_leave_free=1"


@dataclass(frozen=True)
class Case:
    """A recipe of the paper with its scripts' resources."""

    title: str
    recipe: str
    resources: str


CASES = (
    Case("VILA 7B", "configs/recipes/vila-7b.yaml", "configs/resources/vila_128.yaml"),
    Case("VILA 13B", "configs/recipes/vila-13b.yaml", "configs/resources/vila-13b_128.yaml"),
    Case(
        "Ablations: 7B, 224 pixels, MMC4, visual SFT", "configs/ablations/base.yaml", "configs/resources/vila_128.yaml"
    ),
)


def run_of(case: Case, overrides: Sequence[str] = ()) -> Run:
    """A case with the assumptions of the page."""
    return load(ROOT / case.recipe, resources=ROOT / case.resources, overrides=(*ASSUMED, *overrides))


def planned(case: Case, overrides: Sequence[str]) -> Plan:
    """The plan of a case."""
    return plan_run(run_of(case, overrides), load_lengths(LENGTHS))


@dataclass(frozen=True)
class Stages:
    """The stages of a case in one of its two forms."""

    name: str
    plans: tuple[StagePlan, ...]
    recomputed: tuple[bool, ...]
    """Whether each recomputes its layers in the backward pass."""


def as_scripts(case: Case) -> Stages:
    """One sample a row, padded to the longest of its micro-batch. The scripts recompute everywhere."""
    plans = planned(case, [NO_FEATURES]).stages
    return Stages("scripts", plans, (True,) * len(plans))


def packed(case: Case, scripts: Stages) -> tuple[Stages, Stages]:
    """Packed rows with about the tokens of the scripts' step: recomputed as there, and only where it has to be."""
    run = run_of(case)
    overrides = [NO_FEATURES]
    for one in scripts.plans:
        workers = run.resources.train.for_stage(one.stage).num_workers
        rows = one.tokens / one.steps / run.recipe.stages[one.stage].sequence_length
        overrides += [
            f"stages.{one.stage}.pack=true",
            f"stages.{one.stage}.global_batch_size={max(1, round(rows / workers)) * workers}",
            f"resources.train.stages.{one.stage}.micro_batch_size=1",
        ]
    whole = planned(case, [*overrides, "resources.train.gradient_checkpointing=false"]).stages
    recomputed = planned(case, overrides).stages
    pairs = list(zip(whole, recomputed, strict=True))
    return Stages("packed", recomputed, (True,) * len(recomputed)), Stages(
        "packed", tuple(one if one.fits else other for one, other in pairs), tuple(not one.fits for one in whole)
    )


def lines() -> Iterator[str]:
    """The generated part of the page."""
    yield f"Inputs: `{inputs()}`."
    for case in CASES:
        scripts = as_scripts(case)
        features = [one.feature_bytes for one in planned(case, []).stages]
        yield from ("", f"## {case.title}", "", *table(case, scripts, *packed(case, scripts), features))


def inputs() -> str:
    """Digest of all that the numbers are made of, but for the planner."""
    runs = [run_of(case).fingerprint() for case in CASES]
    return fingerprint([runs, load_lengths(LENGTHS).fingerprint()])[:16]


def table(case: Case, scripts: Stages, recomputed: Stages, ours: Stages, features: Sequence[float]) -> Iterator[str]:
    """Two rows for each stage and two for the sum: as the scripts have it, and packed; and the saving in two parts."""
    yield "| stage | rows | layers | GPUs | tokens | padding | steps | memory | hours | GPU-hours | cost | features |"
    yield "|---|---|---|---|---|---|---|---|---|---|---|---|"
    workers = [run_of(case).resources.train.for_stage(one.stage).num_workers for one in scripts.plans]
    for number, size in enumerate(features):
        yield row(scripts, number, workers[number], "")
        yield row(ours, number, workers[number], f"{short(size)}B")
    for of in (scripts, ours):
        hours, gpu = sum(one.hours or 0 for one in of.plans), gpu_hours(of, workers)
        yield f"| **all** | {of.name} | | | | | | | {hours:.3g} | {gpu:,.0f} | {gpu * PRICE:,.0f} | |"
    before, packed_alone, after = (gpu_hours(of, workers) for of in (scripts, recomputed, ours))
    yield ""
    yield (
        f"Packing alone saves {1 - packed_alone / before:.0%} of the GPU-hours; with layers kept where they fit it is "
        f"{1 - after / before:.0%}."
    )


def gpu_hours(of: Stages, workers: Sequence[int]) -> float:
    """GPU-hours of all stages."""
    return sum((one.hours or 0) * count for one, count in zip(of.plans, workers, strict=True))


def row(of: Stages, number: int, workers: int, features: str) -> str:
    """One stage in one form."""
    one = of.plans[number]
    hours = one.hours or 0.0
    cells = (
        one.stage, of.name, "recomputed" if of.recomputed[number] else "kept", str(workers), short(one.tokens).strip(),
        f"{one.padding:.1%}", f"{one.steps:,}", f"{one.memory.total:.1f} GiB{'' if one.fits else ', does not fit'}",
        f"{hours:.3g}", f"{hours * workers:,.0f}", f"{hours * workers * PRICE:,.0f}", features,
    )  # fmt: skip
    return f"| {' | '.join(cells)} |"


def page() -> str:
    """The page with the present tables."""
    before, _, rest = PAGE.read_text().partition(START)
    return "\n".join([before + START, *lines(), END]) + rest.partition(END)[2]


if __name__ == "__main__":
    PAGE.write_text(page())
