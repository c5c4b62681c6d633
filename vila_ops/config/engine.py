"""Engines that generate and score: which one a run uses is execution, chosen by `kind`."""

from typing import Annotated, Literal

from pydantic import PositiveInt, SerializeAsAny

from vila_ops.config.base import Config
from vila_ops.config.kinds import plugins


class TorchEngine(Config):
    """Continuous batching in plain torch, in this process."""

    kind: Literal["torch"] = "torch"
    cache_tokens: PositiveInt | None = None
    """Most tokens whose keys and values are in memory, the padding of shorter requests included; no fewer than the
    model's context. None: 65536, or the context if that is longer."""


Engine = Annotated[SerializeAsAny[TorchEngine], plugins("vila_ops.engines", TorchEngine)]
"""The engine that generates and scores; packages add kinds by entry points of the group `vila_ops.engines`."""
