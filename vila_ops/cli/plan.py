"""`vila-ops plan`: what a run will take, for a person as a table, for a program as one object."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vila_ops.cli.options import INLINE, AsJson, Overrides, RecipeFile, ResourcesFile, load_run, print_handle, say
from vila_ops.cli.show import Row, table
from vila_ops.config.lengths import load_lengths

if TYPE_CHECKING:
    from vila_ops.plan.plan import Plan  # heavy: torch, transformers

LengthsFile = Annotated[
    Path | None, typer.Option("--lengths", help="A file of configs/lengths, where the mixtures are not prepared")
]


def plan(
    recipe: RecipeFile,
    resources: ResourcesFile = INLINE,
    lengths: LengthsFile = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Tokens, FLOPs, memory, hours, storage and money of a run, from lengths and shapes; do nothing.

    Ends with 1 where a stage does not fit its GPUs.
    """
    from vila_ops.plan.plan import plan_run, refusals  # heavy: torch, transformers

    run, context = load_run(recipe, resources, overrides)
    planned = plan_run(run, load_lengths(lengths) if lengths else None, context)
    if as_json:
        print_handle(planned, as_json)
    else:
        say("\n".join(lines(planned)))
    if refused := refusals(planned):
        print("\n".join(f"error: {line}" for line in refused), file=sys.stderr)
        raise typer.Exit(1)


def lines(plan: "Plan") -> list[str]:
    """The tables of a plan."""
    work: list[Row] = [
        ("stage", "lengths", "samples", "tokens", "targets", "padding", "steps", "FLOPs", "hours", "MFU", "cost")
    ]
    held: list[Row] = [("stage", "memory", "of it activations", "fits", "host", "resume", "model", "data", "features")]
    for one in plan.stages:
        memory = one.memory
        work.append(
            (one.stage, one.lengths, *map(_short, (one.samples, one.tokens, one.targets)), f"{one.padding:.1%}",
             str(one.steps), f"{one.model_flops:.3g}", _known(one.hours, "{:.3g}"), _known(one.mfu, "{:.1%}"),
             _known(one.cost, "{:.0f}"))
        )  # fmt: skip
        held.append(
            (one.stage, f"{memory.total:.1f} GiB", f"{memory.activations:.1f}",
             "-" if one.fits is None else "yes" if one.fits else "NO", f"{memory.host:.1f} GiB",
             _bytes(one.resume_bytes) if one.resume_bytes else "never",
             *map(_bytes, (one.model_bytes, one.data_bytes, one.feature_bytes)))
        )  # fmt: skip
    hours = _known(plan.hours, "{:.1f} hours, ") + _known(plan.gpu_hours, "{:.0f} GPU hours, ")
    if plan.hours is None:
        hours = "hours unknown: the resources name no accelerator; "
    cost = f"{plan.cost:.0f} of money, " if plan.cost else ""
    return [
        f"recipe {plan.recipe}, fingerprint {plan.recipe_fingerprint}", "", *table(work), "", *table(held), "",
        f"{hours}{cost}{_bytes(plan.storage_bytes)} of storage at most",
    ]  # fmt: skip


def _known(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def _bytes(count: float | None) -> str:
    return "-" if count is None else f"{_short(count)}B"


def _short(count: float) -> str:
    """1,234,567 as 1.23 M."""
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} "
