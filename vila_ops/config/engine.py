"""Engines that generate and score: which one a run uses is execution, chosen by `kind`."""

from typing import Annotated, Literal

from pydantic import Field, PositiveInt, SerializeAsAny

from vila_ops.config.base import Config
from vila_ops.config.kinds import plugins

Precision = Literal["fp32", "bf16", "int8", "int4"]
"""int8 and int4: weights are integers in memory and fp32 in the products; int4 has a scale for each 64 inputs, and its
embedding and head are int8."""


class TorchEngine(Config):
    """Continuous batching in plain torch, in this process."""

    kind: Literal["torch"] = "torch"
    cache_tokens: PositiveInt | None = None
    """Most tokens whose keys and values are in memory, the padding of shorter requests included; no fewer than the
    model's context. An endpoint keeps up to a quarter as many besides, of earlier prompts. None: 65536, or as many as
    `memory_share` leaves, but never fewer than the context."""
    memory_share: float = Field(default=0.5, gt=0, lt=1)
    """Share of the memory that is free once the weights are loaded that keys, values and features of images may take;
    of an endpoint, those of earlier prompts and images too."""


Engine = Annotated[SerializeAsAny[TorchEngine], plugins("vila_ops.engines", TorchEngine)]
"""The engine that generates and scores; packages add kinds by entry points of the group `vila_ops.engines`."""
