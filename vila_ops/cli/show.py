"""A resolved run as a table: what each stage trains, on what, and how fast. Reads the config alone."""

from vila_ops.cli.tables import Row, table
from vila_ops.config import Model, Run, Stage
from vila_ops.config.train import FullTuning, Lora, Tuning, VisualExpert

_HEADER = ("stage", "trains", "image", "batch x length", "rate", "for", "ZeRO", "workers x micro-batch")


def summary(run: Run) -> list[str]:
    """The recipe's name and fingerprint, and the table of its stages."""
    return [
        f"recipe {run.recipe.name}, fingerprint {run.recipe.fingerprint()}",
        "",
        *table([_HEADER, *(_stage_row(run, stage) for stage in run.recipe.stages.values())]),
    ]


def _stage_row(run: Run, stage: Stage) -> Row:
    model, train = run.recipe.model_of(stage.name), run.resources.train.for_stage(stage.name)
    return (
        stage.name,
        " + ".join(_trains(part, stage.tuning) for part in stage.trainable),
        f"{_image(model)}, {model.image_tokens()} tokens",
        f"{stage.global_batch_size} x {stage.sequence_length}{' packed' if stage.pack else ''}",
        " ".join([f"{stage.learning_rate:g}", *(f"{k} {v:g}" for k, v in stage.learning_rates.items())]),
        _length(stage),
        str(train.zero_stage),
        f"{train.num_workers} x {train.micro_batch_size}",
    )


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
