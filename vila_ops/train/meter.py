"""How fast a stage's steps are and what came of them: to MLflow, and as a line for who watches."""

import logging
import time

from vila_ops.tracking import MetricLog
from vila_ops.train.job import Job

log = logging.getLogger(__name__)

LINES = 20
"""Progress lines of a stage."""


class Meter:
    """Of rank 0, from its making on: the time before the first step is not counted."""

    def __init__(self, job: Job, *, step: int, num_steps: int) -> None:
        """`step` of `num_steps` are done already."""
        self.name = job.stage.name
        self.first, self.num_steps = step, num_steps
        self.metrics = MetricLog(job.resources.tracking_uri, job.run_id)
        self.metrics.log({"num_steps": num_steps}, step=step)
        self.started = self.last = time.monotonic()

    def count(self, row: dict[str, float], *, norm: float) -> None:
        """A step was taken: its row of the curve, and the norm of its gradient."""
        now = time.monotonic()
        seconds, self.last = now - self.last, now
        step = int(row["step"])
        self.metrics.log({**row, "grad_norm": norm, "seconds_per_step": seconds}, step=step)
        if step == 1 or step % max(1, self.num_steps // LINES) == 0:
            log.info("%s step %d/%d  loss %.3f  %s", self.name, step, self.num_steps, row["loss"], self._left(step))

    def close(self) -> None:
        """Send what waits."""
        self.metrics.flush()

    def _left(self, step: int) -> str:
        """Time left at the mean pace so far."""
        pace = (self.last - self.started) / max(1, step - self.first)
        seconds = round(pace * (self.num_steps - step))
        return f"{seconds // 60}:{seconds % 60:02d} left"
