"""What a process and a cluster compute on: one module resolves it, and what is not there is refused before any work."""

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from pydantic import ValidationError

from vila_ops import device
from vila_ops.cluster import device_among, gpu_options, take_own_gpu
from vila_ops.config import Resources
from vila_ops.device import collectives, device_of, driver_fault, kernels_fault
from vila_ops.doctor import device_findings
from vila_ops.errors import ClusterFull

ROOT = Path(__file__).parents[1]
NAMES_A_KIND = re.compile(r"""is_cuda|torch\.cuda|\.cuda\(|["']cuda["':]""")
CLUSTER = Resources(launch="ray", ray_address="head:6379")
NO_GPU = pytest.mark.skipif(torch.accelerator.is_available(), reason="is about machines without a GPU")


def test_no_other_module_names_a_kind_of_device() -> None:
    paths = [path for path in (ROOT / "vila_ops").rglob("*.py") if path != ROOT / "vila_ops" / "device.py"]
    lines = [f"{path}:{line}" for path in paths for line in path.read_text().splitlines() if NAMES_A_KIND.search(line)]
    assert len(paths) > 100
    assert not lines, "ask vila_ops.device, or compute on the device that you are given"


@pytest.mark.parametrize(
    "line", ["if x.is_cuda:", "torch.cuda.synchronize()", "x.cuda()", 'x.to("cuda")', "x.to('cuda')", 'x.to("cuda:0")']
)
def test_a_line_that_names_a_kind_of_device_is_noticed(line: str) -> None:
    assert NAMES_A_KIND.search(line)


@NO_GPU
@pytest.mark.parametrize("wanted", ["gpu", "cuda", "rocm", "xpu"])
def test_a_gpu_that_is_not_there_is_an_error_with_value_rule_and_way_out(wanted: Any) -> None:
    with pytest.raises(
        ValueError, match=rf"^device is {wanted}, but torch .* of this process .*; or set device to cpu$"
    ):
        device_of(wanted)


@NO_GPU
def test_auto_is_the_cpu_without_a_gpu() -> None:
    assert device_of("auto") == torch.device("cpu")


@pytest.mark.parametrize(
    ("driver", "built", "runs"),
    [
        ("13.0", "13.0", True),
        ("12.2", "12.8", True),
        ("13.1", "12.6", True),
        ("12.8", "13.0", False),
        ("9.2", "10.1", False),
    ],
)
def test_a_driver_runs_builds_for_its_own_major_version_and_older_ones(driver: str, built: str, runs: bool) -> None:
    """As docs.nvidia.com/deploy/cuda-compatibility says."""
    fault = driver_fault(driver, built)
    assert (fault is None) == runs
    if fault is not None:
        assert driver in fault
        assert built in fault


