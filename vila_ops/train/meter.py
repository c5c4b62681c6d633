"""What a stage's steps cost and how fast they are: to MLflow, and as a line for who watches."""

import logging
import time

from vila_ops.data.order.loader import Rows
from vila_ops.tracking import MetricLog
from vila_ops.train.job import Job, Place, Taken

log = logging.getLogger(__name__)

LINES = 20
"""Progress lines of a stage."""


class Meter:
    """Rank 0 logs every step; the others only count."""

    def __init__(self, job: Job, place: Place, rows: Rows, *, step: int) -> None:
        """`step` steps are done already."""
        self.name, self.rank = job.stage.name, place.rank
        self.first, self.num_steps = step, rows.num_steps()
        self.metrics = MetricLog(job.resources.tracking_uri, job.run_id if place.rank == 0 else None)
        self.metrics.log({"num_steps": self.num_steps}, step=step)
        self.started = self.last = time.monotonic()

    def count(self, taken: Taken, *, step: int, validation_loss: float | None = None) -> None:
        """A step was taken; every rank says so."""
        now = time.monotonic()
        seconds, self.last = now - self.last, now
        if self.rank:
            return
        values = {"loss": taken.loss, "grad_norm": taken.norm, "seconds_per_step": seconds}
        values |= {} if validation_loss is None else {"validation_loss": validation_loss}
        self.metrics.log(values, step=step)
        if step == 1 or step % max(1, self.num_steps // LINES) == 0:
            log.info("%s step %d/%d  loss %.3f  %s", self.name, step, self.num_steps, taken.loss, self._left(step))

    def close(self) -> None:
        """Send what waits."""
        self.metrics.flush()

    def _left(self, step: int) -> str:
        """Time left at the mean pace so far."""
        pace = (self.last - self.started) / max(1, step - self.first)
        seconds = round(pace * (self.num_steps - step))
        return f"{seconds // 60}:{seconds % 60:02d} left"
