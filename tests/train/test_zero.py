"""DeepSpeed's ZeRO stages walk the curve of plain torch, and go on from each other's checkpoints."""

import functools
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from vila_ops.artifacts.store import content
from vila_ops.config import Resources, Run, Stage, load
from vila_ops.data.prepare import prepare
from vila_ops.model.assemble import assemble
from vila_ops.train.job import Job, Place
from vila_ops.train.loop import train

ROOT = Path(__file__).parents[2]
RECIPE, INLINE = ROOT / "configs/recipes/tiny.yaml", ROOT / "configs/resources/inline.yaml"
RAY = {"launch": "ray", "ray_address": "127.0.0.1:1"}
"""Of several workers; the test starts them itself."""
ENV = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    store = tmp_path_factory.mktemp("zero")
    where = (f"resources.store={store}/store", f"resources.cache={store}/cache", "resources.threads_per_worker=1")
    return load(RECIPE, resources=INLINE, overrides=where)


@pytest.fixture(scope="module")
def plain(run: Run) -> Path:
    """The stage `pretrain` in one process with plain torch."""
    return _train_inline(run)


@pytest.fixture(scope="module")
def trained(run: Run) -> Callable[[int, int], Path]:
    """The same stage with a ZeRO stage and a world size, trained once."""

    @functools.cache
    def attempt(zero_stage: int, world_size: int) -> Path:
        empty = f"{run.resources.store}/features-{zero_stage}-{world_size}"  # so that the ranks run the tower
        resources = {**RAY, "num_workers": world_size, "zero_stage": zero_stage, "store": empty}
        job = _job(run, f"zero-{zero_stage}-{world_size}", **resources)
        _train_ranks(job, world_size=world_size)
        return Path(job.attempt)

    return attempt


def _job(run: Run, name: str, **resources: object) -> Job:
    stage = run.recipe.stages["pretrain"]
    folder = Path(run.resources.store) / name
    (folder / "attempt").mkdir(parents=True)
    return Job(
        stage=stage,
        data=prepare(stage.mixture, run.recipe.text(), run.resources),
        init=assemble(run.recipe.model, run.resources),
        resources=Resources.model_validate({**run.resources.model_dump(), **resources}),
        attempt=str(folder / "attempt"),
        resume=str(folder / "resume"),
        run_id=None,
        fresh_projector=True,
    )


def _train_inline(run: Run) -> Path:
    job = _job(run, "plain")
    train(job, Place())
    return Path(job.attempt)


def _train_ranks(job: Job, *, world_size: int, kill_at: int | None = None) -> None:
    folder = Path(job.attempt).parent
    told = folder / "job.json"
    told.write_text(job.model_dump_json())
    rendezvous = folder / f"rendezvous-{world_size}-{kill_at}"
    command = [sys.executable, str(Path(__file__).parent / "one_rank.py"), str(told)]
    ranks = [
        subprocess.Popen([*command, str(rank), str(world_size), str(rendezvous)], env=ENV, cwd=ROOT)
        for rank in range(world_size)
    ]
    if kill_at is not None:
        wanted = Path(job.resume) / f"step-{kill_at:06d}"
        while not wanted.exists():
            assert all(rank.poll() is None for rank in ranks), "ended before it could be killed"
            time.sleep(0.01)
        for rank in ranks:
            rank.kill()
    codes = [rank.wait(timeout=240) for rank in ranks]
    assert kill_at is not None or codes == [0] * world_size


def _losses(attempt: Path) -> list[float]:
    return [float.fromhex(row["loss"]) for row in json.loads((attempt / "curve.json").read_text()) if "loss" in row]


@pytest.mark.parametrize(("zero_stage", "world_size"), [(1, 2), (2, 1), (2, 2), (3, 2)])
def test_zero_gives_the_curve_of_plain_torch(
    trained: Callable[[int, int], Path], plain: Path, zero_stage: int, world_size: int
) -> None:
    attempt = trained(zero_stage, world_size)
    assert _losses(attempt) == pytest.approx(_losses(plain), rel=1e-6, abs=1e-6)
    own, reference = (load_file(folder / "model.safetensors") for folder in (attempt, plain))
    assert own.keys() == reference.keys()
    assert all((own[name] - reference[name]).abs().max() < 1e-5 for name in own)


def test_a_killed_stage_goes_on_bit_for_bit_and_at_another_world_size(
    run: Run, plain: Path, trained: Callable[[int, int], Path]
) -> None:
    resources = {**RAY, "num_workers": 2, "zero_stage": 2}
    unbroken = trained(2, 2)
    same = _job(run, "same", **resources)
    _train_ranks(same, world_size=2, kill_at=2)
    _train_ranks(same, world_size=2)
    for name in ("curve.json", "model.safetensors"):
        assert (Path(same.attempt) / name).read_bytes() == (unbroken / name).read_bytes()
    other = _job(run, "other", **resources)
    _train_ranks(other, world_size=2, kill_at=4)
    alone = Job.model_validate(
        {**other.model_dump(), "resources": {**other.resources.model_dump(), "num_workers": 1, "zero_stage": 1}}
    )
    _train_ranks(alone, world_size=1)
    assert _losses(Path(other.attempt)) == pytest.approx(_losses(plain), rel=1e-6, abs=1e-6)


