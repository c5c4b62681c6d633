"""Verify that a stage resumes exactly after SIGKILL, with any recipe and resources.

The stage is trained once without interruption. Then it is trained under SIGKILL at random moments, during saves too,
until it was killed as often as requested. Each time it ends, it is compared with the uninterrupted stage. A moment is a
number of steps and a part of one, counted from the first step of a try, so it does not depend on how fast the machine
is; where ranks record their samples on other machines, it is a time. The kill ends the process group that drives the
stage: with launch `inline` that is all of the training, and under Ray the cluster ends the ranks of a driver that is
gone. `python -m vila_ops.train.verify_resume INPUTS.json` is the process to kill.
"""

import json
import os
import random
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple, TextIO

from vila_ops.artifacts.kinds import Checkpoint
from vila_ops.artifacts.store import backend, file, read_manifest, root_of
from vila_ops.config import NO_CONTEXT, Config, Stage
from vila_ops.train.curve import CURVE
from vila_ops.train.job import StageInputs
from vila_ops.train.sample_log import StepSamples, first_mismatch, global_batches, read_sample_log
from vila_ops.train.stage import train_stage

SAVES, VALIDATIONS = 10, 4
"""The fewest saves and validations of a shortened stage."""
LOOK_SECONDS = 0.02
"""Time between two looks for the step in which a process is killed."""
LOG_LINES = 30
"""Number of last log lines in the error of a process that failed."""
Report = Callable[[str], None]


class ResumeTrial(StageInputs):
    """A stage to train in a separate store."""

    def train(self) -> Checkpoint:
        """Train the stage in this process, or find its checkpoint."""
        return train_stage(self.stage, self.model, self.data, self.init, self.resources, self.context)

    def in_store(self, store: str) -> "ResumeTrial":
        """Return the same stage in another store, without MLflow, driven by this machine, with a sample log."""
        changes = {"storage.store": store, "tracking.uri": None, "train.record_samples": True}
        if self.resources.launch == "ray_job":
            changes |= {"launch": "ray", "job_address": None}
        return self.with_changes({"resources": self.resources.with_changes(changes), "context": NO_CONTEXT})

    def samples(self) -> list[StepSamples]:
        """Return the samples that were read so far, of the ranks whose sample log is on this machine."""
        return [
            step
            for folder in sorted((self.resources.storage.scratch() / "sample_log").glob("*"))
            for step in read_sample_log(folder)
        ]


class ResumeVerdict(Config):
    """The outcome of a verification."""

    stage: str
    steps: int
    kills: int
    passes: int
    """How often the stage was trained to its end under kills."""
    resumed: int
    """How often it resumed from a checkpoint, by the sample logs on this machine. The other kills came before one."""
    compared_steps: int
    """Number of steps whose samples were compared: 0 if the ranks recorded them on other machines."""
    differences: tuple[str, ...]
    """Empty if after every pass curve, samples and files were bit for bit those of the uninterrupted stage."""
    kept: str | None
    """Store with the unequal stages. None: nothing is left."""


