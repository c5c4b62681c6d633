"""What every inline path computes on a device with the rules of a GPU is what it computes on the CPU.

Run by `test_inline_paths.py` in a process of its own, as torch has one such device a process.
"""

import gc
import itertools
import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient
from typer.testing import CliRunner

from tests.fake_device import device as fake
from tests.train.closeness import ROUNDING, apart
from tests.train.conftest import Bench, bench  # noqa: F401
from vila_ops.artifacts.kinds import Checkpoint, ModelVersion
from vila_ops.artifacts.store import content, read_manifest
from vila_ops.cli import app
from vila_ops.config import Resources, Run, Service, load
from vila_ops.data.preprocess.prepare import prepare
from vila_ops.device import device_of
from vila_ops.doctor import device_findings
from vila_ops.errors import DeviceLost, NonFiniteLoss, OutOfMemory, is_final
from vila_ops.eval.evaluate import evaluate
from vila_ops.eval.report import read_report
from vila_ops.generate.torch_engine import loaded_model
from vila_ops.generate.torch_engine.kv_cache import KVCache
from vila_ops.generate.torch_engine.scheduler import Scheduler
from vila_ops.model import folder as model_folder
from vila_ops.model.assemble import assemble
from vila_ops.model.copies import Copies
from vila_ops.serve.app.load import load_app
from vila_ops.serve.spec import Spec
from vila_ops.train import loop
from vila_ops.train.batch_builder import BatchBuilder
from vila_ops.train.checkpoint.rank_file import StagingBuffers
from vila_ops.train.metrics import MetricsLogger
from vila_ops.train.optim import lr_multiplier
from vila_ops.train.stage import train_stage

ROOT = Path(__file__).parents[2]
SIDE = 70  # 5 x 5 patches, which neither 2 nor 3 divides
TOLERANCE = 1e-5
RATE = 1e-3
"""Learning rate of a stage."""
KEY_BIAS = re.compile(r"(k_proj|key)\.bias$")
"""The gradient of a key's bias is 0 but for rounding, which decides Adam's update."""
WHOLE = ["vision_tower", "projector", "language_model"]
TWO = ["projector", "language_model"]
CASES = {
    "linear, clip": ({"projector": {"kind": "linear"}}, {}, {}),
    "mlp, siglip, all parts, recomputed": (
        {"projector": {"kind": "mlp_gelu", "depth": 3}, "vision_tower": {"kind": "random", "architecture": "siglip"}},
        {"trainable": WHOLE, "global_batch_size": 4},
        {"train.gradient_checkpointing": True, "train.micro_batch_size": 2},
    ),
    "transformer, dinov2, lora": (
        {
            "projector": {"kind": "transformer", "num_layers": 2, "num_heads": 4},
            "vision_tower": {"kind": "random", "architecture": "dinov2"},
        },
        {"trainable": TWO, "tuning": {"kind": "lora", "rank": 4, "alpha": 8.0, "dropout": 0.1}},
        {},
    ),
    "downsample, internvit, expert": (
        {
            "projector": {"kind": "mlp_downsample", "depth": 2, "factor": 2},
            "vision_tower": {"kind": "random", "architecture": "internvit"},
        },
        {"trainable": TWO, "tuning": {"kind": "visual_expert"}, "pack": False},
        {"train.optimizer": "torch"},
    ),
}
"""Changes of model, stage and resources. Together they have every kind of projector, tower and tuning."""


@pytest.fixture(scope="module", autouse=True)
def _device() -> None:
    fake.install()


@pytest.fixture
def on(bench: Bench, tmp_path: Path) -> Callable[..., Resources]:  # noqa: F811
    """Resources of a device with a store of its own, since the device enters no address."""

    def resources(device: str, **more: Any) -> Resources:
        return bench.resources.with_changes({"device": device, "storage.store": str(tmp_path / device), **more})

    return resources


@pytest.fixture
def train(bench: Bench, make_model: Any, make_stage: Any) -> Callable[..., Checkpoint]:  # noqa: F811
    """Train two steps of a case. Data and initial model are shared; the resources' store gets the checkpoint alone."""

    def run(resources: Resources, model: Any, stage: Any) -> Checkpoint:
        made = make_model(image_size=SIDE)
        made = made.model_validate({**made.model_dump(), **model})
        changed = make_stage(
            bench.mixture, **{"num_steps": 2, "validate_every": 1, "validation_rows": 1, "learning_rate": RATE, **stage}
        )
        data = prepare(bench.mixture, made.text(max_tokens=128), bench.resources)
        return train_stage(changed, made, data, assemble(made, bench.resources), resources)

    return run