@NO_GPU
def test_doctor_and_tasks_tell_both_versions_of_a_driver_that_is_too_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a library that answers as a driver for CUDA 12.8, and a build of torch that calls itself one for 13.0."""
    source, library = tmp_path / "driver.cpp", tmp_path / "libcuda.so.1"
    source.write_text('extern "C" int cuDriverGetVersion(int *version) { *version = 12080; return 0; }')
    subprocess.run(["g++", "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
    monkeypatch.setattr(device, "DRIVER", str(library))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    told = r"driver is too old: it supports CUDA 12\.8, and torch .* was built for CUDA 13\.0; .*; or set device to cpu"
    with pytest.raises(ValueError, match=told):
        device_of("auto")
    (finding,) = device_findings(Resources(launch="inline"))
    assert not finding.ok
    assert re.search(told, finding.text)
    assert device_of("cpu") == torch.device("cpu")


@NO_GPU
@pytest.mark.parametrize(
    ("selected", "built", "on_cpu"), [("7", "13.0", False), ("", "13.0", True), ("-1", "13.0", True), ("7", None, True)]
)
def test_auto_is_not_the_cpu_where_the_environment_selects_a_gpu_that_is_not_there(
    selected: str, built: str | None, on_cpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in pytorch/examples#115, where a run went on on the CPU."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", selected)
    monkeypatch.setattr(torch.version, "cuda", built)
    if on_cpu:
        assert device_of("auto") == torch.device("cpu")
        return
    with pytest.raises(ValueError, match=r"^device is auto, but CUDA_VISIBLE_DEVICES=7 selects no .*; or set device"):
        device_of("auto")


@pytest.mark.parametrize(
    ("capability", "built", "runs"),
    [
        ((9, 0), ["sm_80", "sm_90"], True),
        ((8, 9), ["sm_80", "sm_86", "sm_90"], True),
        ((9, 0), ["sm_80", "compute_80"], True),
        ((9, 0), ["sm_90a"], True),
        ((10, 3), ["sm_100f"], True),
        ((12, 0), ["sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90"], False),  # pytorch#159207
        ((7, 0), ["sm_75", "sm_80"], False),
        ((10, 0), ["sm_90a", "compute_90a"], False),
        ((9, 0), ["sm_100", "compute_100"], False),
    ],
)
def test_a_build_has_kernels_for_a_gpu_by_the_rules_of_compute_capabilities(
    capability: tuple[int, int], built: list[str], runs: bool
) -> None:
    """As the CUDA C++ Programming Guide says of binary and PTX compatibility."""
    fault = kernels_fault(capability, built)
    assert (fault is None) == runs
    if fault is not None:
        assert f"compute capability is {capability[0]}.{capability[1]}: it was built for {built[0]}" in fault


UUID = "GPU-52a3a85d-3c55-ca3a-a955-82c69ed360fc"
MIG = "MIG-377e0049-554c-540b-93c6-d0976f8426cb"


@pytest.mark.parametrize(
    ("kind", "visible", "given", "chosen"),
    [
        ("xpu", 4, 2, [2]),
        ("xpu", 4, "2", [2]),
        ("xpu", 1, "2", []),
        ("cuda", 4, 2, []),
        ("cuda", 1, UUID, []),
        ("cuda", 4, MIG, []),
    ],
)
def test_a_worker_that_sees_the_gpus_of_others_computes_on_its_own(
    kind: str, visible: int, given: int | str, chosen: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a node of Intel's GPUs whose number Ray was told by hand. Ray Train chooses among CUDA's itself.

    A node whose CUDA_VISIBLE_DEVICES has UUIDs gives its workers UUIDs (ray#43314, vllm#41848).
    """
    seen: list[int] = []
    monkeypatch.setattr(ray, "get_gpu_ids", lambda: [given])
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device(kind))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: visible)
    monkeypatch.setattr(torch.accelerator, "set_device_index", seen.append)
    take_own_gpu()
    assert seen == chosen


def test_collectives_are_those_that_torch_has_for_the_device() -> None:
    for wanted, kind in (("cpu", "cpu"), ("cuda", "cuda"), ("rocm", "cuda"), ("xpu", "xpu")):
        assert collectives(wanted) == torch.distributed.get_default_backend_for_device(kind)


def test_a_device_without_a_meaning_is_refused_when_the_settings_are_read() -> None:
    with pytest.raises(ValidationError, match="device"):
        Resources.model_validate({"launch": "inline", "device": "nvidia"})
    with pytest.raises(ValidationError, match="accelerator_type has no effect with launch inline"):
        Resources(launch="inline", accelerator_type="H100")


