"""The device of a process, resolved here alone. Light: torch is imported when a device is asked for.

No other module names a kind of device or of its library; the others compute on the `torch.device` that they are given.
"""

import ctypes
import os
import re
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:  # heavy
    import torch

Device = Literal["auto", "cpu", "gpu", "cuda", "rocm", "xpu"]
"""auto: the accelerator that torch finds, else the CPU. gpu: whatever accelerator torch finds. cuda: an NVIDIA GPU.
rocm: an AMD GPU. xpu: an Intel GPU. All but auto and cpu are an error where they are absent."""
DRIVER = "libcuda.so.1"
"""NVIDIA's driver."""
ARCHITECTURE = re.compile(r"(sm|compute)_(\d+)([af]?)")
Fault = Literal["memory", "refused", "lost"]
"""What an error says of a device: too little memory, a kernel that cannot run or refused a value, or a lost device."""
FAULTS: dict[Fault, tuple[str, ...]] = {
    "memory": ("out of memory", "can't allocate memory", "STATUS_ALLOC_FAILED", "OUT_OF_DEVICE_MEMORY"),
    "refused": ("device-side assert triggered", "no kernel image"),
    "lost": (
        "CUDA error", "CUDA driver error", "HIP error", "CUBLAS_STATUS", "HIPBLAS_STATUS", "cuDNN error",
        "miopenStatus", "Cuda failure", "DEVICE_LOST",
    ),
}  # fmt: skip
"""Words of errors for which torch 2.13 has no class of its own: of the CPU's allocator, of the libraries of NVIDIA and
AMD (CUDA's and HIP's own errors are torch.AcceleratorError), of NCCL, and of Intel's Level Zero. The first kind with a
word of the text counts."""


def device_of(wanted: Device) -> "torch.device":
    """The device of this process. Raises ValueError, with the reason, for one that is not there or cannot be used."""
    import torch

    if wanted == "cpu":
        return torch.device("cpu")
    there = torch.accelerator.current_accelerator(check_available=True)
    if there is None or there.type == "mps":  # which has no float64, in which losses are summed
        fault = driver_fault() or selection_fault()
        if wanted == "auto" and fault is None:
            return torch.device("cpu")
        raise ValueError(f"device is {wanted}, but {fault or _absent()}; or set device to cpu")
    if wanted not in ("auto", "gpu", kind := kind_of(there)):
        raise ValueError(
            f"device is {wanted}, but torch {torch.__version__} of this process computes on {kind}; set device to "
            f"{kind}, auto or cpu, or install a build of torch for {wanted}"
        )
    if kind == "cuda" and (fault := kernels_fault(torch.cuda.get_device_capability(), torch.cuda.get_arch_list())):
        raise ValueError(f"device is {wanted}, but {fault}; or set device to cpu")
    return torch.device(there.type, torch.accelerator.current_device_index())


def choose(name: str) -> None:
    """Compute on the accelerator with this name from now on, if this process sees several and none was chosen for it.

    Ray hides the GPUs of other workers from a process, and Ray Train chooses among CUDA's. For Intel's it does neither
    where it was told their number by hand. There the name is a number; the name of a CUDA GPU may be a UUID.
    """
    import torch

    there = torch.accelerator.current_accelerator(check_available=True)
    if there is not None and there.type != "cuda" and torch.accelerator.device_count() > 1:
        torch.accelerator.set_device_index(int(name))


def fault_of(error: Exception) -> Fault | None:
    """What an error that a computation raised says of the device; None for any other error."""
    import torch

    if isinstance(error, torch.OutOfMemoryError):
        return "memory"
    if not isinstance(error, RuntimeError):
        return None
    kinds = (kind for kind, words in FAULTS.items() if any(word in str(error) for word in words))
    return next(kinds, "lost" if isinstance(error, torch.AcceleratorError) else None)


def kind_of(device: "torch.device") -> str:
    """The kind of a device by its vendor's library. torch calls AMD's devices cuda too."""
    import torch

    return "rocm" if device.type == "cuda" and torch.version.hip else device.type


def describe(device: "torch.device") -> str:
    """A device with its name and library, such as `cuda:0, NVIDIA H100 80GB HBM3, CUDA 13.0`; `cpu` for the CPU."""
    import torch

    if device.type != "cuda":
        return str(device)
    library = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
    return f"{kind_of(device)}:{device.index}, {torch.cuda.get_device_name(device)}, {library}"


def nvml_uuid(device: "torch.device") -> str | None:
    """The UUID by which NVML knows an NVIDIA GPU; None for any other device."""
    import torch

    return f"GPU-{torch.cuda.get_device_properties(device).uuid}" if kind_of(device) == "cuda" else None


def on_accelerator(tensor: "torch.Tensor") -> bool:
    """Whether a tensor is in an accelerator's memory: the host reads it by a copy, which pinned memory speeds up."""
    return tensor.device.type != "cpu"


def has_gpu_kernels(device: "torch.device") -> bool:
    """Whether FlashAttention, FlexAttention's backward pass and Liger's kernels run on a device: NVIDIA's and AMD's."""
    return device.type == "cuda"


