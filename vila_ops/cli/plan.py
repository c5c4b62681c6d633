"""`vila-ops plan`: what a run will take, for a person as a table, for a program as one object."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vila_ops.cli.options import (
    INLINE,
    AsJson,
    Overrides,
    RecipeFile,
    ResourcesFile,
    load_run,
    names_in,
    print_result,
    say,
)
from vila_ops.cli.tables import Row, short, table

if TYPE_CHECKING:  # heavy: torch, transformers
    from vila_ops.config import Run
    from vila_ops.config.model import LanguageModel, Projector, VisionTower
    from vila_ops.model.count import Counts
    from vila_ops.plan.plan import Plan

UNKNOWN = "after fetch"
"""The count of a part whose shape is not known on this machine."""

LengthsFile = Annotated[
    Path | None,
    typer.Option(
        "--lengths",
        help="A name in configs/lengths, or a file; for mixtures not prepared",
        autocompletion=names_in("lengths"),
    ),
]


def plan(
    recipe: RecipeFile,
    resources: ResourcesFile = INLINE,
    lengths: LengthsFile = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Count parameters, tokens, FLOPs, memory, hours, storage and money of a run, from lengths and shapes; do nothing.

    Ends with 1 where a stage does not fit its GPUs.
    """
    from vila_ops.config.lengths import load_lengths
    from vila_ops.model.count import count  # heavy: torch, transformers
    from vila_ops.plan.plan import plan_run, refusals

    run, context = load_run(recipe, resources, overrides)
    declared = load_lengths(lengths) if lengths else None
    if not as_json:
        say("\n".join([*parameters(run, count(run.recipe.model, cache=run.resources.storage.cache_folder())), ""]))
    planned = plan_run(run, declared, context)
    if as_json:
        print_result(planned, as_json)
    else:
        say("\n".join(lines(planned)))
    if refused := refusals(planned):
        print("\n".join(f"error: {line}" for line in refused), file=sys.stderr)
        raise typer.Exit(1)


def parameters(run: "Run", counts: "Counts") -> list[str]:
    """Parameters of the model's parts, and those that each stage trains."""
    model, stages = run.recipe.model, tuple(run.recipe.stages.values())
    parts: list[Row] = [
        ("part", "parameters", "what"),
        ("language_model", _exact(counts.language_model), _named(model.language_model)),
        ("vision_tower", _exact(counts.vision_tower), _named(model.vision_tower)),
        ("projector", _exact(counts.projector), _choice(model.projector)),
        ("all parts", _exact(counts.total()), ""),
    ]
    if any(stage.tuning.kind == "visual_expert" for stage in stages):
        parts.append(("visual expert", _exact(counts.expert), f"makes the language model {_ratio(counts)} as large"))
    trains: list[Row] = [("stage", "trained", "total", "share")]
    for number, stage in enumerate(stages, start=1):
        trained, total = counts.trained(stages[:number]), counts.total(stages[:number])
        share = f"{trained / total:.1%}" if trained is not None and total else "-"
        trains.append((stage.name, _exact(trained), _exact(total), share))
    return [*table(parts), "", *table(trains)]


def _ratio(counts: "Counts") -> str:
    if counts.language_model is None or counts.expert is None:
        return "about 2 times"
    return f"{1 + counts.expert / counts.language_model:.2f} times"


def _named(part: "VisionTower | LanguageModel") -> str:
    return f"{part.name} at {part.revision}" if part.kind == "hub" else part.kind


def _choice(projector: "Projector") -> str:
    """A projector's kind with its settings."""
    return " ".join(str(value) if key == "kind" else f"{key} {value}" for key, value in projector.model_dump().items())


def _exact(count: int | None) -> str:
    return UNKNOWN if count is None else f"{count:,}"


def lines(plan: "Plan") -> list[str]:
    """The tables of a plan."""
    work: list[Row] = [("stage", "lengths", "samples", "tokens", "targets", "padding", "steps", "FLOPs")]
    time: list[Row] = [("stage", "hours", "MFU", "cost", "fits", "memory", "activations", "host memory")]
    moved: list[Row] = [("stage", "elements reduced at once", "gathered ahead")]
    disk: list[Row] = [("stage", "resume", "model", "data", "features")]
    for one in plan.stages:
        memory = one.memory
        work.append(
            (one.stage, one.lengths, *map(short, (one.samples, one.tokens, one.targets)), f"{one.padding:.1%}",
             str(one.steps), f"{one.model_flops:.3g}")
        )  # fmt: skip
        time.append(
            (one.stage, _known(one.hours, "{:.3g}"), _known(one.mfu, "{:.1%}"), _known(one.cost, "{:.0f}"),
             "-" if one.fits is None else "yes" if one.fits else "NO", f"{memory.total:.1f} GiB",
             f"{memory.activations:.1f} GiB", f"{memory.host:.1f} GiB")
        )  # fmt: skip
        if one.messages:
            moved.append((one.stage, *(short(size).strip() for size in one.messages)))
        resume = _bytes(one.resume_bytes) if one.resume_bytes else "none"
        disk.append((one.stage, resume, *map(_bytes, (one.model_bytes, one.data_bytes, one.feature_bytes))))
    hours = _known(plan.hours, "{:.1f} hours, ") + _known(plan.gpu_hours, "{:.0f} GPU hours, ")
    if plan.hours is None:
        hours = "hours unknown: the resources name no accelerator; "
    cost = f"cost {plan.cost:.0f}, " if plan.cost else ""
    return [
        f"recipe {plan.recipe}, fingerprint {plan.recipe_fingerprint}", "",
        *table(work), "", *table(time), "", *([*table(moved), ""] if len(moved) > 1 else []), *table(disk), "",
        f"{hours}{cost}at most {_bytes(plan.storage_bytes)} of storage",
    ]  # fmt: skip


def _known(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def _bytes(count: float | None) -> str:
    return "-" if count is None else f"{short(count)}B"
