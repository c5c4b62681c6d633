"""SIGKILL before and after every call that orders what is on the disk: a stage ends as if nobody had killed it.

The calls are found by watching a whole stage (`forks.py`), so that none is forgotten, whoever makes it: resume
checkpoints, caches, the lease, the seal. VILA_FAILPOINTS sets how often each is tried (`make faults`: 3); without it
a few of them are.
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
"""Calls of one name: the feature of every image is put in its place by the same one."""
TIMED = ("/leases/", "/diagnostics/")
"""Signs of life: how many there are depends on how long a stage takes."""
Fork = Callable[..., list[int]]


@pytest.fixture(scope="module")
def whole(
    fork: Fork, ask: Callable[..., ResumeTrial], tmp_path_factory: pytest.TempPathFactory
) -> tuple[ResumeTrial, list[str]]:
    """A stage that nobody killed, with checkpoints that come and go, and its calls in order of time."""
    folder = tmp_path_factory.mktemp("whole")
    asked = ask(folder / "store", save_every=1, num_steps=5)
    assert fork(stage=asked.model_dump(mode="json"), points=str(folder / "points")) == [0]
    points = (folder / "points").read_text().splitlines()
    return asked, [point for point in points if int(point.rpartition("#")[2]) <= MOST]


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
@pytest.mark.timeout(600 + 600 * TIMES)
def test_killed_before_or_after_any_of_them_it_ends_with_the_same_bytes(
    whole: tuple[ResumeTrial, list[str]], fork: Fork, tmp_path: Path
) -> None:
    unbroken, points = whole
    batches, expected = global_batches(unbroken.samples()), unbroken.train().digest
    every = [(point, side) for point in points for side in SIDES]
    for point, side in every * TIMES or random.Random(SEED).sample(every, FEW):
        told = f"killed {side} {point} (VILA_SEED={SEED})"
        asked = unbroken.in_store(str(tmp_path / "store"))
        stage = asked.model_dump(mode="json")
        codes = fork(stage=stage, kill=[point, side])
        assert codes == [-9] or (codes == [0] and any(timed in point for timed in TIMED)), f"not {told}: {codes}"
        assert fork(stage=stage) == [0], told
        assert asked.train().digest == expected, told
        assert first_mismatch(asked.samples(), batches) is None, told
        shutil.rmtree(tmp_path / "store")
