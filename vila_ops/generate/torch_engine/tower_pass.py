"""A pass of the vision tower that is computed a few layers at a time, between the tokens of answers.

The tower's code is that of transformers and knows nothing of it: the pass runs in a greenlet, which gives the thread
back before a layer when its time is over.
"""

import time
from collections.abc import Callable

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor, nn


class TowerPass(greenlet):
    """The call of a function that computes features by a tower for which `pause_between_layers` was called.

    All of it happens in one thread. A pass that is not run to its end has to be closed: its frames hold it and all
    that the tower computed, and nothing else frees them.
    """

    def __init__(self, compute: Callable[[], Tensor], device: torch.device) -> None:
        """`device` is the tower's."""
        super().__init__(compute)
        self._device = device
        self._until: float | None = None

    def run_for(self, seconds: float | None) -> Tensor | None:
        """Go on for about so long, or to the end; the features, or None if they are not finished."""
        self._until = None if seconds is None else time.perf_counter() + seconds
        features: Tensor | None = self.switch()
        return features

    def close(self) -> None:
        """End the pass where it is."""
        self.throw()

    def pause(self) -> None:
        """Give the thread back to the caller of `run_for`, if its time is over."""
        if self._until is None:
            return
        if self._device.type != "cpu":
            torch.accelerator.synchronize(self._device)  # else the clock would tell the time of launches alone
        if time.perf_counter() >= self._until:
            assert self.parent is not None  # only the thread's first greenlet has none
            self.parent.switch(None)


def pause_between_layers(tower: nn.Module) -> None:
    """Let passes of a tower pause before each of its layers. A second call changes nothing."""
    lists = [module for module in tower.modules() if isinstance(module, nn.ModuleList)]
    for layer in max(lists, key=len, default=nn.ModuleList()):
        if _pause not in layer._forward_pre_hooks.values():
            layer.register_forward_pre_hook(_pause)


def _pause(*_: object) -> None:
    if isinstance(current := getcurrent(), TowerPass):
        current.pause()
