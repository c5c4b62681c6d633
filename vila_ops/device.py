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


def precision_notes(precision: str, device: "torch.device") -> list[str]:
    """What to know about a precision on a device: bf16 on a CPU without instructions for it is slow.

    Measured with torch 2.13 on two cores with AVX2: a product of (1024, 576) and (576, 1536) takes 1.49 s of CPU in
    bf16 and 0.03 s in fp32.
    """
    import torch

    if precision != "bf16" or device.type != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return []
    return ["this CPU has no instructions for bf16, so bf16 takes some 50 times as long as fp32; set precision to fp32"]
