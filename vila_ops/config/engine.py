"""Engines that generate and score: which one a run uses is execution, chosen by `kind`."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PositiveInt, SerializeAsAny

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


class VllmEngine(Config):
    """vLLM's engine in processes of its own, for a model that `vila-ops export --check vllm` accepts."""

    kind: Literal["vllm"] = "vllm"
    tensor_parallel: PositiveInt = 1
    """Devices over which each layer is split."""
    memory_share: float = Field(default=0.9, gt=0, lt=1)
    """Share of the device's memory, or of the machine's on a CPU, that weights, keys and values may take."""
    cache_bytes: PositiveInt | None = None
    """Bytes of keys and values on each device; None: what `memory_share` leaves."""
    compiled: bool = True
    """Whether vLLM compiles the model when it starts: minutes once, and faster steps."""


class AutoEngine(Config):
    """`vllm` with its defaults where vLLM is installed and loads the model, else `torch` with its defaults."""

    kind: Literal["auto"] = "auto"


def _torch_by_default(value: Any) -> Any:
    return {"kind": "torch", **value} if isinstance(value, Mapping) else value


OwnEngine = TorchEngine | VllmEngine
Engine = Annotated[
    OwnEngine,
    Field(discriminator="kind"),
    SerializeAsAny(),
    plugins("vila_ops.engines", OwnEngine),
    BeforeValidator(_torch_by_default),
]
"""The engine that generates and scores; packages add kinds by entry points of the group `vila_ops.engines`."""
ServeEngine = Annotated[
    OwnEngine | AutoEngine,
    Field(discriminator="kind"),
    SerializeAsAny(),
    plugins("vila_ops.engines", OwnEngine | AutoEngine),
    BeforeValidator(_torch_by_default),
]
"""The engine of a service: as in `evaluate`, or `auto`."""