def test_every_engine_clips_as_asked_and_stops_before_a_gradient_that_is_not_finite(run: Run) -> None:
    """Told by the first moment, which is a tenth of the gradient; Adam's first step hardly depends on its size."""
    zero: list[dict[str, object]] = [{"zero_stage": zero_stage} for zero_stage in (0, 2, 3)]
    offloaded = [{**own, "offload": "optimizer"} for own in zero if own["zero_stage"]]
    cases = [(own, most) for own in (*zero, *offloaded) for most in (None, 0.01)]
    script = str(Path(__file__).parent / "engines_step.py")
    processes, attempts = [], []
    for world_size, resources in ((1, {}), (2, {**RAY, "num_workers": 2})):
        job = _job(run, f"steps-{world_size}", **resources)
        attempts.append(Path(job.attempt))
        told, rendezvous = attempts[-1].parent / "job.json", attempts[-1].parent / "rendezvous"
        told.write_text(job.model_dump_json())
        for rank in range(world_size):
            command = [sys.executable, script, told, str(rank), str(world_size), rendezvous, json.dumps(cases)]
            processes.append(subprocess.Popen(command, env=ENV, cwd=ROOT))
    assert [process.wait(timeout=240) for process in processes] == [0, 0, 0]
    for number, (_, most) in enumerate(cases):
        plain, zero = (json.loads((attempt / f"{number}.json").read_text()) for attempt in attempts)
        assert zero["norm"] == pytest.approx(plain["norm"], rel=1e-5)
        assert plain["norm"] > 10 * (most or 0.01), "clipping has no effect"
        for own in (plain, zero):
            assert not math.isfinite(own["broken"])
            assert own["moved"] == []
        expected, found = (load_file(attempt / f"{number}.safetensors") for attempt in attempts)
        assert found.keys() == expected.keys()
        for name in [name for name in expected if name.startswith("exp_avg/")]:
            near = 1e-5 * float(expected[name].abs().max())
            assert torch.allclose(found[name], expected[name], rtol=1e-4, atol=near), name


PARTS = {
    "projector and language model": {"trainable": ["projector", "language_model"]},
    "projector": {"trainable": ["projector"]},
    "tower": {"trainable": ["vision_tower", "projector", "language_model"]},
    "expert": {"trainable": ["projector", "language_model"], "tuning": {"kind": "visual_expert"}},
}
MIXED: list[tuple[str, dict[str, object]]] = [
    *[("projector and language model", {"zero_stage": zero_stage}) for zero_stage in (0, 1, 2, 3)],
    *[("projector and language model", {"zero_stage": own, "offload": "optimizer"}) for own in (1, 2, 3)],
    ("projector", {"zero_stage": 2}),
    ("projector", {"zero_stage": 2, "gradient_checkpointing": True}),
    ("tower", {"zero_stage": 3}),
    ("tower", {"zero_stage": 3, "offload": "parameters", "gradient_checkpointing": True}),
    ("expert", {"zero_stage": 2}),
    ("expert", {"zero_stage": 3}),
    ("expert", {"zero_stage": 3, "gradient_checkpointing": True}),
]


@pytest.fixture(scope="module")
def mixed(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """What one process leaves of the parts by name, and two ranks of each case by number; all in the same processes."""
    folder = tmp_path_factory.mktemp("mixed")
    init = assemble(run.recipe.model, run.resources)
    resources = {**run.resources.model_dump(), "micro_batch_size": 1}

    def place(name: str) -> Path:
        return folder / f"{name}.safetensors"

    def case(name: str, parts: str, own: dict[str, object]) -> dict[str, object]:
        changes = {"global_batch_size": 4, "weight_decay": 0.1, "learning_rate": 1e-3, **PARTS[parts]}
        stage = Stage.model_validate({**run.recipe.stages["pretrain"].model_dump(), **changes})
        given = {"stage": stage.model_dump(mode="json"), "resources": {**resources, **own}}
        return {**given, "folder": str(content(init)), "out": str(place(name))}

    alone = [case(parts, parts, {}) for parts in PARTS]
    two = [case(str(n), parts, {**RAY, "num_workers": 2, **own}) for n, (parts, own) in enumerate(MIXED)]
    processes = []
    for world_size, cases in ((1, alone), (2, two)):
        told = folder / f"{world_size}.json"
        told.write_text(json.dumps(cases))
        for rank in range(world_size):
            command = [sys.executable, str(Path(__file__).parent / "mixed_ranks.py"), told, str(rank)]
            command += [str(world_size), folder / f"rendezvous-{world_size}"]
            processes.append(subprocess.Popen(command, env=ENV, cwd=ROOT))
    try:
        assert [process.wait(timeout=240) for process in processes] == [0, 0, 0]
    finally:
        for process in processes:
            process.kill()
    return place


@pytest.mark.parametrize("number", range(len(MIXED)), ids=lambda number: f"{MIXED[number]}")
def test_ranks_with_and_without_pictures_walk_the_way_of_one_process(mixed: Callable[[str], Path], number: int) -> None:
    """Among the steps is one without any picture, and one whose first pass has none; moments are compared too."""
    expected, found = load_file(mixed(MIXED[number][0])), load_file(mixed(str(number)))
    assert found.keys() == expected.keys()
    assert len([name for name in found if name.startswith("exp_avg/") and found[name].any()]) > 3
    for name, tensor in expected.items():
        assert (tensor - found[name]).abs().max() < 1e-5, name