def has_streams(device: "torch.device") -> bool:
    """Whether copies between pinned memory and a device run on streams of their own."""
    return device.type != "cpu"


def device_named(name: str) -> Device:
    """The device of GPUs that Ray names so. It names Intel's like `Intel-GPU-Max-1550`; gpu: any other."""
    return "xpu" if name.startswith("Intel-GPU") else "gpu"


def collectives(wanted: Device) -> str:
    """The backend of torch.distributed for workers on a device. RCCL, of ROCm, goes by the name of NCCL."""
    return {"cpu": "gloo", "xpu": "xccl"}.get(wanted, "nccl")


def peak_bytes(device: "torch.device") -> int:
    """The most memory of an accelerator that tensors of this process had at once; it does not wait for the device."""
    import torch

    return torch.accelerator.max_memory_allocated(device)


def reset_peak_bytes(device: "torch.device") -> None:
    """Count `peak_bytes` from now on. Nothing on the CPU."""
    import torch

    if device.type != "cpu":
        torch.accelerator.reset_peak_memory_stats(device)


def free_bytes(device: "torch.device") -> int:
    """Memory of a device that is free; on the CPU what can be had without swapping."""
    import psutil
    import torch

    if device.type == "cpu":
        return int(psutil.virtual_memory().available)
    return int(torch.accelerator.get_memory_info(device)[0])


def precision_notes(precision: str, device: "torch.device") -> list[str]:
    """What to know about a precision on a device: bf16 on a CPU without instructions for it is slow.

    Measured with torch 2.13 on two cores with AVX2: a product of (1024, 576) and (576, 1536) takes 1.49 s of CPU in
    bf16 and 0.03 s in fp32.
    """
    import torch

    if precision != "bf16" or device.type != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return []
    return ["this CPU has no instructions for bf16, so bf16 takes some 50 times as long as fp32; set precision to fp32"]


def driver_fault(driver: str | None = None, built: str | None = None) -> str | None:
    """Why the NVIDIA driver cannot run torch's build, with both versions; None if it can, or if either is absent.

    `driver` is the newest CUDA that the driver supports and `built` the one that torch was built for; by default they
    are read from this machine. A driver runs builds for its own major version and for those before it (CUDA
    Compatibility, "Minor Version Compatibility", docs.nvidia.com/deploy/cuda-compatibility).
    """
    import torch

    driver, built = driver or _driver_version(), built or torch.version.cuda
    if driver is None or built is None or _major(driver) >= _major(built):
        return None
    return (
        f"the NVIDIA driver is too old: it supports CUDA {driver}, and torch {torch.__version__} was built for CUDA "
        f"{built}; install a newer driver, or a build of torch for CUDA {_major(driver)}"
    )


def kernels_fault(capability: tuple[int, int], built: list[str]) -> str | None:
    """Why torch's kernels cannot run on an NVIDIA GPU of this compute capability; None if they can.

    `built` are the architectures that torch was built for. sm_XY runs where the major version is X and the minor one at
    least Y, compute_XY everywhere from X.Y on, and both with an `a` on X.Y alone (CUDA C++ Programming Guide, "Compute
    Capability", docs.nvidia.com/cuda).
    """
    import torch

    major, minor = capability
    for kind, numbers, feature in (match.groups() for name in built if (match := ARCHITECTURE.fullmatch(name))):
        least = divmod(int(numbers), 10)
        reaches = least <= capability if kind == "compute" and not feature else least[0] == major and least[1] <= minor
        if reaches and (feature != "a" or least == capability):
            return None
    return (
        f"torch {torch.__version__} has no kernels for this GPU, whose compute capability is {major}.{minor}: it was "
        f"built for {', '.join(built)}; install a build of torch for it"
    )


def selection_fault() -> str | None:
    """Why no GPU of this machine was selected, though the environment selects some for torch's build; else None."""
    import torch

    selected = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    if torch.version.cuda is None or selected.startswith(("-", "NoDevFiles")) or not selected.strip():
        return None  # no GPU is meant: Ray sets it so for workers on the CPU
    return f"CUDA_VISIBLE_DEVICES={selected} selects no GPU that torch {torch.__version__} sees: check `nvidia-smi -L`"


def _absent() -> str:
    import torch

    what = f"torch {torch.__version__} of this process"
    if torch.version.cuda:
        return f"{what} was built for CUDA {torch.version.cuda} and sees no GPU: check `nvidia-smi`"
    if torch.version.hip:
        return f"{what} was built for ROCm {torch.version.hip} and sees no GPU: check `rocm-smi`"
    return f"{what} was built for the CPU alone: install a build with CUDA or ROCm"


def _driver_version() -> str | None:
    """The newest CUDA that the driver of this machine supports; None without NVIDIA's driver."""
    number = ctypes.c_int()
    try:
        if ctypes.CDLL(DRIVER).cuDriverGetVersion(ctypes.byref(number)):
            return None
    except (OSError, AttributeError):
        return None
    return f"{number.value // 1000}.{number.value % 1000 // 10}"


def _major(version: str) -> int:
    return int(version.partition(".")[0])
