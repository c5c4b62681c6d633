"""DeepSpeed's ZeRO stages have the curve of plain torch, and resume from each other's checkpoints.

VILA_PARITY=all runs every ZeRO stage with 1, 2 and 4 processes (`make faults`). Otherwise some run, with half the rows
and fewer steps.
"""

import contextlib
import dataclasses
import json
import math
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.forks import ranks
from tests.train.closeness import ROUNDING, apart, moments_apart, way
from vila_ops.artifacts.store import content
from vila_ops.config import NO_CONTEXT, Run, Stage, load
from vila_ops.data.preprocess.prepare import prepare
from vila_ops.model.assemble import assemble
from vila_ops.train.job import TrainJob

ROOT = Path(__file__).parents[2]
RECIPE, INLINE = ROOT / "configs/recipes/tiny.yaml", ROOT / "configs/resources/inline.yaml"
RAY = {"launch": "ray", "ray_address": "127.0.0.1:1"}
"""Resources of several workers, which the test starts itself, without Ray."""
TWO = {**RAY, "train.num_workers": 2}

pytestmark = pytest.mark.slow
Settings = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Curve:
    """Some steps with some number of processes. 0: plain torch."""

    world_size: int = 0
    resources: Settings = dataclasses.field(default_factory=dict)
    stage: Settings = dataclasses.field(default_factory=dict)
    scale: float = 1.0
    """Factor of the last rank's gradients."""
    resumes: str | None = None
    """The curve whose checkpoint, after half of the steps, this curve resumes from."""


