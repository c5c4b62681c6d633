"""How close two runs of Adam end when nothing but the order of their sums differs.

Adam divides a gradient by its own size. So where a number's gradient is next to nothing, rounding decides which way it
goes, and it may end anywhere within the rates of the steps: no bound on each single number holds on every processor.
"""

from torch import Tensor

from vila_ops.config import Stage
from vila_ops.train.optim import lr_multiplier

ROUNDING = 1e-4
"""The share of its way by which rounding may part a tensor's numbers, on the mean.

A gradient summed over some hundred terms in another order differs by d = 1e-6 of its root mean square s (about the
square root of 300 times 2^-24). Adam's update of a number with gradient g then differs by min(2, d s / |g|) of the
rate at most; the mean of that over a normal g is 0.8 d (1 + ln(2 / d)) = 1.2e-5. Small tensors have a worse mean.
Measured after twenty steps: 4e-7 between engines, with kernels for AVX2 and for SSE4.1; 4e-3 where one of two ranks
has gradients that are 1 % too large.
"""


def way(stage: Stage) -> float:
    """How far Adam moves a number at most in a stage, if its update is never larger than the rate."""
    assert stage.num_steps is not None
    return sum(stage.learning_rate * lr_multiplier(n, stage, num_steps=stage.num_steps) for n in range(stage.num_steps))


def apart(own: dict[str, Tensor], reference: dict[str, Tensor], *, way: float) -> float:
    """The largest mean distance of two tensors of one name, as a share of `way`."""
    assert own.keys() == reference.keys()
    return max(float((own[name] - reference[name]).abs().mean()) for name in own) / way
