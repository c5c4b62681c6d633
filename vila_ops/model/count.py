"""Number of parameters that a recipe's model has and trains, counted on the meta device without any download."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, assert_never

import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedConfig

from vila_ops.config import Component, Model, Stage
from vila_ops.config.model import (
    HubLanguageModel,
    HubTower,
    PackagedLanguageModel,
    PackagedTower,
    RandomLanguageModel,
    RandomTower,
)
from vila_ops.config.train import FullTuning, Lora, VisualExpert
from vila_ops.model.build import padded, random_language_model
from vila_ops.model.component import component_config, described_by
from vila_ops.model.configuration import VilaConfig
from vila_ops.model.language_models import check_language_model
from vila_ops.model.projectors import build_projector
from vila_ops.model.shapes import config_of
from vila_ops.model.towers import build_tower, vision_part, with_image_size
from vila_ops.model.visual_expert import expert_parameters
from vila_ops.packages.resolve import cached_language_model, cached_vision_tower
from vila_ops.packages.tokenizer import build_tokenizer
from vila_ops.packages.untrusted import read_json


@dataclass(frozen=True)
class Counts:
    """Parameters by component; None for a component whose shape is known only after `vila-ops fetch`."""

    vision_tower: int | None
    projector: int | None
    language_model: int | None
    """As published. The built model adds a row for <image> to embedding and head, and pads to a multiple of 64 rows."""
    expert: int | None
    """Parameters that a visual expert adds; None also for a language model that cannot have one."""
    adapted_width: int | None
    """Sum of inputs and outputs of the language model's linear layers without the head; LoRA adds rank times as many
    parameters."""

    def total(self, stages: tuple[Stage, ...] = ()) -> int | None:
        """Parameters of the whole model while the last of these stages trains: experts stay, adapters are merged."""
        counts = [self.vision_tower, self.projector, self.language_model]
        if any(isinstance(stage.tuning, VisualExpert) for stage in stages):
            counts.append(self.expert)
        if stages and isinstance(stages[-1].tuning, Lora) and "language_model" in stages[-1].trainable:
            counts.append(self._adapters(stages[-1].tuning))
        return _sum(counts)

    def trained(self, stages: tuple[Stage, ...]) -> int | None:
        """Parameters that the last of these stages trains."""
        return _sum([self._trained(component, stages) for component in stages[-1].trainable])

    def _trained(self, component: Component, stages: tuple[Stage, ...]) -> int | None:
        if component == "vision_tower":
            return self.vision_tower
        if component == "projector":
            return self.projector
        match stages[-1].tuning:
            case FullTuning():
                has_expert = any(isinstance(stage.tuning, VisualExpert) for stage in stages)
                return _sum([self.language_model, self.expert]) if has_expert else self.language_model
            case Lora() as lora:
                return self._adapters(lora)
            case VisualExpert():
                return self.expert
            case other:
                assert_never(other)

    def _adapters(self, lora: Lora) -> int | None:
        return None if self.adapted_width is None else lora.rank * self.adapted_width


def count(model: Model, *, cache: Path) -> Counts:
    """Parameters by component: from a `shape` in the recipe, or from a folder that is already in the cache."""
    vision = vision_config(model, cache)
    text = text_config(model, cache)
    with described_by("the model of the recipe"), torch.device("meta"):
        tower = AutoModel.from_config(vision) if vision else None
        language_model = AutoModelForCausalLM.from_config(text) if text else None
        projector = None
        if vision and text:
            choice = model.projector.model_dump(mode="json")
            projector = build_projector(VilaConfig(vision_config=vision, text_config=text, projector=choice))
    decoder = language_model.get_decoder() if language_model else None
    return Counts(
        vision_tower=_parameters(tower),
        projector=_parameters(projector),
        language_model=_parameters(language_model),
        expert=expert_parameters(decoder) if decoder else None,
        adapted_width=_adapted_width(decoder) if decoder else None,
    )


def vision_config(model: Model, cache: Path) -> PreTrainedConfig | None:
    """The tower's config at the recipe's image size; None if it is not in the cache."""
    match model.vision_tower:
        case RandomTower():
            with torch.device("meta"):
                config = build_tower(model, cache=cache).config
        case HubTower(shape=shape) | PackagedTower(shape=shape) if shape:
            config = config_of(shape)
        case HubTower() | PackagedTower():
            folder = cached_vision_tower(model.vision_tower, cache=cache)
            if folder is None:
                return None
            config = vision_part(component_config(folder))
        case _:
            assert_never(model.vision_tower)
    return with_image_size(config, model.image_size)


def text_config(model: Model, cache: Path) -> PreTrainedConfig | None:
    """The language model's config; None if it is not in the cache. Raises ValueError for a type without support."""
    config = _text_config(model, cache)
    if config is not None:
        check_language_model(config, "model.language_model")
    return config


def _text_config(model: Model, cache: Path) -> PreTrainedConfig | None:
    match model.language_model:
        case RandomLanguageModel() as random:
            tokenizer = build_tokenizer(random, chat_template=model.chat_template, cache=cache)
            return random_language_model(random, vocabulary=padded(len(tokenizer)))
        case HubLanguageModel(shape=shape) | PackagedLanguageModel(shape=shape) if shape:
            return config_of(shape)
        case HubLanguageModel() | PackagedLanguageModel():
            folder = cached_language_model(model.language_model, cache=cache)
            return component_config(folder) if folder else None
        case _:
            assert_never(model.language_model)


def stated_language_model(model: Model, cache: Path) -> Mapping[str, Any]:
    """The fields of the language model's config that are known without a download; none if it is not in the cache."""
    if model.weights is not None and (path := Path(model.weights.path) / "config.json").is_file():
        stated = read_json(path).get("text_config")
        return stated if isinstance(stated, dict) else {}
    if isinstance(model.language_model, HubLanguageModel) and model.language_model.shape:
        return model.language_model.shape  # other fields of `text_config` would be the defaults of their class
    config = text_config(model, cache)
    return config.to_dict() if config else {}


def _parameters(module: nn.Module | None) -> int | None:
    return None if module is None else sum(parameter.numel() for parameter in module.parameters())


def _adapted_width(decoder: nn.Module) -> int:
    linear = [module for module in decoder.modules() if isinstance(module, nn.Linear)]
    return sum(module.in_features + module.out_features for module in linear)


def _sum(counts: list[int | None]) -> int | None:
    known = [count for count in counts if count is not None]
    return sum(known) if len(known) == len(counts) else None
