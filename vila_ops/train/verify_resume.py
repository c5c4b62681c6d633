"""Proof that a stage goes on exactly after SIGKILL, on anybody's own recipe and resources.

The stage is trained once unbroken and then killed at random moments, inside saves too, until it was killed as often as
asked; each time it ends, it is compared with the unbroken one. What is killed is the process group that drives the
stage: launched inline it is all there is, and under Ray the cluster ends the ranks of a driver that is gone. Also that
process: `python -m vila_ops.train.verify_resume ASKED.json`.
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
from typing import TextIO

from vila_ops.artifacts.kinds import Checkpoint
from vila_ops.artifacts.store import backend, file, read_manifest, root_of
from vila_ops.config import NO_CONTEXT, Config, Stage
from vila_ops.train.job import StageInputs
from vila_ops.train.loop import CURVE
from vila_ops.train.samples import Read, batches_of, first_stray, read_samples
from vila_ops.train.stage import train_stage

SAVES, VALIDATIONS = 10, 4
"""Of a stage that is made short, at least."""
LINES = 30
"""Of what a process said that are told when it failed."""
Say = Callable[[str], None]


class Trial(StageInputs):
    """A stage to try."""

    def train(self) -> Checkpoint:
        """The model after the stage; found where it is trained already."""
        return train_stage(self.stage, self.model, self.data, self.init, self.resources, self.context)

    def elsewhere(self, store: str) -> "Trial":
        """The same with a store of its own, without MLflow, driven from this machine, samples written down."""
        own = {"storage.store": store, "tracking.uri": None, "train.record_samples": True}
        if self.resources.launch == "ray_job":
            own |= {"launch": "ray", "job_address": None}
        return self.with_changes({"resources": self.resources.with_changes(own), "context": NO_CONTEXT})

    def reads(self) -> list[Read]:
        """The samples that were read so far, as far as this machine can see."""
        return [
            read
            for folder in sorted((self.resources.storage.scratch() / "samples").glob("*"))
            for read in read_samples(folder)
        ]


class ResumeVerdict(Config):
    """What came of it."""

    stage: str
    steps: int
    kills: int
    passes: int
    """How often the stage was trained to its end under kills."""
    resumed: int
    """How often it went on from a checkpoint, as far as this machine can see; the other kills were before the first."""
    compared_steps: int
    """Of which the samples are known: 0 where the ranks wrote them down on other machines."""
    differences: tuple[str, ...]
    """None: after every pass curve, samples and files were those of the unbroken stage, bit for bit."""
    kept: str | None
    """Store with the unequal stages; None: nothing is left."""


def short(stage: Stage, *, steps: int) -> Stage:
    """A variant of a stage that is over soon, saves often and validates more than once."""
    own = {
        "num_steps": steps,
        "epochs": None,
        "save_every": min(stage.save_every, max(1, steps // SAVES)),
        "validate_every": min(stage.validate_every, max(1, steps // VALIDATIONS)),
    }
    return stage.with_changes(own)


def changes(stage: Stage, variant: Stage) -> str:
    """What a variant of a stage has otherwise, for a person."""
    one, two = stage.model_dump(mode="json"), variant.model_dump(mode="json")
    return ", ".join(f"{key} {two[key]} instead of {one[key]}" for key in one if one[key] != two[key]) or "no change"


def lines(verdict: ResumeVerdict) -> list[str]:
    """A verdict for a person."""
    if verdict.differences:
        return [f"NOT EQUAL after {verdict.kills} kills", *verdict.differences, f"both are kept in {verdict.kept}"]
    samples = f"the samples of {verdict.compared_steps} steps"
    return [
        f"equal: {verdict.kills} kills, {verdict.steps} steps of {verdict.stage} trained {verdict.passes} times to the "
        f"end, gone on {verdict.resumed} times from a checkpoint",
        f"bit for bit the same: the loss of every step, every validation loss, the model, "
        f"{samples if verdict.compared_steps else 'but samples were written down on other machines'}",
    ]


def verify_resume(asked: Trial, *, kills: int, say: Say) -> ResumeVerdict:
    """Train a stage unbroken and under so many kills, in a store of its own beside the others; compare.

    `say` is told a line for each kill. Raises RuntimeError where a process fails by itself.
    """
    root = f"{root_of(asked.resources.storage.store)}/verify-resume/{secrets.token_hex(4)}"
    draw = random.Random()
    unbroken = asked.elsewhere(f"{root}/unbroken")
    seconds = _to_its_end(unbroken)
    say(f"unbroken: {unbroken.train().step} steps in {seconds:.1f} s")
    done, passes, resumed = 0, 0, 0
    differences: list[str] = []
    while done < kills and not differences:
        passes += 1
        killed = asked.elsewhere(f"{root}/killed-{passes}")
        while done < kills and (moment := _killed(killed, after=draw.uniform(0, seconds), say=say)) is not None:
            done += 1
            say(f"kill {done} of {kills}: {moment}")
        _to_its_end(killed)
        resumed += sum(step > 0 for step in _starts(killed).values())
        differences = list(_differences(unbroken, killed))
        say(f"pass {passes} ended: {'not equal' if differences else 'equal'}")
    verdict = ResumeVerdict(
        stage=asked.stage.name,
        steps=unbroken.train().step,
        kills=done,
        passes=passes,
        resumed=resumed,
        compared_steps=len(batches_of(unbroken.reads())),
        differences=tuple(differences),
        kept=root if differences else None,
    )
    if not differences:
        backend(root).discard(asked.elsewhere(root).resources.storage.scratch(), root)
    return verdict


def _to_its_end(asked: Trial) -> float:
    """Train; returns the seconds from where the process had loaded its code."""
    with _process(asked) as process:
        started = time.monotonic()
        process.wait()
        return time.monotonic() - started


def _killed(asked: Trial, *, after: float, say: Say) -> str | None:
    """Train and kill after so many seconds; returns where that was, None where the stage had ended before."""
    before = {read.attempt for read in asked.reads()}
    with _process(asked) as process:
        try:
            process.wait(timeout=after)
            return None
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            if process.wait() == 0:
                return None
    own = [read.step for read in asked.reads() if read.attempt not in before]
    if not own:
        return f"after {after:.2f} s, before this try's first step"
    began = f"went on after step {min(own)}" if min(own) else "began with the first"
    return f"after {after:.2f} s in step {max(own) + 1}; this try {began}"


def _starts(asked: Trial) -> dict[str, int]:
    """By try the steps that were done when it began."""
    starts: dict[str, int] = {}
    for read in asked.reads():
        starts[read.attempt] = min(read.step, starts.get(read.attempt, read.step))
    return starts


@contextmanager
def _process(asked: Trial) -> Iterator[subprocess.Popen[str]]:
    """A process that trains, its code loaded; killed at the end. Raises RuntimeError where it failed by itself."""
    folder = asked.resources.storage.scratch()
    folder.mkdir(parents=True, exist_ok=True)
    told = folder / "asked.json"
    told.write_text(asked.model_dump_json())
    command = [sys.executable, "-m", "vila_ops.train.verify_resume", str(told)]
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
            raise RuntimeError(_said(log))


def _said(log: TextIO) -> str:
    log.seek(0)
    return f"a process of the stage failed; the last that it said:\n{''.join(log.readlines()[-LINES:])}"


def _differences(unbroken: Trial, killed: Trial) -> Iterator[str]:
    """What is not the same in two stages that were trained to their ends, a line each."""
    one, two = unbroken.train(), killed.train()
    curves = [json.loads(file(checkpoint, CURVE).read_text()) for checkpoint in (one, two)]
    for own, other in zip_longest(*curves):
        if own != other:
            yield f"the curves differ first at step {(own or other)['step']}: unbroken {own}, killed {other}"
            break
    if stray := first_stray(killed.reads(), batches_of(unbroken.reads())):
        yield f"the samples differ first in step {stray.step + 1}: rank {stray.rank} read {list(stray.rows)}"
    files = [read_manifest(checkpoint.uri)["files"] for checkpoint in (one, two)]
    names = sorted(name for name in files[0].keys() | files[1].keys() if files[0].get(name) != files[1].get(name))
    if names:
        yield f"the bytes of {names} differ"


def main() -> None:
    """The process that is killed. What anything prints from now on goes to the log."""
    asked = Trial.model_validate_json(Path(sys.argv[1]).read_text())
    sys.stdout.write("loaded\n")
    sys.stdout.flush()
    os.dup2(2, 1)
    asked.train()


if __name__ == "__main__":
    main()