def curve(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    """The losses of a stage."""
    rows = json.loads((content(checkpoint) / loop.CURVE).read_text())
    return [
        {key: float.fromhex(value) if isinstance(value, str) else value for key, value in row.items()} for row in rows
    ]


def assert_same(one: Checkpoint, two: Checkpoint) -> None:
    """Both have the same curve and the same weights, up to rounding."""
    for first, second in zip(curve(one), curve(two), strict=True):
        assert first == pytest.approx(second, rel=TOLERANCE)
    states = [
        {name: one for name, one in model_folder.load(content(each)).state_dict().items() if not KEY_BIAS.search(name)}
        for each in (one, two)
    ]
    assert apart(states[0], states[1], way=2 * RATE) <= ROUNDING


def test_the_device_is_found_and_named(on: Any) -> None:
    assert device_of("auto") == device_of("gpu") == torch.device(fake.NAME, 0)
    assert device_of("cpu") == torch.device("cpu")
    with pytest.raises(
        ValueError, match=rf"device is cuda, but torch .* computes on {fake.NAME}; set device to {fake.NAME}"
    ):
        device_of("cuda")
    assert [one.text for one in device_findings(on("gpu"))] == [f"device gpu: {fake.NAME}:0"]


@pytest.mark.parametrize("case", CASES)
def test_a_stage_trains_and_validates_on_the_device_as_on_the_cpu(case: str, on: Any, train: Any) -> None:
    model, stage, resources = CASES[case]
    there, here = (train(on(device, **resources), model, stage) for device in ("gpu", "cpu"))
    assert_same(there, here)
    assert read_manifest(there.uri)["execution"]["workers"][0]["device"] == f"{fake.NAME}:0"
    assert read_manifest(here.uri)["execution"]["workers"][0]["device"] == "cpu"


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[Counter[str]]]:
    """Returns what the host waited for in each step since the last call.

    A step that computes features of new images copies their pixels to the device, and is left out.
    """
    seen: list[Counter[str]] = []
    log_step = MetricsLogger.log_step

    def logged(self: MetricsLogger, *args: Any, **kwargs: Any) -> None:
        seen.append(fake.counted.waits.copy())
        log_step(self, *args, **kwargs)

    def usual() -> list[Counter[str]]:
        steps = [after - before for before, after in itertools.pairwise(seen)]
        seen.clear()
        return [one for one in steps if not one["host to device"]]

    monkeypatch.setattr(MetricsLogger, "log_step", logged)
    return usual


@pytest.mark.parametrize("case", CASES)
def test_a_step_makes_the_host_wait_for_the_device_once(case: str, on: Any, train: Any, waits: Any) -> None:
    """For losses and gradient norm, after the update; before it too if AdamW has no kernel that skips the update."""
    model, stage, resources = CASES[case]
    train(on("gpu", **resources), model, {**stage, "num_steps": 5, "validate_every": 5, "save_every": 5})
    usual = waits()
    assert usual
    assert {one.total() for one in usual} == {2 if resources.get("train.optimizer") == "torch" else 1}, usual


