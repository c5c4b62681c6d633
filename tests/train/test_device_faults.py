"""Errors of a device are told apart, and the next setting that saves memory is the cheapest that is left.

What the errors say of memory is in tests/fake_device.
"""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.train.test_batch_loader import make_job
from vila_ops.artifacts.store import content, read_manifest
from vila_ops.config import Resources
from vila_ops.config.resources import TrainResources
from vila_ops.device import fault_of
from vila_ops.errors import DeviceLost, is_final
from vila_ops.train import ray_workers
from vila_ops.train.curve import CURVE
from vila_ops.train.device_faults import DeviceFaults, next_setting
from vila_ops.train.ray_workers import _is_first_loss
from vila_ops.train.stage import train_stage

RAY = {"num_workers": 2}
CUDA_ADDS = (
    "\nCUDA kernel errors might be asynchronously reported at some other API call, so the stacktrace below might be "
    "incorrect.\nCompile with `TORCH_USE_CUDA_DSA` to enable device-side assertions.\n"
)
"""What torch adds to CUDA's errors; it names assertions, of whatever kind the error is."""
ECC = torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered" + CUDA_ADDS)


@pytest.mark.parametrize(
    ("error", "fault"),
    [
        (ECC, "lost"),
        (torch.AcceleratorError("HIP error: unspecified launch failure"), "lost"),
        (torch.AcceleratorError("an error of a later version of torch"), "lost"),
        (
            RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx( handle, opa, opb)`"),
            "lost",
        ),
        (RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"), "lost"),
        (RuntimeError("level_zero backend failed with error: 20 (UR_RESULT_ERROR_DEVICE_LOST)"), "lost"),
        (RuntimeError("Native API failed. Native API returns: 20 (UR_RESULT_ERROR_DEVICE_LOST)"), "lost"),
        (
            torch.distributed.DistBackendError(
                "NCCL error in: ProcessGroupNCCL.cpp:3356, unhandled cuda error\nncclUnhandledCudaError: Call to CUDA "
                "function failed.\nLast error:\nCuda failure 700 'an illegal memory access was encountered'"
            ),
            "lost",
        ),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), "memory"),
        (torch.AcceleratorError("CUDA error: out of memory" + CUDA_ADDS), "memory"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "memory"),
        (RuntimeError("level_zero backend failed with error: 39 (UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY)"), "memory"),
        (torch.AcceleratorError("CUDA error: device-side assert triggered" + CUDA_ADDS), "refused"),
        (
            torch.AcceleratorError("CUDA error: no kernel image is available for execution on the device" + CUDA_ADDS),
            "refused",
        ),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)"), None),
        (RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:4711"), None),
        (ValueError("a setting that says CUDA error"), None),
    ],
)
def test_errors_of_a_device_are_told_apart(error: Exception, fault: str | None) -> None:
    """Texts are those of public reports: pytorch#190972, ComfyUI#13210, transformers#40409, trl#4149, nccl#1410."""
    assert fault_of(error) == fault


def test_a_cpu_without_memory_is_a_device_without_memory() -> None:
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**50)
    assert fault_of(raised.value) == "memory"


def test_a_stage_says_whether_another_try_can_help(bench: Any, make_stage: Any, tmp_path: Path) -> None:
    job = make_job(bench, make_stage, tmp_path)
    lost = "lost its device: CUDA error: uncorrectable ECC error encountered; a new"
    with pytest.raises(DeviceLost, match=lost), DeviceFaults(job):
        raise ECC
    refused = "beyond a table: CUDA error: device-side assert triggered. Another"
    with pytest.raises(AssertionError, match=refused), DeviceFaults(job):
        raise torch.AcceleratorError("CUDA error: device-side assert triggered" + CUDA_ADDS)
    assert is_final(DeviceLost("in this process, which cannot use the device again"))
    with pytest.raises(RuntimeError, match="shapes"), DeviceFaults(job):
        raise RuntimeError("shapes")


def test_workers_are_replaced_once_for_lost_devices(bench: Any, make_stage: Any, tmp_path: Path) -> None:
    """Two ranks of one try may lose theirs; a rank that loses it in a later try is the second loss."""
    job = make_job(bench, make_stage, tmp_path)
    Path(job.ray_train()).mkdir(parents=True)
    assert _is_first_loss(job, before=1.0)
    assert _is_first_loss(job, before=1.0)
    (record,) = Path(job.ray_train()).iterdir()
    assert not _is_first_loss(job, before=record.stat().st_mtime + 1)


@pytest.mark.parametrize(
    ("launch", "train", "setting"),
    [
        ("inline", {"micro_batch_size": 8}, "micro_batch_size: 4"),  # 5, 6 and 7 do not divide 8
        ("inline", {}, "gradient_checkpointing: true"),
        ("inline", {"gradient_checkpointing": True}, None),
        ("ray", {**RAY, "micro_batch_size": 4}, "micro_batch_size: 2"),
        ("ray", {**RAY, "zero_stage": 2}, "zero_stage: 3"),
        ("ray", {**RAY, "zero_stage": 3}, "gradient_checkpointing: true"),
        ("ray", {**RAY, "zero_stage": 3, "gradient_checkpointing": True}, "offload: optimizer"),
        (
            "ray",
            {**RAY, "zero_stage": 3, "gradient_checkpointing": True, "offload": "optimizer"},
            "offload: parameters",
        ),
        ("ray", {**RAY, "zero_stage": 3, "gradient_checkpointing": True, "offload": "parameters"}, None),
        ("ray", {"gradient_checkpointing": True}, None),  # one worker shards nothing
    ],
)
def test_the_next_setting_is_the_cheapest_that_is_left(
    launch: Any, train: dict[str, Any], setting: str | None, make_stage: Any, make_mixture: Any
) -> None:
    address = {"ray_address": "head:6379"} if launch == "ray" else {}
    resources = Resources(launch=launch, train=TrainResources(**train), **address)
    assert next_setting(make_stage(make_mixture("pairs"), global_batch_size=8), resources) == setting


def lose_devices(losses: Path, *, most: int) -> Any:
    """What a worker of Ray Train runs: the second rank loses its device in the fourth step, `most` times at most.

    A file is written for each loss, and one with the steps of each process of that rank. At the first loss the other
    rank begins its step only after Ray Train has ended its process group. It is a function in a function so that Ray
    sends its code.
    """

    def worker(config: dict[str, str]) -> None:
        import time

        import torch

        from vila_ops.train import loop, ray_workers

        accumulate = loop.accumulate_gradients
        waited = losses.parent / "waited"

        def losing(*args: Any, step: int, **more: Any) -> None:
            if torch.distributed.get_rank() == 1:
                with (losses.parent / f"{os.getpid()}.steps").open("a") as file:
                    print(step, file=file)
                if step == 3 and len(list(losses.iterdir())) < most:
                    (losses / str(os.getpid())).touch()
                    raise torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered")
            elif step == 3 and not waited.exists():
                waited.touch()
                until = time.monotonic() + 60
                while torch.distributed.is_initialized() and time.monotonic() < until:
                    time.sleep(0.01)
            accumulate(*args, step=step, **more)

        loop.accumulate_gradients = losing
        ray_workers._worker(config)

    return worker


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize(
    "most",
    [
        1,
        pytest.param(
            9, marks=pytest.mark.skipif("VILA_KILLS_RAY" not in os.environ, reason="VILA_KILLS_RAY asks for it")
        ),
    ],
)
def test_a_stage_on_a_cluster_whose_device_is_lost_is_tried_once_more(
    most: int, ray_cluster: str, bench: Any, make_stage: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five restarts are allowed. The new workers resume from a checkpoint, and the curve is that of one process."""
    losses = tmp_path / "losses"
    losses.mkdir()
    monkeypatch.setattr(ray_workers, "_worker", lose_devices(losses, most=most))
    settings = {"num_steps": 6, "save_every": 1, "validate_every": 6, "trainable": ["projector", "language_model"]}
    stage = make_stage(bench.mixture, **settings)
    inputs = stage, bench.model, bench.data, bench.init
    train = {"num_workers": 2, "zero_stage": 0, "max_failures": 5}
    alone = bench.resources.with_changes({"storage.store": str(tmp_path / "alone")})
    cluster = {"launch": "ray", "ray_address": ray_cluster, "storage.store": str(tmp_path / "store")}
    resources = bench.resources.with_changes({**cluster, **{f"train.{key}": value for key, value in train.items()}})
    if most > 1:
        with pytest.raises(DeviceLost, match="stage 'align' lost its device: CUDA error: uncorrectable ECC error"):
            train_stage(*inputs, resources)
        assert len(list(losses.iterdir())) == 2
        return
    made = train_stage(*inputs, resources)
    (lost,) = (int(path.name) for path in losses.iterdir())
    pids = {worker["pid"] for worker in read_manifest(made.uri)["execution"]["workers"]}
    assert len(pids) == 2
    assert lost not in pids
    steps = {path.stem: path.read_text().split() for path in tmp_path.glob("*.steps")}
    assert steps.pop(str(lost)) == ["0", "1", "2", "3"]
    (resumed,) = steps.values()
    assert resumed in (["2", "3", "4", "5"], ["3", "4", "5"]), "a save waits for the one before, and not for itself"
    assert losses_of(made) == pytest.approx(losses_of(train_stage(*inputs, alone)), rel=1e-6, abs=1e-6)


def losses_of(checkpoint: Any) -> list[float]:
    curve = json.loads((content(checkpoint) / CURVE).read_text())
    return [float.fromhex(row["loss"]) for row in curve if "loss" in row]
