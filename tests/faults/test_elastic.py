"""A stage that is stopped and resumed with other numbers of processes and ZeRO stages equals one in one process.

The order of samples is the same. Losses agree to 1e-6 in fp32, but not bit for bit, as ranks sum their gradients in
another order than one process. VILA_ELASTIC sets the number of random sequences (`make faults`: 30).
"""

import json
import os
import random
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.seed import SEED
from vila_ops.artifacts.store import content
from vila_ops.config import NO_CONTEXT
from vila_ops.data.shards import read_index
from vila_ops.train.job import TrainJob
from vila_ops.train.sample_log import StepSamples, first_mismatch, global_batches, read_sample_log
from vila_ops.train.verify_resume import ResumeTrial

SEQUENCES = int(os.environ.get("VILA_ELASTIC", "0"))
LEG_STEPS = 3
Fork = Callable[..., list[int]]


class Leg(NamedTuple):
    """How one leg of the training is run."""

    world_size: int = 1
    zero_stage: int | None = None
    """ZeRO stage. None: plain torch."""
    micro_batch_size: int = 1
    threads: int = 1


ONE_TWO_ONE_FOUR = [Leg(1, 0), Leg(2, 2), Leg(1, 3), Leg(4, 1)]
OTHER_SETTINGS = [Leg(threads=1), Leg(micro_batch_size=4), Leg(micro_batch_size=2, threads=2), Leg()]


def drawn(seed: int) -> list[Leg]:
    """Return four random legs, each with another number of processes than the leg before."""
    draw = random.Random(seed)
    legs: list[Leg] = []
    while len(legs) < 4:
        size = draw.choice([size for size in (1, 2, 4) if not legs or size != legs[-1].world_size])
        zero_stage = draw.choice([0, 1, 2, 3] if size > 1 else [None, 0, 1, 2, 3])
        legs.append(Leg(size, zero_stage, micro_batch_size=draw.choice([n for n in (1, 2, 4) if n * size <= 4])))
    return legs


WAYS = {"1-2-1-4": ONE_TWO_ONE_FOUR, "other-settings": OTHER_SETTINGS}
WAYS |= {f"seed-{SEED + number}": drawn(SEED + number) for number in range(SEQUENCES)}


@pytest.fixture(scope="module")
def trial(make_trial: Callable[..., ResumeTrial], tmp_path_factory: pytest.TempPathFactory) -> ResumeTrial:
    """A stage with only documents, which every epoch reads once, over more than two epochs."""
    return make_trial(
        tmp_path_factory.mktemp("elastic") / "store",
        sources=["documents"], num_steps=4 * LEG_STEPS, global_batch_size=4, save_every=1, validate_every=6,
    )  # fmt: skip


@pytest.fixture(scope="module")
def alone(
    trial: ResumeTrial, fork: Fork, tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[float], list[StepSamples]]:
    """Losses and samples of one uninterrupted process with plain torch."""
    folder = tmp_path_factory.mktemp("alone")
    job = _job(trial, folder, 0, Leg())
    assert fork(job=job.model_dump(mode="json")) == [0]
    return _losses(job), read_sample_log(job.sample_log())


@pytest.mark.slow
@pytest.mark.parametrize("name", WAYS)
def test_the_way_is_that_of_one_process(
    name: str, trial: ResumeTrial, alone: tuple[list[float], list[StepSamples]], fork: Fork, tmp_path: Path
) -> None:
    losses, batches = alone[0], global_batches(alone[1])
    legs = WAYS[name]
    job = _walk(legs, trial, fork, tmp_path)
    reads = read_sample_log(job.sample_log())
    assert first_mismatch(reads, batches) is None
    starts = [min(read.step for read in reads if read.attempt == f"attempt-{number}") for number in range(len(legs))]
    assert starts[0] == 0
    assert all(a < b for a, b in pairwise(starts)), f"no leg went on from a checkpoint: {starts}"
    last = {step: max(read.attempt for read in reads if read.step == step) for step in batches}
    walked = global_batches(read for read in reads if read.attempt == last[read.step])
    assert walked == batches
    _check_epochs([key for step in sorted(walked) for row in walked[step] for key in row], trial)
    curve = _losses(job)
    assert len(curve) == len(losses) == len(batches)
    assert curve == pytest.approx(losses, rel=0, abs=1e-6)


@pytest.mark.slow
def test_zero_3_goes_on_where_its_ranks_do_not_divide_the_weights(
    make_trial: Callable[..., ResumeTrial], fork: Fork, tmp_path: Path
) -> None:
    """Of a vector of 64 values, two ranks have 22 and the last has 20."""
    trial = make_trial(
        tmp_path / "store", sources=["documents"], num_steps=2 * LEG_STEPS, global_batch_size=3, save_every=1,
        validate_every=6,
    )  # fmt: skip
    ways: dict[str, list[Leg]] = {"alone": [Leg()], "thirds": [Leg(3, 3), Leg(3, 3)]}
    losses = {}
    for name, legs in ways.items():
        (tmp_path / name).mkdir()
        losses[name] = _losses(_walk(legs, trial, fork, tmp_path / name))
    assert losses["thirds"] == pytest.approx(losses["alone"], rel=0, abs=1e-6)


def _walk(legs: list[Leg], trial: ResumeTrial, fork: Fork, folder: Path) -> TrainJob:
    """Train leg after leg. Each leg but the last is killed. Returns the job of the last leg."""
    draw = random.Random(SEED)
    for number, leg in enumerate(legs):
        job = _job(trial, folder, number, leg)
        stop = (number + 1) * LEG_STEPS if number + 1 < len(legs) else None
        codes = fork(
            job=job.model_dump(mode="json"), world_size=leg.world_size, rendezvous=f"{folder}/met-{number}",
            until=stop, moment=draw.random() * 0.02,
        )  # fmt: skip
        assert codes == [0 if stop is None else -9] * leg.world_size, leg
    return job


def _check_epochs(keys: list[str], trial: ResumeTrial) -> None:
    """Check that each epoch has every sample once: two reads of it enclose all others but those of one row."""
    train = {row["key"] for row in read_index(content(trial.data)).to_pylist() if row["split"] == "train"}
    whole = len(keys) // len(train)
    assert whole >= 2
    for epoch in range(whole):
        own = keys[epoch * len(train) : (epoch + 1) * len(train)]
        assert Counter(own) == Counter(train)


def _job(trial: ResumeTrial, folder: Path, number: int, leg: Leg) -> TrainJob:
    cluster = {} if leg.zero_stage is None else {"launch": "ray", "ray_address": "127.0.0.1:1"}
    train = {
        "num_workers": leg.world_size, "zero_stage": leg.zero_stage or 0, "micro_batch_size": leg.micro_batch_size,
        "threads_per_worker": leg.threads,
    }  # fmt: skip
    own = {"storage.store": str(folder), **{f"train.{key}": value for key, value in train.items()}}
    attempt = folder / f"attempt-{number}"
    attempt.mkdir()
    return TrainJob(
        stage=trial.stage,
        data=trial.data,
        init=trial.init,
        resources=trial.resources.with_changes({**cluster, **own}),
        context=NO_CONTEXT,
        attempt=str(attempt),
        resume=str(folder / "resume"),
        run_id=None,
        fresh_projector=True,
    )


def _losses(job: TrainJob) -> list[float]:
    curve = json.loads((Path(job.attempt) / "curve.json").read_text())
    return [float.fromhex(row["loss"]) for row in curve if "loss" in row]