@pytest.mark.parametrize(("optimizer", "times"), [("fused", 1), ("torch", 2)])
def test_a_step_after_a_resume_makes_the_host_wait_no_more_often(
    optimizer: str, times: int, on: Any, train: Any, waits: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in Lightning#19955, where AdamW's restored count of steps was on the device and each parameter waited for it.

    With the fused kernel it has to be there (pytorch#104767).
    """
    model, stage = CASES["linear, clip"][0], {"num_steps": 6, "validate_every": 6}
    resources = on("gpu", **{"train.optimizer": optimizer})
    with monkeypatch.context() as patched:
        patched.setattr(loop, "lr_multiplier", lost_in_the_third_step)
        with pytest.raises(DeviceLost):
            train(resources, model, {**stage, "save_every": 2})
    waits()
    train(resources, model, {**stage, "save_every": 6})
    usual = waits()
    assert {one.total() for one in usual} == {times}, usual


def lost_in_the_third_step(step: int, *args: Any, **kwargs: Any) -> float:
    if step == 2:
        lost_device()
    return lr_multiplier(step, *args, **kwargs)


def test_a_stage_resumes_on_the_device_from_its_checkpoint(
    on: Any, train: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model, stage = CASES["linear, clip"][0], {"trainable": TWO, "num_steps": 3, "save_every": 1}
    unbroken = train(on("gpu"), model, stage)
    resources = on("gpu", **{"storage.store": f"{on('gpu').storage.store}-broken"})
    with monkeypatch.context() as patched:
        patched.setattr(loop, "save_model", lost_device)
        with pytest.raises(DeviceLost, match="stage 'align' lost its device: CUDA error: device lost; a new process"):
            train(resources, model, stage)
    with caplog.at_level("INFO"):
        resumed = train(resources, model, stage)
    assert "resuming after step 2" in caplog.text
    assert curve(resumed) == curve(unbroken)
    assert resumed.digest == unbroken.digest


def lost_device(*_: Any) -> None:
    raise torch.AcceleratorError("CUDA error: device lost\nCompile with TORCH_USE_CUDA_DSA to enable more.")


def test_too_little_memory_is_told_with_stage_micro_batch_forecast_and_the_next_setting(on: Any, train: Any) -> None:
    model, stage = CASES["linear, clip"][0], {"trainable": WHOLE, "num_steps": 1}
    gc.collect()
    train(on("gpu"), model, stage)
    enough = fake.counted.bytes_peak
    for settings, way in (
        ({"train.micro_batch_size": 2}, "micro_batch_size: 1"),
        ({}, "gradient_checkpointing: true"),
    ):
        resources = on("gpu", **settings, **{"storage.store": f"{on('gpu').storage.store}-small"})
        gc.collect()
        with fake.limited(enough * 9 // 10), pytest.raises(OutOfMemory) as raised:
            train(resources, model, stage)
        assert is_final(raised.value)
        size = settings.get("train.micro_batch_size", 1)
        told = str(raised.value)
        assert f"stage 'align': the device has too little memory for micro-batches of {size} (Tried to" in told
        assert re.search(r"`vila-ops plan` forecasts 0\.\d+ GiB", told)
        assert f"next to try, in resources.train.stages.align: {way}, or a device" in told


class Loaded(Exception):
    """The engine of a stage was built; nothing was trained."""


def test_a_model_is_never_whole_in_fp32_on_the_device_while_it_loads(
    on: Any, train: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bf16 the device holds all parameters in two bytes, and in four those that train. The tower is there before."""
    build = loop.build_engine

    def built(objective: Any, *args: Any) -> Any:
        before = fake.counted.bytes_peak = fake.counted.bytes_now
        build(objective, *args)
        moved = [one for name, one in objective.named_parameters() if "vision_tower" not in name]
        numbers = sum(one.numel() for one in moved)
        raise Loaded(fake.counted.bytes_peak - before, numbers, sum(one.numel() for one in moved if one.requires_grad))

    monkeypatch.setattr(loop, "build_engine", built)
    with pytest.raises(Loaded) as raised:
        train(on("gpu"), CASES["linear, clip"][0], {"precision": "bf16"})
    peak, numbers, trained = raised.value.args
    assert trained < numbers / 10
    assert 2 * numbers + 4 * trained <= peak < 2 * numbers + 4 * trained + 10_000, "buffers stay in fp32"


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The tiny recipe, run from the repository's root."""
    folder = tmp_path_factory.mktemp("tiny")
    where = (f"resources.storage.store={folder}/store", f"resources.storage.cache={folder}/cache")
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(ROOT)
        return load(Path("configs/recipes/tiny.yaml"), resources=Path("configs/resources/inline.yaml"), overrides=where)


def test_every_benchmark_measures_the_same_on_the_device(
    tiny_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    shared = tiny_run.resources
    suite = tiny_run.recipe.final_suite.with_changes({"max_objects": 6, "max_words": 6, "bootstrap_resamples": 20})
    data = prepare(suite.mixture, tiny_run.recipe.text(max_tokens=suite.max_tokens), shared)
    model = assemble(tiny_run.recipe.model, shared)
    numbers = []
    for device in ("gpu", "cpu"):
        resources = shared.with_changes({"device": device, "storage.store": str(tmp_path / device)})
        report = read_report(evaluate(suite, model, data, resources))
        numbers.append([one.value for one in (*report.metrics, *report.layers)])
        assert len(report.benchmarks) == len(suite.benchmarks)
    assert len(numbers[0]) > 20
    assert np.allclose(numbers[0], numbers[1], rtol=1e-4, atol=1e-4)


@pytest.fixture
def version(bench: Bench) -> ModelVersion:  # noqa: F811
    """The assembled model as a registered version."""
    model = bench.init
    checkpoint = Checkpoint(uri=model.uri, digest=model.digest, parents=model.parents, stage="sft", step=1)
    return ModelVersion(name="tiny-vila", version=1, checkpoint=checkpoint, promoted=True)


def answer_of(version: ModelVersion, resources: Resources) -> tuple[str, str]:
    """What the app says to a question, and the device that it names."""
    spec = Spec.of(Service(name="tiny"), version, resources)
    request = {"model": version.name, "messages": [{"role": "user", "content": "What is this?"}], "max_tokens": 8}
    with TestClient(load_app(spec, spec.device, replica={}), base_url="http://localhost") as client:
        answer = client.post("/v1/chat/completions", json=request).raise_for_status().json()
        device = client.get("/health").json()["replica"]["device"]
    return answer["choices"][0]["message"]["content"], device


def test_a_service_and_the_command_answer_on_the_device_as_on_the_cpu(
    version: ModelVersion, on: Any, tiny: Path
) -> None:
    there, here = answer_of(version, on("gpu")), answer_of(version, on("cpu"))
    assert there == (here[0], f"{fake.NAME}:0")
    assert here[1] == answer_of(version, on("gpu", **{"serve.device": "cpu"}))[1] == "cpu"
    image = sorted((tiny / "pairs").glob("*.png"))[0]
    words = ["generate", version.checkpoint.uri, "What is this?", "--image", str(image), "--max-new-tokens", "8"]
    said = [CliRunner().invoke(app, [*words, "--device", device, "--threads", "1"]) for device in ("gpu", "cpu")]
    assert [one.exit_code for one in said] == [0, 0]
    assert said[0].stdout == said[1].stdout


def labels_on_the_host(patched: pytest.MonkeyPatch) -> None:
    batch_of = BatchBuilder.on_device

    def call(self: BatchBuilder, *args: Any, **kwargs: Any) -> Any:
        batch = batch_of(self, *args, **kwargs)
        object.__setattr__(batch, "labels", batch.labels.cpu())
        return batch

    patched.setattr(BatchBuilder, "on_device", call)


def batch_used_before_it_was_copied(patched: pytest.MonkeyPatch) -> None:
    patched.setattr(Copies, "arrived", lambda self, tensor: tensor)


def state_read_before_it_was_copied(patched: pytest.MonkeyPatch) -> None:
    patched.setattr(fake.Stream, "synchronize", lambda self: None)


def state_left_on_the_device(patched: pytest.MonkeyPatch) -> None:
    patched.setattr(StagingBuffers, "copy_all", lambda self, tensors, *, since: dict(tensors))


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (labels_on_the_host, "Expected all tensors to be on the same device"),
        (batch_used_before_it_was_copied, "a stream uses a tensor before it waited for the copy"),
        (state_left_on_the_device, "can't convert fake device type tensor to numpy"),
    ],
    ids=lambda one: getattr(one, "__name__", ""),
)
def test_a_mistake_in_training_is_noticed(mistake: Any, message: str, on: Any, train: Any) -> None:
    with pytest.MonkeyPatch.context() as patched:
        mistake(patched)
        with pytest.raises((RuntimeError, TypeError), match=message):
            train(on("gpu"), {}, {"trainable": TWO, "save_every": 1})


def test_a_checkpoint_that_is_written_before_its_copy_was_made_is_noticed(
    on: Any, train: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage, resources = {"trainable": TWO, "save_every": 1}, on("gpu")
    with monkeypatch.context() as patched:
        state_read_before_it_was_copied(patched)
        patched.setattr(loop, "save_model", lost_device)
        with pytest.raises(DeviceLost):
            train(resources, {}, stage)
    with pytest.raises(NonFiniteLoss):
        train(resources, {}, stage)


def cache_on_the_host(patched: pytest.MonkeyPatch) -> None:
    made = KVCache.__init__
    patched.setattr(KVCache, "__init__", lambda self, **kwargs: made(self, **{**kwargs, "device": torch.device("cpu")}))


def index_on_the_host(patched: pytest.MonkeyPatch) -> None:
    choose = Scheduler._choose
    patched.setattr(
        Scheduler, "_choose", lambda self, hidden, states: choose(self, hidden[torch.arange(len(hidden))], states)
    )


def model_on_the_host(patched: pytest.MonkeyPatch) -> None:
    read = loaded_model.model_folder.load
    patched.setattr(loaded_model.model_folder, "load", lambda folder: _immovable(read(folder)))


def _immovable(model: Any) -> Any:
    model.to = lambda *_: model
    return model


@pytest.mark.parametrize(
    "mistake", [cache_on_the_host, index_on_the_host, model_on_the_host], ids=lambda one: one.__name__
)
def test_a_mistake_in_decoding_is_noticed(mistake: Any, version: ModelVersion, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patched:
        mistake(patched)
        said = CliRunner().invoke(
            app, ["generate", version.checkpoint.uri, "Hello?", "--device", "gpu", "--threads", "1"]
        )
    assert "Expected all tensors to be on the same device" in str(said.exception)
