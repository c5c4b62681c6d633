"""What a stage says when its device runs out of memory or is lost."""

from typing import Self

from vila_ops.config import Resources, Stage
from vila_ops.config.resources import LEAST_ZERO
from vila_ops.device import fault_of
from vila_ops.errors import DeviceLost, OutOfMemory
from vila_ops.model.trainable import component_of
from vila_ops.model.vila import VilaForConditionalGeneration
from vila_ops.plan import lengths
from vila_ops.plan.memory import GIB, MicroBatch, Weights, memory
from vila_ops.plan.shapes import shapes_of
from vila_ops.train.job import TrainJob


class DeviceFaults:
    """A context that raises OutOfMemory, DeviceLost or AssertionError for torch's errors about the device."""

    def __init__(self, job: TrainJob) -> None:
        self.job = job
        self.model: VilaForConditionalGeneration | None = None
        """The model of the stage, once it is loaded."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if not isinstance(error, Exception):
            return
        name = f"stage {self.job.stage.name!r}"
        match fault_of(error):
            case "memory":
                raise OutOfMemory(_too_little(self.job, self.model, error)) from error
            case "refused":
                raise AssertionError(
                    f"{name}: a kernel cannot run on the device, or refused a value such as an index beyond a table: "
                    f"{_first_line(error)}. Another try would end the same; with device cpu, the error names the cause"
                ) from error
            case "lost":
                raise DeviceLost(
                    f"{name} lost its device: {_first_line(error)}; a new process resumes from the newest checkpoint. "
                    f"If it happens again, the driver's log has the fault (`dmesg`, `nvidia-smi -q`)"
                ) from error


def next_setting(stage: Stage, resources: Resources) -> str | None:
    """The cheapest setting that is left to save memory, as `key: value`; None if all are used.

    A smaller micro-batch costs least, then a shard of the state, recomputation, and state in the host's memory.
    """
    train, is_inline = resources.train, resources.launch == "inline"
    smaller = [
        size for size in range(1, train.micro_batch_size) if stage.global_batch_size % (size * train.num_workers) == 0
    ]
    if smaller:
        return f"micro_batch_size: {smaller[-1]}"
    if not is_inline and train.num_workers > 1 and train.zero_stage < 3:
        return f"zero_stage: {train.zero_stage + 1}"
    if not train.gradient_checkpointing:
        return "gradient_checkpointing: true"
    more = tuple(LEAST_ZERO)[tuple(LEAST_ZERO).index(train.offload) + 1 :]
    possible = [offload for offload in more if not is_inline and train.zero_stage >= LEAST_ZERO[offload]]
    return f"offload: {possible[0]}" if possible else None


def _too_little(job: TrainJob, model: VilaForConditionalGeneration | None, error: Exception) -> str:
    stage, size = job.stage, job.resources.train.micro_batch_size
    if model is None:
        return (
            f"stage {stage.name!r}: the device has too little memory for the model alone, before any micro-batch "
            f"({_first_line(error)}); use a device with more memory, or tuning lora with quantise"
        )
    setting = next_setting(stage, job.resources)
    way = f"next to try, in resources.train.stages.{stage.name}: {setting}" if setting else "no setting is left to try"
    return (
        f"stage {stage.name!r}: the device has too little memory for micro-batches of {size} ({_first_line(error)}); "
        f"`vila-ops plan` forecasts {_forecast_gib(job, model):.3g} GiB; {way}, or a device with more memory"
    )


def _forecast_gib(job: TrainJob, model: VilaForConditionalGeneration) -> float:
    """What `vila-ops plan` says of this stage."""
    stage, size = job.stage, job.resources.train.micro_batch_size
    most = stage.sequence_length // model.config.image_seq_length
    epoch = lengths.prepared(job.data, stage.mixture)
    rows = lengths.rows_of(epoch, stage, micro_batch_size=size, most_images=most)
    largest = MicroBatch(size, rows.longest, size * rows.most_images)
    return memory(shapes_of(model.config), _weights(model), stage, job.resources, largest).total / GIB


def _weights(model: VilaForConditionalGeneration) -> Weights:
    numbers = {"trained": 0, "frozen_decoder": 0, "frozen_rest": 0}
    for name, parameter in model.named_parameters():
        decoder = component_of(name) == "language_model"
        state = "trained" if parameter.requires_grad else "frozen_decoder" if decoder else "frozen_rest"
        numbers[state] += getattr(parameter, "ds_numel", parameter.numel())  # ZeRO-3 leaves an empty tensor
    return Weights(**numbers)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".")
