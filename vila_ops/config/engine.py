"""Engines that generate and score: which one a run uses is execution, chosen by `kind`."""

from typing import Annotated, Literal

from pydantic import SerializeAsAny

from vila_ops.config.base import Config
from vila_ops.config.kinds import plugins


class TorchEngine(Config):
    """Greedy decoding in plain torch, in this process."""

    kind: Literal["torch"] = "torch"


Engine = Annotated[SerializeAsAny[TorchEngine], plugins("vila_ops.engines", TorchEngine)]
"""The engine that generates and scores; packages add kinds by entry points of the group `vila_ops.engines`."""
