"""A model folder to the engine that a config chooses. Light: an engine's module is imported when it is used."""

import logging
import sys
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from vila_ops.artifacts.kinds import Checkpoint, Pretrained
from vila_ops.artifacts.store import content, file
from vila_ops.config.engine import AutoEngine, OwnEngine, TorchEngine, VllmEngine
from vila_ops.config.kinds import module_of, provenance
from vila_ops.generate.engine import Engine, EngineOptions
from vila_ops.packages.untrusted import read_json

if TYPE_CHECKING:  # heavy: transformers
    from vila_ops.data.text.conversation import Tokenizer

ENGINES = {"torch": "vila_ops.generate.torch_engine.engine", "vllm": "vila_ops.generate.vllm"}
"""Kind -> module with `open_engine(config, folder, options)`, which returns an `Engine`. A plugin's module has it too,
beside `Config` and `REVISION`."""
WAYS_OUT = "docs/serving.md says how to make an environment with both; or set the kind of the engine to torch"
log = logging.getLogger(__name__)


def load_engine(model: Checkpoint | Pretrained, config: OwnEngine, options: EngineOptions) -> Engine:
    """The engine of a sealed model, every byte of which is checked. Raises CorruptArtifact."""
    return open_folder(content(model), config, options)


def chosen(model: Checkpoint | Pretrained, config: OwnEngine | AutoEngine, options: EngineOptions) -> OwnEngine:
    """The engine that `auto` stands for here; any other config as it is. Raises CorruptArtifact."""
    if not isinstance(config, AutoEngine):
        return config
    if (reason := _why_not_vllm(model, options)) is None:
        return VllmEngine()
    log.info("engine auto is torch: %s", reason)
    return TorchEngine()


def check_installed(kind: str) -> None:
    """Raise ValueError for an engine whose program this environment lacks. Imports nothing."""
    if kind == "vllm" and find_spec("vllm") is None:
        raise ValueError(f"the engine vllm needs vLLM, which is not installed in {sys.prefix}; {WAYS_OUT}")


def _why_not_vllm(model: Checkpoint | Pretrained, options: EngineOptions) -> str | None:
    if find_spec("vllm") is None:
        return "vLLM is not installed"
    try:
        module = _module("vllm")
    except ValueError as error:
        return str(error)
    reason: str | None = module.refusal(content(model), options)
    return reason


def _module(kind: str) -> ModuleType:
    """The module of an engine. Raises ValueError for vLLM in an environment that lacks it, or whose vLLM is broken."""
    check_installed(kind)
    try:
        return module_of("vila_ops.engines", ENGINES, kind)
    except Exception as error:  # packages that do not fit each other: torchvision's operators raise RuntimeError
        if kind != "vllm":
            raise
        raise ValueError(f"vLLM of {sys.prefix} cannot be imported ({error!r}); {WAYS_OUT}") from error


@lru_cache(maxsize=1)
def tokenizer_of(model: Checkpoint | Pretrained) -> "Tokenizer":
    """The tokenizer of a sealed model, without its weights. Raises CorruptArtifact."""
    return tokenizer_in(content(model))


def tokenizer_in(folder: Path) -> "Tokenizer":
    """The tokenizer of any model folder. Raises CorruptArtifact or ValueError."""
    from vila_ops.data.text.conversation import Tokenizer
    from vila_ops.model.folder import read_config
    from vila_ops.packages.tokenizer import read_tokenizer

    config = read_config(folder)
    return Tokenizer(read_tokenizer(folder), image_tokens=config.image_seq_length, after_image=config.after_image)


def context_of(model: Checkpoint | Pretrained) -> int | None:
    """Most tokens that a sealed model reads, without its weights; None if its config does not say. Raises
    CorruptArtifact."""
    from vila_ops.model.context import context_length

    return context_length(read_json(file(model, "config.json")).get("text_config", {}))


def open_folder(folder: Path, config: OwnEngine, options: EngineOptions) -> Engine:
    """The engine of any model folder, ours or of another program; nothing in it is trusted.

    `config` is of one of our kinds or of a plugin's. Raises CorruptArtifact or ValueError with what is wrong with the
    folder, before anything in it is used, and ValueError for an engine that is not installed.
    """
    engine: Engine = _module(config.kind).open_engine(config, folder, options)
    return engine


def engine_facts(config: OwnEngine) -> dict[str, Any]:
    """Settings of an engine, and package, version and revision of a plugin, for the execution part of a manifest."""
    plugin = provenance("vila_ops.engines", ENGINES, config.kind)
    return config.model_dump(mode="json") | ({"plugin": plugin} if plugin else {})
