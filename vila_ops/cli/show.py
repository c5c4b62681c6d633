"""What a run would train, for a person: its stages as one table, its model's parameters as another."""

from vila_ops.config import Run, Stage
from vila_ops.config.model import HubLanguageModel, HubTower, Model, Projector
from vila_ops.config.train import FullTuning, Lora, Tuning, VisualExpert
from vila_ops.model.count import Counts

UNKNOWN = "after fetch"
"""Where a part's shape is not known on this machine."""
Row = tuple[str, ...]


def summary(run: Run, counts: Counts) -> list[str]:
    """The lines of both tables."""
    stages = [_HEADER, *_stage_rows(run, counts)]
    return [
        f"recipe {run.recipe.name}, fingerprint {run.recipe.fingerprint()}",
        "",
        *table(stages),
        "",
        *table(_part_rows(run, counts)),
    ]


_HEADER = ("stage", "trains", "trained / total", "image", "batch x length", "rate", "for", "ZeRO", "workers x rows")


def _stage_rows(run: Run, counts: Counts) -> list[Row]:
    rows: list[Row] = []
    before: tuple[Stage, ...] = ()
    for stage in run.recipe.stages.values():
        before = (*before, stage)
        model = run.recipe.model_of(stage.name)
        trained, total = counts.trained(before), counts.total(before)
        share = f" ({trained / total:.1%})" if trained is not None and total else ""
        own = run.resources.train.for_stage(stage.name)
        rows.append(
            (
                stage.name,
                " + ".join(_trains(part, stage.tuning) for part in stage.trainable),
                f"{_short(trained)} / {_short(total)}{share}",
                f"{_image(model)}, {model.image_tokens()} tokens",
                f"{stage.global_batch_size} x {stage.sequence_length}{' packed' if stage.pack else ''}",
                " ".join([f"{stage.learning_rate:g}", *(f"{k} {v:g}" for k, v in stage.learning_rates.items())]),
                _length(stage),
                str(own.zero_stage),
                f"{own.num_workers} x {own.micro_batch_size}",
            )
        )
    return rows


def _image(model: Model) -> str:
    """The side of an image, and what of it the tower sees where patches do not fill it."""
    seen = model.grid() * model.patch_size
    return f"{model.image_size} px" if seen == model.image_size else f"{model.image_size} px ({seen} seen)"


def _length(stage: Stage) -> str:
    if stage.num_steps is not None:
        return f"{stage.num_steps} steps"
    return "1 epoch" if stage.epochs == 1 else f"{stage.epochs:g} epochs"


def _trains(part: str, tuning: Tuning) -> str:
    if part != "language_model" or isinstance(tuning, FullTuning):
        return part
    match tuning:
        case Lora(rank=rank, quantise=quantise):
            return f"language_model (LoRA {rank}{f', {quantise}' if quantise else ''})"
        case VisualExpert():
            return "language_model (visual expert)"


def _part_rows(run: Run, counts: Counts) -> list[Row]:
    model, stages = run.recipe.model, tuple(run.recipe.stages.values())
    rows: list[Row] = [
        ("part", "parameters", "what"),
        ("language_model", _exact(counts.language_model), _named(model.language_model)),
        ("vision_tower", _exact(counts.vision_tower), _named(model.vision_tower)),
        ("projector", _exact(counts.projector), _choice(model.projector)),
        ("together", _exact(counts.total()), "without the rows that <image> and padding to 64 add to the vocabulary"),
    ]
    if any(isinstance(stage.tuning, VisualExpert) for stage in stages):
        rows.append(("visual expert", _exact(counts.expert), f"a language model of {_ratio(counts)} the parameters"))
    return rows


def _ratio(counts: Counts) -> str:
    if counts.language_model is None or counts.expert is None:
        return "about twice"
    return f"{1 + counts.expert / counts.language_model:.2f} times"


def _named(part: object) -> str:
    if isinstance(part, HubTower | HubLanguageModel):
        return f"{part.name} at {part.revision}"
    return str(getattr(part, "kind", ""))


def _choice(projector: Projector) -> str:
    """A projector's kind with its settings."""
    return " ".join(str(value) if key == "kind" else f"{key} {value}" for key, value in projector.model_dump().items())


def _exact(count: int | None) -> str:
    return UNKNOWN if count is None else f"{count:,}"


def _short(count: int | None) -> str:
    """1,234,567 as 1.235 M."""
    if count is None:
        return UNKNOWN
    for size, unit in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if count >= size:
            return f"{count / size:.4g} {unit}"
    return str(count)


def table(rows: list[Row]) -> list[str]:
    """Columns as wide as their widest cell."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