@pytest.mark.parametrize(
    ("gpus", "wanted", "kind", "given"),
    [
        ({}, "auto", None, "cpu"),
        ({"H100": 8.0}, "auto", None, "gpu"),
        ({"H100": 8.0}, "cuda", None, "cuda"),
        ({"unnamed": 2.0}, "cuda", None, "cuda"),
        ({"A100": 8.0, "H100": 8.0}, "auto", "H100", "gpu"),
        ({"A100": 8.0, "H100": 8.0}, "cuda", "A100", "cuda"),
        ({"Intel-GPU-Max-1550": 8.0}, "auto", None, "xpu"),  # whose collectives are not NCCL
        ({"A100": 8.0, "Intel-GPU-Max-1550": 8.0}, "gpu", "Intel-GPU-Max-1550", "xpu"),
    ],
)
def test_a_cluster_is_asked_for_what_it_has(gpus: dict[str, float], wanted: Any, kind: str | None, given: str) -> None:
    resources = CLUSTER.with_changes({"accelerator_type": kind})
    assert device_among(gpus, resources, wanted, grows=False) == given
    label = {"label_selector": {"ray.io/accelerator-type": kind}} if kind else {}
    assert gpu_options(resources, given) == {"num_gpus": int(given != "cpu"), **label}


def test_mixed_kinds_of_gpus_are_refused_and_named() -> None:
    with pytest.raises(ValueError, match=r"several kinds.*: 8 of A100, 4 of H100; set accelerator_type to one"):
        device_among({"H100": 4.0, "A100": 8.0}, CLUSTER, "auto", grows=True)


@pytest.mark.parametrize(
    ("gpus", "kind", "message"),
    [
        ({}, None, "device is cuda, but the cluster at head:6379 has no GPU; add a node"),
        ({}, "H100", "device is cuda and accelerator_type H100, but the cluster at head:6379 has no GPU"),
        (
            {"A100": 8.0},
            "H100",
            "accelerator_type is H100, but the GPUs of the cluster at head:6379 are 8 of A100; add",
        ),
    ],
)
def test_a_gpu_that_no_node_has_may_join_later(gpus: dict[str, float], kind: str | None, message: str) -> None:
    with pytest.raises(ClusterFull, match=message):
        device_among(gpus, CLUSTER.with_changes({"accelerator_type": kind}), "cuda", grows=False)


@pytest.mark.parametrize(
    ("gpus", "wanted", "kind", "given"),
    [
        ({}, "cuda", None, "cuda"),
        ({}, "gpu", None, "gpu"),
        ({}, "auto", "Intel-GPU-Max-1550", "xpu"),
        ({"A100": 8.0}, "gpu", "H100", "gpu"),
        ({}, "auto", None, "cpu"),  # nothing says that it would ever have one
    ],
)
def test_a_cluster_that_may_grow_is_asked_for_what_it_has_not_yet(
    gpus: dict[str, float], wanted: Any, kind: str | None, given: str
) -> None:
    assert device_among(gpus, CLUSTER.with_changes({"accelerator_type": kind}), wanted, grows=True) == given


@pytest.mark.parametrize(
    ("labels", "gpus", "ok", "says"),
    [
        ({}, 0, False, "the cluster at head:6379 has no GPU; add a node"),
        ({}, 8, False, "8 GPUs in the cluster; the resources ask for 16$"),
        ({"ray.io/node-group": "headgroup"}, 0, True, "0 GPUs in the cluster; .* ask for 16; workers wait until an"),
        ({"ray.io/node-group": "headgroup"}, 8, True, "8 GPUs in the cluster; .* ask for 16; workers wait until an"),
        ({"ray.io/node-group": "headgroup"}, 16, True, "16 GPUs in the cluster; the resources ask for 16$"),
    ],
)
def test_gpus_that_an_autoscaler_may_add_are_no_fault(
    labels: dict[str, str], gpus: int, ok: bool, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """KubeRay's nodes have the label; its group of GPU workers in infra/kubernetes has none before a worker waits."""
    head = {"Alive": True, "Resources": {"CPU": 4.0}, "Labels": labels}
    worker = {"Alive": True, "Resources": {"GPU": float(gpus)}, "Labels": labels}
    monkeypatch.setattr("vila_ops.cluster.connect", lambda _: None)
    monkeypatch.setattr(ray, "nodes", lambda: [head, worker])
    (finding,) = device_findings(CLUSTER.with_changes({"device": "cuda", "train.num_workers": 16}))
    assert finding.ok == ok
    assert re.search(says, finding.text)
