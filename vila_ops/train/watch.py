"""What stops a stage: a loss or gradient that is no number."""

import math

from vila_ops.data.order.loader import Rows
from vila_ops.train.job import NonFiniteLoss, Place


class Watch:
    """Looks at every step of one rank."""

    def __init__(self, rows: Rows, place: Place) -> None:
        self.rows, self.place = rows, place

    def check(self, what: str, value: float, *, step: int) -> None:
        """Raise NonFiniteLoss, with the samples of the step, where the value is no number; the same on every rank."""
        if math.isfinite(value):
            return
        own, _ = self.rows.batch(step, rank=self.place.rank, world_size=self.place.world_size)
        keys = [key for row in own for key in row.keys]
        raise NonFiniteLoss(f"{what} {value} at step {step + 1}; nothing was updated. This rank's samples: {keys}")
