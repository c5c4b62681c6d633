"""Models of a stage that is still training, made of its resume checkpoints. Light: a model imports torch."""

import logging
import time

from vila_ops.artifacts import attempts, store
from vila_ops.artifacts.execution import execution
from vila_ops.artifacts.kinds import Checkpoint
from vila_ops.cluster import whoami
from vila_ops.errors import CorruptArtifact
from vila_ops.train.checkpoint.storage import storage_of
from vila_ops.train.job import StageInputs
from vila_ops.train.stage import address_of, resume_of

REVISION = 1
log = logging.getLogger(__name__)


class Snapshots:
    """The models after some of the steps of a stage, while another process trains it."""

    def __init__(self, inputs: StageInputs) -> None:
        self._inputs, self._at = inputs, address_of(inputs)
        self._store = inputs.resources.storage.store
        self._resume = resume_of(self._at, inputs.resources)
        self._last = 0
        """The newest step that was given or missed."""

    def finished(self) -> Checkpoint | None:
        """The model after the stage, as soon as it is sealed."""
        return store.find(Checkpoint, self._at, store=self._store)

    def new(self, *, every: int) -> list[Checkpoint]:
        """The models after multiples of `every` steps, which is always the same, oldest first; each is given once.

        A warning names those that are missed: damaged, or removed before they were read.
        """
        saved = {one.step: one.name for one in storage_of(self._resume).sealed() if one.step % every == 0}
        newest = max(saved, default=self._last)
        given = {step: self._model(step, saved.get(step)) for step in range(self._last + every, newest + 1, every)}
        if missed := [step for step, model in given.items() if model is None]:
            log.warning(
                "%s after steps %s is not evaluated: the resume checkpoints are gone; resources.train.keep.every: %d "
                "of the training process keeps them",
                self._inputs.stage.name, missed, every,
            )  # fmt: skip
        self._last = max(self._last, newest)
        return [model for model in given.values() if model]

    def _model(self, step: int, name: str | None) -> Checkpoint | None:
        """The model after a step, sealed before or now from the resume checkpoint of a name.

        None where there is none, or it is damaged or was removed meanwhile.
        """
        at = store.address(
            Checkpoint,
            revision=REVISION,
            recipe={"stage": self._at.key, "step": step},
            parents=(self._inputs.data.digest, self._inputs.init.digest),
        )
        if done := store.find(Checkpoint, at, store=self._store):
            return done
        if name is None:
            return None
        from vila_ops.train.checkpoint.checkpointer import read_checkpoint  # heavy: torch
        from vila_ops.train.loop import write_model

        stage, started = self._inputs.stage, time.monotonic()
        try:
            states, manifest = read_checkpoint(storage_of(self._resume), name)
        except (CorruptArtifact, FileNotFoundError) as error:
            log.warning("resume checkpoint %s of %s cannot be read: %s", name, stage.name, error)
            return None
        trained = {name: tensors["param"] for name, tensors in states.items()}
        with attempts.attempt(at, store=self._store) as attempt:
            write_model(trained, manifest["curve"], attempt, stage=stage, init=store.content(self._inputs.init))
        seconds = time.monotonic() - started
        ran = execution(launch=self._inputs.resources.launch, seconds=seconds, ran=[whoami()])
        return store.seal(Checkpoint, at, attempt, facts={"stage": stage.name, "step": step}, execution=ran)
