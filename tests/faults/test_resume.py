"""Error-prone cases of a resume: the end of an epoch, the last step, another save interval, another recipe."""

import logging
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vila_ops.config import Stage
from vila_ops.errors import Preempted, is_final
from vila_ops.train.checkpoint.unfinished import resume_folders
from vila_ops.train.sample_log import first_mismatch, global_batches
from vila_ops.train.verify_resume import ResumeTrial

Fork = Callable[..., list[int]]


@pytest.fixture
def trained_and_killed(
    fork: Fork, make_trial: Callable[..., ResumeTrial], tmp_path: Path
) -> Callable[..., tuple[ResumeTrial, ResumeTrial]]:
    """Makes an uninterrupted stage, and one that was killed after the first of its calls that matches `after`."""

    def make(*, after: str, **changes: Any) -> tuple[ResumeTrial, ResumeTrial]:
        whole, killed = (make_trial(tmp_path / name, **changes) for name in ("whole", "killed"))
        assert fork(stage=whole.model_dump(mode="json"), points=str(tmp_path / "points")) == [0]
        points = (tmp_path / "points").read_text().splitlines()
        there = next(point for point in points if re.search(after, point))
        assert fork(stage=killed.model_dump(mode="json"), kill=[there, "after"]) == [-9]
        return whole, killed

    return make


def saved(step: int) -> str:
    """The call with which a resume checkpoint is there."""
    return rf"^(rename|replace) /resume/.*step-{step:06d}"


def changed(trial: ResumeTrial, **settings: Any) -> ResumeTrial:
    stage = Stage.model_validate({**trial.stage.model_dump(), **settings})
    return ResumeTrial.model_validate({**trial.model_dump(), "stage": stage.model_dump()})


def check(whole: ResumeTrial, resumed: ResumeTrial, *, step: int) -> None:
    """Checks that the second stage resumed after `step` steps and ended as the first."""
    attempts = {read.attempt: [] for read in resumed.samples()}
    for read in resumed.samples():
        attempts[read.attempt].append(read.step)
    assert sorted(min(steps) for steps in attempts.values()) == [0, step]
    assert first_mismatch(resumed.samples(), global_batches(whole.samples())) is None
    assert resumed.train().digest == whole.train().digest


@pytest.mark.parametrize(
    ("step", "num_steps"),
    [
        pytest.param(4, 9, id="at the end of an epoch"),
        pytest.param(8, 9, id="before the last step, at the end of the second epoch"),
    ],
)
def test_it_goes_on_with_the_next_epoch(
    step: int, num_steps: int, trained_and_killed: Callable[..., tuple[ResumeTrial, ResumeTrial]], fork: Fork
) -> None:
    rows = {"sources": ["pairs"], "pack": False, "sequence_length": 96, "validate_every": 20}
    whole, killed = trained_and_killed(
        after=saved(step), num_steps=num_steps, save_every=step, global_batch_size=6, **rows
    )
    samples = 24
    seen = [key for step in range(4) for row in global_batches(whole.samples())[step] for key in row]
    assert len(set(seen)) == len(seen) == samples, "four steps are one epoch"
    assert fork(stage=killed.model_dump(mode="json")) == [0]
    check(whole, killed, step=step)


def test_another_rhythm_of_saves_does_not_matter(
    trained_and_killed: Callable[..., tuple[ResumeTrial, ResumeTrial]], fork: Fork
) -> None:
    whole, killed = trained_and_killed(after=saved(4), num_steps=9, save_every=4)
    often = changed(killed, save_every=1)
    assert fork(stage=often.model_dump(mode="json")) == [0]
    check(whole, often, step=4)


def test_another_recipe_does_not_go_on_from_this_one_s_checkpoint(
    trained_and_killed: Callable[..., tuple[ResumeTrial, ResumeTrial]], fork: Fork
) -> None:
    """Not even in the same store and with only one step more, as its address differs."""
    whole, killed = trained_and_killed(after=saved(4), num_steps=9, save_every=4)
    longer = changed(killed, num_steps=10)
    seen = len(killed.samples())
    assert fork(stage=longer.model_dump(mode="json")) == [0]
    assert longer.train().step == 10
    assert len(longer.samples()) == seen + 10 * 1
    assert fork(stage=killed.model_dump(mode="json")) == [0]
    assert killed.train().digest == whole.train().digest


def test_what_a_kill_after_the_seal_left_is_removed_by_the_next_look(
    trained_and_killed: Callable[..., tuple[ResumeTrial, ResumeTrial]], tmp_path: Path
) -> None:
    whole, killed = trained_and_killed(after=r"^link /checkpoint/.*manifest\.json", num_steps=4, save_every=2)
    store = killed.resources.storage.store
    assert [(one.stage, one.sealed) for one in resume_folders(store)] == [("pretrain", True)]
    assert killed.train().digest == whole.train().digest
    assert list((tmp_path / "killed" / "resume").iterdir()) == []


@pytest.mark.slow
def test_a_stage_with_other_settings_that_saved_nothing_is_not_named(
    trained_and_killed: Callable[..., tuple[ResumeTrial, ResumeTrial]], caplog: pytest.LogCaptureFixture
) -> None:
    _, killed = trained_and_killed(after=r" /resume/[^ ]*stage\.json", num_steps=3, save_every=2)
    assert [one.step for one in resume_folders(killed.resources.storage.store)] == [None]
    with caplog.at_level(logging.INFO):
        changed(killed, num_steps=2).train()
    assert "with other settings or data" not in caplog.text


@pytest.mark.slow
def test_the_progress_of_a_stage_with_other_settings_is_named_and_stays(
    trained_and_killed: Callable[..., tuple[ResumeTrial, ResumeTrial]], caplog: pytest.LogCaptureFixture
) -> None:
    whole, killed = trained_and_killed(after=saved(4), num_steps=9, save_every=4)
    (folder,) = resume_folders(killed.resources.storage.store)
    assert (folder.stage, folder.step, folder.sealed) == ("pretrain", 4, False)
    with caplog.at_level(logging.INFO):
        changed(killed, num_steps=2).train()
    assert f"{folder.place} holds 0.0 GB of stage pretrain with other settings or data" in caplog.text
    assert resume_folders(killed.resources.storage.store) == [folder]
    assert killed.train().digest == whole.train().digest


class SigtermAt(logging.Handler):
    """Sends SIGTERM to this process when a progress line of a step is logged."""

    def __init__(self, step: str) -> None:
        super().__init__()
        self.step = step

    def emit(self, record: logging.LogRecord) -> None:
        if self.step in record.getMessage():
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_preempted_stage_saves_what_it_has_done_and_goes_on_from_there(
    make_trial: Callable[..., ResumeTrial], tmp_path: Path
) -> None:
    whole, preempted = (make_trial(tmp_path / name, num_steps=5, save_every=100) for name in ("whole", "preempted"))
    before = signal.getsignal(signal.SIGTERM)
    logger, handler = logging.getLogger("vila_ops.progress"), SigtermAt("step 3/5")
    logger.addHandler(handler)
    level = logger.level
    logger.setLevel(logging.INFO)
    try:
        with pytest.raises(Preempted, match=r"saved after step 3, run it again") as raised:
            preempted.train()
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    assert not is_final(raised.value)
    assert signal.getsignal(signal.SIGTERM) == before
    (left,) = resume_folders(preempted.resources.storage.store)
    assert left.step == 3
    assert preempted.train().digest == whole.train().digest
    steps = [read.step for read in preempted.samples()]
    assert sorted(steps) == [0, 1, 2, 3, 4]
