"""The device of a process. Light: torch is imported when a device is asked for."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # heavy
    import torch


def device_of(gpus_per_worker: int) -> "torch.device":
    """The CPU for 0, this process's current GPU for 1. Raises ValueError, with the reason, if there is no GPU."""
    import torch

    if not gpus_per_worker:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        is_cpu_build = torch.version.cuda is None and torch.version.hip is None
        why = "was built without CUDA: install a build with it" if is_cpu_build else "sees no GPU: check `nvidia-smi`"
        raise ValueError(
            f"gpus_per_worker is 1, but torch {torch.__version__} of this process {why}; or set gpus_per_worker to 0"
        )
    return torch.device("cuda", torch.cuda.current_device())