def shortened(stage: Stage, *, steps: int) -> Stage:
    """Return a variant of a stage with few steps, frequent saves and more than one validation."""
    changes = {
        "num_steps": steps,
        "epochs": None,
        "save_every": min(stage.save_every, max(1, steps // SAVES)),
        "validate_every": min(stage.validate_every, max(1, steps // VALIDATIONS)),
    }
    return stage.with_changes(changes)


def describe_changes(stage: Stage, variant: Stage) -> str:
    """Return the settings in which a variant differs from a stage, as text."""
    one, two = stage.model_dump(mode="json"), variant.model_dump(mode="json")
    return ", ".join(f"{key} {two[key]} instead of {one[key]}" for key in one if one[key] != two[key]) or "no change"


def summary(verdict: ResumeVerdict) -> list[str]:
    """Return a verdict as lines of text."""
    if verdict.differences:
        return [f"NOT EQUAL after {verdict.kills} kills", *verdict.differences, f"both are kept in {verdict.kept}"]
    samples = f"the samples of {verdict.compared_steps} steps"
    return [
        f"equal: {verdict.kills} kills, {verdict.steps} steps of {verdict.stage} trained {verdict.passes} times to the "
        f"end, resumed {verdict.resumed} times from a checkpoint",
        f"bit for bit the same: the loss of every step, every validation loss, the model, "
        f"{samples if verdict.compared_steps else 'but the samples were recorded on other machines'}",
    ]


class _Pace(NamedTuple):
    """How fast the uninterrupted stage was."""

    steps: int
    seconds: float
    """From the first step, or from the loaded code if no sample was recorded on this machine."""
    recorded_here: bool
    """Whether samples were recorded on this machine."""


def verify_resume(trial: ResumeTrial, *, kills: int, report: Report, draw: random.Random) -> ResumeVerdict:
    """Train a stage without interruption and under `kills` kills, in stores under STORE/verify-resume, and compare.

    `report` gets a line of progress for each kill, and `draw` draws their moments. Raises RuntimeError if a process
    fails without a kill.
    """
    root = f"{root_of(trial.resources.storage.store)}/verify-resume/{secrets.token_hex(4)}"
    unbroken = trial.in_store(f"{root}/unbroken")
    pace = _train_to_end(unbroken)
    report(f"unbroken: {pace.steps} steps in {pace.seconds:.1f} s")
    done, passes, resumed = 0, 0, 0
    differences: list[str] = []
    while done < kills and not differences:
        passes, before = passes + 1, done
        killed = trial.in_store(f"{root}/killed-{passes}")
        while moment := _train_and_kill(killed, pace, at=draw.random() if done < kills else None):
            done += 1
            report(f"kill {done} of {kills}: {moment}")
        if done == before:
            pace = pace._replace(seconds=pace.seconds / 2)  # the machine is less busy than it was at first
        resumed += sum(step > 0 for step in _first_steps(killed).values())
        differences = list(_differences(unbroken, killed))
        report(f"pass {passes} ended: {'not equal' if differences else 'equal'}")
    verdict = ResumeVerdict(
        stage=trial.stage.name,
        steps=pace.steps,
        kills=done,
        passes=passes,
        resumed=resumed,
        compared_steps=len(global_batches(unbroken.samples())),
        differences=tuple(differences),
        kept=root if differences else None,
    )
    if not differences:
        backend(root).discard(trial.in_store(root).resources.storage.scratch(), root)
    return verdict


def _train_to_end(trial: ResumeTrial) -> _Pace:
    """Train in a process."""
    with _process(trial) as process:
        began = loaded = time.monotonic()
        while process.poll() is None:
            if began == loaded and trial.samples():
                began = time.monotonic()
            time.sleep(LOOK_SECONDS)
        seconds = time.monotonic() - began
    return _Pace(trial.train().step, seconds, recorded_here=bool(trial.samples()))


def _train_and_kill(trial: ResumeTrial, pace: _Pace, *, at: float | None) -> str | None:
    """Train in a process and kill it at a part of the whole stage, or never.

    Returns a description of the moment, or None if the stage ended.
    """
    known = {step.attempt for step in trial.samples()}
    with _process(trial) as process:
        loaded = time.monotonic()
        try:
            process.wait(timeout=None if at is None else _await_step(process, trial, known, pace, at))
            return None
        except subprocess.TimeoutExpired:
            after = time.monotonic() - loaded
            os.killpg(process.pid, signal.SIGKILL)
            if process.wait() == 0:
                return None
    steps = [one.step for one in trial.samples() if one.attempt not in known]
    if not steps:
        return f"after {after:.2f} s"
    start = f"resumed after step {min(steps)}" if min(steps) else "began with the first step"
    return f"after {after:.2f} s in step {max(steps) + 1}; this try {start}"


def _await_step(process: subprocess.Popen[str], trial: ResumeTrial, known: set[str], pace: _Pace, at: float) -> float:
    """Wait until a try that is not known is in the step of a moment, or has ended. Returns the seconds left to wait."""
    if not pace.recorded_here:
        return at * pace.seconds
    whole, part = divmod(at * pace.steps, 1)
    while process.poll() is None:
        steps = [one.step for one in trial.samples() if one.attempt not in known]
        if steps and max(steps) >= min(steps) + whole:
            return part * pace.seconds / pace.steps
        time.sleep(LOOK_SECONDS)
    return 0.0


def _first_steps(trial: ResumeTrial) -> dict[str, int]:
    """Return by attempt the number of steps that were done when it began."""
    first: dict[str, int] = {}
    for one in trial.samples():
        first[one.attempt] = min(one.step, first.get(one.attempt, one.step))
    return first


@contextmanager
def _process(trial: ResumeTrial) -> Iterator[subprocess.Popen[str]]:
    """A process that trains and has loaded its code. It is killed at the end of the context.

    Raises RuntimeError if it failed without a kill.
    """
    folder = trial.resources.storage.scratch()
    folder.mkdir(parents=True, exist_ok=True)
    inputs = folder / "inputs.json"
    inputs.write_text(trial.model_dump_json())
    command = [sys.executable, "-m", "vila_ops.train.verify_resume", str(inputs)]
    with (
        (folder / "log").open("w+") as log,
        subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True
        ) as process,
    ):
        try:
            assert process.stdout is not None
            process.stdout.readline()
            yield process
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        if process.wait() not in (0, -signal.SIGKILL):
            raise RuntimeError(f"a process of the stage failed; the end of its log:\n{_last_lines(log)}")


def _last_lines(log: TextIO) -> str:
    log.seek(0)
    return "".join(log.readlines()[-LOG_LINES:])


def _differences(unbroken: ResumeTrial, killed: ResumeTrial) -> Iterator[str]:
    """Yield a line for each difference between two stages that were trained to their ends."""
    checkpoints = unbroken.train(), killed.train()
    curves = [json.loads(file(checkpoint, CURVE).read_text()) for checkpoint in checkpoints]
    for one, two in zip_longest(*curves):
        if one != two:
            yield f"the curves differ first at step {(one or two)['step']}: unbroken {one}, killed {two}"
            break
    if mismatch := first_mismatch(killed.samples(), global_batches(unbroken.samples())):
        rows = list(mismatch.rows)
        yield f"the samples differ first in step {mismatch.step + 1}: rank {mismatch.rank} read {rows}"
    files = [read_manifest(checkpoint.uri)["files"] for checkpoint in checkpoints]
    names = sorted(name for name in files[0].keys() | files[1].keys() if files[0].get(name) != files[1].get(name))
    if names:
        yield f"the bytes of {names} differ"


def main() -> None:
    """Train in the process to kill. It prints a line once its code is loaded; all later output goes to the log."""
    trial = ResumeTrial.model_validate_json(Path(sys.argv[1]).read_text())
    sys.stdout.write("loaded\n")
    sys.stdout.flush()
    os.dup2(2, 1)
    trial.train()


if __name__ == "__main__":
    main()
