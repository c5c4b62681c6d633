"""SIGKILL before and after every call that orders writes on the disk: the resumed stage equals an uninterrupted one.

The calls are recorded from a whole stage (`stages.py`), so that none is missed: resume checkpoints, caches, the lease,
the seal. VILA_FAILPOINTS sets how often each is tried (`make faults`: 3). Without it, a few of them are tried.
"""

import os
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.seed import SEED
from vila_ops.train.sample_log import first_mismatch, global_batches
from vila_ops.train.verify_resume import ResumeTrial

TIMES = int(os.environ.get("VILA_FAILPOINTS", "0"))
FEW = 6
SIDES = ("before", "after")
MOST = 4
"""Calls that have the same name for every image."""
TIMED = ("/leases/", "/diagnostics/")
"""Folders of heartbeats, whose number depends on the duration of the stage."""
Fork = Callable[..., list[int]]


@pytest.fixture(scope="module")
def whole(
    fork: Fork, make_trial: Callable[..., ResumeTrial], tmp_path_factory: pytest.TempPathFactory
) -> tuple[ResumeTrial, list[str]]:
    """An uninterrupted stage that saves and removes checkpoints, and its calls in order of time."""
    folder = tmp_path_factory.mktemp("whole")
    trial = make_trial(folder / "store", save_every=1, num_steps=5)
    assert fork(stage=trial.model_dump(mode="json"), points=str(folder / "points")) == [0]
    points = (folder / "points").read_text().splitlines()
    return trial, [point for point in points if int(point.rpartition("#")[2]) <= MOST]


def test_the_calls_are_those_that_a_checkpoint_and_a_seal_rest_on(whole: tuple[ResumeTrial, list[str]]) -> None:
    _, points = whole
    assert len(set(points)) == len(points)
    for wanted in (
        r"fsync /resume/.*step-000003.*\.safetensors",
        r"fsync /resume/.*step-000003.*manifest\.json",
        r"(rename|replace) /resume/.*step-000003",
        r"(unlink|rmdir) /resume/.*step-000001",
        r"fsync /checkpoint/.*model\.safetensors",
        r"fsync /checkpoint/.*curve\.json",
        r"link /checkpoint/.*manifest\.json",
        r"link /leases/",
    ):
        assert [point for point in points if re.match(wanted, point)], wanted


@pytest.mark.slow
@pytest.mark.timeout(1200 + 600 * TIMES)
def test_killed_before_or_after_any_of_them_it_ends_with_the_same_bytes(
    whole: tuple[ResumeTrial, list[str]], fork: Fork, tmp_path: Path
) -> None:
    unbroken, points = whole
    batches, expected = global_batches(unbroken.samples()), unbroken.train().digest
    every = [(point, side) for point in points for side in SIDES]
    for point, side in every * TIMES or random.Random(SEED).sample(every, FEW):
        case = f"killed {side} {point} (VILA_SEED={SEED})"
        trial = unbroken.in_store(str(tmp_path / "store"))
        stage = trial.model_dump(mode="json")
        codes = fork(stage=stage, kill=[point, side])
        assert codes == [-9] or (codes == [0] and any(timed in point for timed in TIMED)), f"not {case}: {codes}"
        assert fork(stage=stage) == [0], case
        assert trial.train().digest == expected, case
        assert first_mismatch(trial.samples(), batches) is None, case
        shutil.rmtree(tmp_path / "store")