BF16: Settings = {"precision": "bf16"}
ALL = os.environ.get("VILA_PARITY") == "all"
ROWS, MICRO_BATCH = (8 if ALL else 4), {0: 2, 1: 2, 2: 1, 4: 1}
"""Rows per step, and rows per pass by number of processes. Most cases have at least two passes per step."""
NUM_STEPS = 20 if ALL else 12
STEPS_OF_A_CURVE: Settings = {
    "num_steps": NUM_STEPS, "global_batch_size": ROWS, "save_every": NUM_STEPS // 2, "validate_every": NUM_STEPS,
}  # fmt: skip
EVERY = [(stage, number) for number in (1, 2, 4) for stage in (0, 1, 2, 3)]
SOME = [(2, 1), (0, 2), (1, 2), (2, 2), (3, 2), (3, 4)]
SAME = {
    **{
        f"zero-{stage}-of-{number}": Curve(number, {"train.zero_stage": stage})
        for stage, number in (EVERY if ALL else SOME)
    },
    "recomputed": Curve(0, {"train.gradient_checkpointing": True}),
    "not-fused": Curve(0, {"train.optimizer": "torch"}),
    "zero-3-recomputed": Curve(2, {"train.zero_stage": 3, "train.gradient_checkpointing": True}),
    "zero-0-resumed": Curve(2, {"train.zero_stage": 0}, resumes="zero-3-of-2"),
    "zero-2-not-fused": Curve(2, {"train.zero_stage": 2, "train.optimizer": "torch"}, resumes="zero-1-of-2"),
    "zero-3-resumed": Curve(2, {"train.zero_stage": 3}, resumes="zero-0-of-2"),
    "zero-2-offloaded": Curve(2, {"train.zero_stage": 2, "train.offload": "optimizer"}, resumes="zero-3-of-2"),
    "zero-3-offloaded": Curve(2, {"train.zero_stage": 3, "train.offload": "parameters"}, resumes="zero-2-of-2"),
}
"""Curves that are compared with one process of plain torch."""
CURVES = {
    "plain": Curve(),
    **SAME,
    "bf16": Curve(stage=BF16),
    **{f"zero-{stage}-bf16": Curve(2, {"train.zero_stage": stage}, BF16) for stage in (0, 1, 2, 3)},
    "zero-2-bf16-reduced-in-fp32": Curve(2, {"train.zero_stage": 2, "train.reductions": "fp32"}, BF16),
    "scaled": Curve(2, {"train.zero_stage": 2}, scale=1.01),
}
RECIPE_S_OWN = {"short": Curve(0), "zero-2-short": Curve(2, {"train.zero_stage": 2})}
"""The stage as in the recipe, with six steps."""
UNCLIPPED_AND_CLIPPED = (None, 0.01)
STEPS: list[Settings] = [
    *[{"train.zero_stage": stage} for stage in (0, 2, 3)],
    *[{"train.zero_stage": stage, "train.offload": "optimizer"} for stage in (2, 3)],
]
PARTS = {
    "projector and language model": {"trainable": ["projector", "language_model"]},
    "projector": {"trainable": ["projector"]},
    "tower": {"trainable": ["vision_tower", "projector", "language_model"]},
    "expert": {"trainable": ["projector", "language_model"], "tuning": {"kind": "visual_expert"}},
}
MIXED_STEPS, MIXED_RATE = 4, 1e-3
"""Steps of `mixed_ranks.STEPS`, and their learning rate."""
MIXED: list[tuple[str, Settings]] = [
    *[("projector and language model", {"train.zero_stage": zero_stage}) for zero_stage in (0, 1, 2, 3)],
    *[("projector and language model", {"train.zero_stage": own, "train.offload": "optimizer"}) for own in (1, 2, 3)],
    ("projector", {"train.zero_stage": 2}),
    ("projector", {"train.zero_stage": 2, "train.gradient_checkpointing": True}),
    ("tower", {"train.zero_stage": 3}),
    ("tower", {"train.zero_stage": 3, "train.offload": "parameters", "train.gradient_checkpointing": True}),
    ("expert", {"train.zero_stage": 2}),
    ("expert", {"train.zero_stage": 3}),
    ("expert", {"train.zero_stage": 3, "train.gradient_checkpointing": True}),
]
RESTORED: list[Settings] = [
    *[{"train.zero_stage": zero_stage} for zero_stage in (0, 1, 2, 3)],
    {"train.zero_stage": 3, "train.offload": "optimizer"},
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    store = tmp_path_factory.mktemp("zero")
    where = (
        f"resources.storage.store={store}/store",
        f"resources.storage.cache={store}/cache",
        "resources.train.threads_per_worker=1",
    )
    return load(RECIPE, resources=INLINE, overrides=where)


@pytest.fixture(scope="module")
def done(run: Run) -> Path:
    """The folder of all results. All cases with the same number of processes share their processes: see `ranks.py`."""
    tasks: dict[int, list[tuple[str, Settings]]] = {number: [] for number in (0, 1, 2, 4)}
    for name, curve in {**CURVES, **RECIPE_S_OWN}.items():
        tasks[curve.world_size].append(
            ("curves", {"job": _as_json(_curve_job(run, name, curve)), "scale": curve.scale})
        )
    for most in UNCLIPPED_AND_CLIPPED:
        tasks[0].append(
            ("engines_step", _as_json(_job(run, f"step-{most}", {"max_grad_norm": most, "global_batch_size": 4})))
        )
        for number, own in enumerate(STEPS):
            clipped = {"max_grad_norm": most, "global_batch_size": 4}
            job = _job(run, f"step-{most}-{number}", clipped, **TWO, **own)
            tasks[2].append(("engines_step", _as_json(job)))
    tasks[0] += [("mixed_ranks", _mixed_task(run, parts, parts)) for parts in PARTS]
    for number, (parts, own) in enumerate(MIXED):
        tasks[2].append(("mixed_ranks", _mixed_task(run, f"mixed-{number}", parts, **TWO, **own)))
    for number, own in enumerate(RESTORED):
        task = _mixed_task(run, f"restored-{number}", "projector and language model", **TWO, **own)
        out = str(Path(task["out"]).with_name("facts.json"))
        tasks[2].append(("restored", {**task, "out": out, "stage": {**task["stage"], **BF16}}))
    _run_ranks(Path(run.resources.storage.store), tasks)
    return Path(run.resources.storage.store)


def _run_ranks(folder: Path, tasks: dict[int, list[tuple[str, Settings]]]) -> None:
    with contextlib.ExitStack() as living:
        processes = []
        for world_size in (1, 2, 4):
            tasks_file = folder / f"tasks-{world_size}.json"
            alone = tasks[0] if world_size == 1 else []
            tasks_file.write_text(json.dumps({"alone": alone, "together": tasks[world_size]}))
            script = Path(__file__).parent / "ranks.py"
            processes += living.enter_context(ranks(script, tasks_file, world_size=world_size))
        assert [process.wait(timeout=None) for process in processes] == [0] * 7


def _curve_job(run: Run, name: str, curve: Curve) -> TrainJob:
    store = f"{run.resources.storage.store}/features-{name}"  # a separate cache, so that the tower runs
    resources = {**curve.resources, "storage.store": store}
    if curve.world_size:
        resources |= {**RAY, "train.num_workers": curve.world_size}
    if name in RECIPE_S_OWN:
        return _job(run, name, **resources)
    resources["train.micro_batch_size"] = MICRO_BATCH[curve.world_size]
    job = _job(run, name, {**STEPS_OF_A_CURVE, **curve.stage}, **resources)
    resume = str(Path(run.resources.storage.store) / curve.resumes / "resume") if curve.resumes else job.resume
    return TrainJob.model_validate({**job.model_dump(), "resume": resume})


def _mixed_task(run: Run, name: str, parts: str, **resources: Any) -> Settings:
    changes = {"global_batch_size": 4, "weight_decay": 0.1, "learning_rate": MIXED_RATE, **PARTS[parts]}
    job = _as_json(_job(run, name, changes, **{"train.micro_batch_size": 1}, **resources))
    out = Path(job["attempt"]) / "state.safetensors"
    return {"stage": job["stage"], "resources": job["resources"], "folder": str(_init(run)), "out": str(out)}


def _init(run: Run) -> Path:
    return content(assemble(run.recipe.model, run.resources))


def _as_json(job: TrainJob) -> Settings:
    return job.model_dump(mode="json")


def _job(run: Run, name: str, changes: Settings | None = None, **resources: Any) -> TrainJob:
    stage = Stage.model_validate({**run.recipe.stages["pretrain"].model_dump(), **(changes or {})})
    folder = Path(run.resources.storage.store) / name
    (folder / "attempt").mkdir(parents=True)
    return TrainJob(
        stage=stage,
        data=prepare(stage.mixture, run.recipe.text(), run.resources),
        init=assemble(run.recipe.model, run.resources),
        resources=run.resources.with_changes(resources),
        context=NO_CONTEXT,
        attempt=str(folder / "attempt"),
        resume=str(folder / "resume"),
        run_id=None,
        fresh_projector=True,
    )


def _train_ranks(job: TrainJob, *, world_size: int, kill_at: int | None = None) -> None:
    folder = Path(job.attempt).parent
    job_file = folder / "job.json"
    job_file.write_text(job.model_dump_json())
    with ranks(Path(__file__).parent / "one_rank.py", job_file, world_size=world_size) as living:
        if kill_at is not None:
            wanted = Path(job.resume) / f"step-{kill_at:06d}"
            while not wanted.exists():
                assert all(rank.poll() is None for rank in living), "ended before it could be killed"
                time.sleep(0.01)
            for rank in living:
                rank.kill()
        codes = [rank.wait() for rank in living]
    assert kill_at is not None or codes == [0] * world_size


def _losses(attempt: Path) -> list[float]:
    return [float.fromhex(row["loss"]) for row in json.loads((attempt / "curve.json").read_text()) if "loss" in row]


def _apart(done: Path, one: str, other: str) -> float:
    """Return the largest difference of two curves in nats."""
    losses, others = (_losses(done / name / "attempt") for name in (one, other))
    assert len(losses) == len(others) == NUM_STEPS
    return max(abs(a - b) for a, b in zip(losses, others, strict=True))


def _weights_apart(run: Run, done: Path, one: str, other: str) -> float:
    """Return how far the models of two curves are apart: see `closeness.apart`."""
    own, reference = (load_file(done / name / "attempt/model.safetensors") for name in (one, other))
    stage = Stage.model_validate({**run.recipe.stages["pretrain"].model_dump(), **STEPS_OF_A_CURVE})
    return apart(own, reference, way=way(stage))


@pytest.mark.parametrize("name", SAME)
def test_every_engine_walks_the_curve_of_plain_torch(name: str, run: Run, done: Path) -> None:
    """Rows with and without images, several passes per step, clipping, warm-up. Losses of 6 nats agree to 1e-6."""
    assert _apart(done, name, "plain") <= 1e-6
    assert _weights_apart(run, done, name, "plain") < ROUNDING


def test_one_rank_whose_gradients_are_a_hundredth_too_large_leaves_the_curve(run: Run, done: Path) -> None:
    assert _apart(done, "scaled", "plain") > 1e-5
    assert _weights_apart(run, done, "scaled", "plain") > ROUNDING


@pytest.mark.parametrize("name", [name for name in CURVES if name.endswith(("-bf16", "-in-fp32"))])
def test_bf16_is_near_the_curve_of_fp32_and_nearer_to_itself(name: str, done: Path) -> None:
    """A product in bf16 has 8 bits, an error of 1 in 256, which mostly averages out over some hundred targets."""
    assert _apart(done, name, "bf16") < 1e-3
    assert 1e-5 < _apart(done, name, "plain") < 3e-3


@pytest.mark.parametrize("number", range(len(RESTORED)), ids=lambda number: f"{RESTORED[number]}")
def test_bf16_begins_with_the_folder_s_bits_and_a_restored_state_has_the_saved_ones(number: int, done: Path) -> None:
    """DeepSpeed alone would begin with weights that were rounded to bf16, 4e-3 apart of a weight of 1."""
    ran = json.loads((done / f"restored-{number}" / "attempt/facts.json").read_text())
    assert (ran["begins"], ran["restored"], ran["continued"]) == (0, 0, 0)
    assert ran["parameters"] == "bf16"
    assert ran["zero_stage"] == RESTORED[number]["train.zero_stage"]


def test_a_curve_that_was_resumed_has_the_first_half_of_the_other(done: Path) -> None:
    """They resumed from the state of another engine."""
    for name, curve in SAME.items():
        if curve.resumes:
            losses, others = (_losses(done / folder / "attempt") for folder in (name, curve.resumes))
            assert losses[: NUM_STEPS // 2] == others[: NUM_STEPS // 2]


@pytest.mark.parametrize(
    ("name", "facts"),
    [
        ("plain", {"engine": "torch", "zero_stage": 0, "offload": "none", "fused": True, "recomputed_layers": 0}),
        ("not-fused", {"engine": "torch", "fused": False}),
        ("recomputed", {"engine": "torch", "recomputed_layers": 2}),
        ("zero-3-of-4", {"zero_stage": 3, "world_size": 4, "backend": "gloo", "offload": "none", "fused": True}),
        ("zero-2-offloaded", {"zero_stage": 2, "offload": "optimizer", "optimizer": "torch.optim.adamw.AdamW"}),
        ("zero-3-offloaded", {"zero_stage": 3, "offload": "parameters"}),
        ("zero-2-not-fused", {"zero_stage": 2, "fused": False}),
        ("zero-3-recomputed", {"zero_stage": 3, "recomputed_layers": 2}),
    ],
)
def test_a_stage_says_what_really_ran(name: str, facts: Settings, done: Path) -> None:
    ran = json.loads((done / name / "attempt/ran.json").read_text())
    assert {key: ran[key] for key in facts} == facts


def test_a_killed_stage_goes_on_bit_for_bit_and_at_another_world_size(run: Run, done: Path) -> None:
    resources = {**TWO, "train.zero_stage": 2}
    unbroken, plain = done / "zero-2-short" / "attempt", done / "short" / "attempt"
    same = _job(run, "same", **resources)
    _train_ranks(same, world_size=2, kill_at=2)
    _train_ranks(same, world_size=2)
    for name in ("curve.json", "model.safetensors"):
        assert (Path(same.attempt) / name).read_bytes() == (unbroken / name).read_bytes()
    other = _job(run, "other", **resources)
    _train_ranks(other, world_size=2, kill_at=4)
    alone = other.with_changes({"resources.train.num_workers": 1, "resources.train.zero_stage": 1})
    _train_ranks(alone, world_size=1)
    assert _losses(Path(other.attempt)) == pytest.approx(_losses(plain), rel=1e-6, abs=1e-6)


def test_every_engine_clips_as_asked_and_stops_before_a_gradient_that_is_not_finite(done: Path) -> None:
    """The first moment, a tenth of the gradient, shows it. Adam's first update hardly depends on the gradient."""
    for most in UNCLIPPED_AND_CLIPPED:
        for number in range(len(STEPS)):
            attempts = [done / name / "attempt" for name in (f"step-{most}", f"step-{most}-{number}")]
            plain, zero = (json.loads((attempt / "norms.json").read_text()) for attempt in attempts)
            assert zero["norm"] == pytest.approx(plain["norm"], rel=1e-5)
            assert plain["norm"] > 10 * (most or 0.01), "clipping has no effect"
            for own in (plain, zero):
                assert not math.isfinite(own["broken"])
                assert own["moved"] == []
            expected, actual = (load_file(attempt / "state.safetensors") for attempt in attempts)
            assert actual.keys() == expected.keys()
            for name in [name for name in expected if name.startswith("exp_avg/")]:
                near = 1e-5 * float(expected[name].abs().max())
                assert torch.allclose(actual[name], expected[name], rtol=1e-4, atol=near), name


@pytest.mark.parametrize("number", range(len(MIXED)), ids=lambda number: f"{MIXED[number]}")
def test_ranks_with_and_without_images_walk_the_way_of_one_process(number: int, done: Path) -> None:
    """One step has no image, and one has none in its first pass. Moments are compared too.

    A bias of keys adds the same to all scores of a query, which softmax ignores: its gradient is rounding alone, and so
    is its way.
    """
    names = MIXED[number][0], f"mixed-{number}"
    expected, actual = (load_file(done / name / "attempt/state.safetensors") for name in names)
    assert actual.keys() == expected.keys()
    keys = {name for name in expected if name.endswith("k_proj.bias")}
    moments = [name for name in expected.keys() - keys if name.startswith("exp_avg") and expected[name].any()]
    assert len([name for name in moments if name.startswith("exp_avg/")]) > 3
    assert moments_apart(*({name: state[name] for name in moments} for state in (actual, expected))) < ROUNDING
    assert all(actual[name].abs().max() < 1e-10 for name in keys if name.startswith("exp_avg"))
    rest = expected.keys() - {*moments} - keys
    assert not any(actual[name].any() for name in rest if name.startswith("exp_avg"))
    parameters = [name for name in expected.keys() - keys if name.startswith("param/")]
    own, reference = ({name: state[name] for name in parameters} for state in (actual, expected))
    assert apart(own, reference, way=MIXED_STEPS * MIXED_RATE) < ROUNDING
