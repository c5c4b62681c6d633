"""Start a recipe from the folder of a whole model: compare it with the recipe, then copy it."""

import shutil
from pathlib import Path
from typing import Any, assert_never

from transformers import PreTrainedTokenizerFast

from vila_ops.config import Model
from vila_ops.config.model import (
    HubLanguageModel,
    HubTower,
    LanguageModel,
    PackagedLanguageModel,
    PackagedTower,
    RandomLanguageModel,
    RandomTower,
    Shape,
    VisionTower,
)
from vila_ops.model import folder
from vila_ops.model.configuration import VilaConfig
from vila_ops.model.towers import patch_side, square_side
from vila_ops.packages.normalisation import mean_std
from vila_ops.packages.tokenizer import IMAGE_TOKEN, OWN_TEMPLATE, build_tokenizer, read_tokenizer

SUFFIXES = (".json", ".safetensors", ".jinja", ".txt", ".model")
"""Endings of the files that are copied."""
RESIZED = {"image_size", "vocab_size"}
"""Fields of a shape that are not compared: the whole model resized position table and embedding."""


def start_from(model: Model, source: Path, out: Path, *, cache: Path) -> None:
    """Copy the model in `source` to `out`, unchanged except for paths in its settings.

    Raises CorruptArtifact for weights that its config does not describe, and ValueError with every difference from the
    recipe, both values given.
    """
    config = folder.load(source).config
    tokenizer = read_tokenizer(source)
    wanted = build_tokenizer(model.language_model, chat_template=model.chat_template, cache=cache)
    differences = _config_differences(model, config, source)
    differences += _tokenizer_differences(model, config, tokenizer, wanted)
    if differences:
        raise ValueError(f"the model in {source} is not the recipe's: " + "; ".join(differences))
    for path in sorted(source.iterdir()):
        if path.suffix in SUFFIXES and path.is_file():
            shutil.copyfile(path, out / path.name)
    folder.drop_local_paths(out)


def _config_differences(model: Model, config: VilaConfig, source: Path) -> list[str]:
    pairs: dict[str, tuple[Any, Any]] = {
        "projector": (config.projector_choice().model_dump(), model.projector.model_dump()),
        "image_size": (config.vision_side, model.image_size),
        "patch_size": (patch_side(config.vision_config), model.patch_size),
        "feature_layer": (config.vision_feature_layer, model.feature_layer),
        "image_aspect_ratio": (config.image_aspect_ratio, model.image_aspect_ratio),
        "mean and deviation": (folder.normalisation(source), mean_std(model.vision_tower)),
        "after_image": (config.after_image, model.after_image),
    }
    shapes = {"vision_tower": _shape(model.vision_tower), "language_model": _shape(model.language_model)}
    stated = {"vision_tower": config.vision_config.to_dict(), "language_model": config.text_config.to_dict()}
    for component, shape in shapes.items():
        for name in sorted(set(shape) & set(stated[component]) - RESIZED):
            its = stated[component][name]
            pairs[f"{component} {name}"] = (square_side(its) if isinstance(its, list | tuple) else its, shape[name])
    return [f"its {name} is {its!r}, the recipe's {ours!r}" for name, (its, ours) in pairs.items() if its != ours]


def _tokenizer_differences(
    model: Model, config: VilaConfig, its: PreTrainedTokenizerFast, ours: PreTrainedTokenizerFast
) -> list[str]:
    differences = []
    if its.get_vocab() != ours.get_vocab():
        other = sorted(set(its.get_vocab().items()) ^ set(ours.get_vocab().items()))[:2]
        differences.append(f"its tokenizer has {len(its)} tokens, the recipe's {len(ours)}; they differ in {other}")
    if config.image_token_id != (image_id := ours.convert_tokens_to_ids(IMAGE_TOKEN)):
        differences.append(f"its image token is {config.image_token_id}, the recipe's {image_id}")
    if its.chat_template != ours.chat_template:
        differences.append(
            f"its chat template is not the recipe's {model.chat_template!r}; {OWN_TEMPLATE!r} keeps its own"
        )
    return differences


def _shape(component: VisionTower | LanguageModel) -> Shape:
    """The fields of transformers' config that a recipe states for a component."""
    match component:
        case HubTower(shape=shape) | HubLanguageModel(shape=shape):
            return shape or {}
        case RandomTower() | RandomLanguageModel():
            return {
                "hidden_size": component.hidden_size,
                "num_hidden_layers": component.num_layers,
                "num_attention_heads": component.num_heads,
            }
        case PackagedTower() | PackagedLanguageModel():
            return {}
        case _:
            assert_never(component)
