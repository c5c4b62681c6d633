"""A whole model's folder as what a recipe starts from: copied, if it is the model that the recipe describes."""

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
"""Of the files that make a model's folder; anything else in it is left behind."""
SIZED_BY_THE_MODEL = {"image_size", "vocab_size"}
"""Of a part's shape: its position table and its embedding have grown to what the whole needs."""


def start_from(model: Model, source: Path, out: Path, *, cache: Path) -> None:
    """Copy the model in `source` to `out`, to the byte, but for what its settings say of where they were read.

    Raises CorruptArtifact if its weights are not those that its config names, ValueError that lists every difference
    from the recipe, both values told.
    """
    config = folder.load(source).config
    tokenizer = read_tokenizer(source)
    wanted = build_tokenizer(model.language_model, chat_template=model.chat_template, cache=cache)
    if found := [*_in_the_config(model, config, source), *_in_the_tokenizer(model, config, tokenizer, wanted)]:
        raise ValueError(f"the model in {source} is not the recipe's: " + "; ".join(found))
    for path in sorted(source.iterdir()):
        if path.suffix in SUFFIXES and path.is_file():
            shutil.copyfile(path, out / path.name)
    folder.drop_places(out)


def _in_the_config(model: Model, config: VilaConfig, source: Path) -> list[str]:
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
    for part, shape in shapes.items():
        for name in sorted(set(shape) & set(stated[part]) - SIZED_BY_THE_MODEL):
            its = stated[part][name]
            pairs[f"{part} {name}"] = (square_side(its) if isinstance(its, list | tuple) else its, shape[name])
    return [f"its {name} is {its!r}, the recipe's {ours!r}" for name, (its, ours) in pairs.items() if its != ours]


def _in_the_tokenizer(
    model: Model, config: VilaConfig, its: PreTrainedTokenizerFast, ours: PreTrainedTokenizerFast
) -> list[str]:
    found = []
    if its.get_vocab() != ours.get_vocab():
        other = sorted(set(its.get_vocab().items()) ^ set(ours.get_vocab().items()))[:2]
        found.append(f"its tokenizer has {len(its)} tokens, the recipe's {len(ours)}; they differ in {other}")
    if config.image_token_id != (image_id := ours.convert_tokens_to_ids(IMAGE_TOKEN)):
        found.append(f"its image token is {config.image_token_id}, the recipe's {image_id}")
    if its.chat_template != ours.chat_template:
        found.append(f"its chat template is not the recipe's {model.chat_template!r}; `{OWN_TEMPLATE}` keeps its own")
    return found


def _shape(part: VisionTower | LanguageModel) -> Shape:
    """What a recipe says of the shape of a part, in transformers' words."""
    match part:
        case HubTower(shape=shape) | HubLanguageModel(shape=shape):
            return shape or {}
        case RandomTower() | RandomLanguageModel():
            heads = part.num_heads
            return {"hidden_size": part.hidden_size, "num_hidden_layers": part.num_layers, "num_attention_heads": heads}
        case PackagedTower() | PackagedLanguageModel():
            return {}
        case _:
            assert_never(part)
