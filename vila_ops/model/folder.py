"""A model to a transformers folder and back. What LLaVA's format can hold is saved as a plain LLaVA folder."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlavaConfig, LlavaProcessor

from vila_ops.config.model import ImageFit
from vila_ops.config.train import Lora, Tuning
from vila_ops.errors import CorruptArtifact
from vila_ops.model import lora
from vila_ops.model.change import Change, changed
from vila_ops.model.configuration import VilaConfig
from vila_ops.model.processing import read_fit
from vila_ops.model.projectors import plugin_of
from vila_ops.model.trainable import LORA
from vila_ops.model.vila import VilaForConditionalGeneration
from vila_ops.model.weights import on_meta, read_weights, write_weights
from vila_ops.packages.tokenizer import stop_ids
from vila_ops.packages.untrusted import check_folder, check_layers, read_json, stored_tensors

OURS = ("projector", "projector_plugin", "visual_expert", "vision_side", "image_aspect_ratio")
"""Config fields that LLaVA's format does not know."""
ADAPTER = "adapter"
"""Folder inside the folder of a model that a LoRA stage trained."""
OF_READING = (
    "is_local", "local_files_only", "name_or_path", "tokenizer_file", "special_tokens_map_file", "vocab_file",
    "merges_file",
)  # fmt: skip
"""What transformers writes of where and how a tokenizer was read, into the tokenizer's own settings."""
PLACE = "_name_or_path"
"""What transformers writes into a config of where it was read: a path of one machine."""
PLUGIN_FACTS = {"package", "version", "revision"}
"""What the config states of a projector's plugin."""
MAX_SIDE = 4096


def save(model: VilaForConditionalGeneration, folder: Path, *, processor: LlavaProcessor) -> None:
    """Write weights (safetensors), config, processor, tokenizer and chat template."""
    processor.save_pretrained(folder)
    drop_places(folder)
    _write_config(model.config, folder, dtype=model.dtype)
    _write_json(folder / "generation_config.json", _generation(model.config, processor))
    write_weights(dict(model.state_dict()), folder, config=model.config)


def drop_places(folder: Path) -> None:
    """Remove from a folder's settings where they were read; a file that does not say it keeps its bytes."""
    for name in ("config.json", "tokenizer_config.json"):
        if not (path := folder / name).is_file():
            continue
        stated = read_json(path)
        kept = without_place(stated)
        if name == "tokenizer_config.json":
            kept = {key: value for key, value in kept.items() if key not in OF_READING}
        if kept != stated:
            _write_json(path, kept)


def without_place(stated: Any) -> Any:
    """Settings without PLACE, at any depth."""
    if isinstance(stated, dict):
        return {key: without_place(value) for key, value in stated.items() if key != PLACE}
    return [without_place(one) for one in stated] if isinstance(stated, list) else stated


def is_plain(config: VilaConfig) -> bool:
    """Whether LLaVA's own format can hold the model."""
    return config.projector_choice().fits_llava() and not config.visual_expert


def save_trained(
    trained: dict[str, Tensor], folder: Path, *, init: Path, change: Change, tuning: Tuning | None = None
) -> None:
    """Write a copy of the model folder `init` in which the named parameters are replaced; the rest to the bit.

    `change` is what the stage changed of the model before it trained. LoRA's parameters are merged into the weights of
    `init`, and are written beside them as a PEFT adapter, which makes the same model of `init`, unless that changed.
    """
    for path in init.iterdir():
        if path.is_dir():
            continue  # an earlier stage's adapter, which is in the weights
        if path.suffix != ".safetensors" and not path.name.endswith(".index.json"):
            shutil.copyfile(path, folder / path.name)
    stated = read_config(init)
    config, state = changed(stated, read_weights(init, stated), change)
    whole = {name: tensor for name, tensor in trained.items() if LORA not in name}
    if unknown := sorted(set(whole) - set(state)):
        raise ValueError(f"{init} has no parameters {unknown[:3]} that were trained")
    state |= {name: tensor.to(state[name].dtype) for name, tensor in whole.items()}
    if config is not stated:
        _write_config(config, folder, dtype=next(iter(state.values())).dtype)
        _set_processor_size(folder, config.vision_side)
    if not isinstance(tuning, Lora):
        write_weights(state, folder, config=config)
        return
    adapter = lora.adapter_of(trained, tuning)
    written = write_weights(lora.merge(state, adapter), folder, config=config)
    modules = tuple({".".join(name.split(".")[:2]) + "." for name in whole})
    lora.write(adapter, folder / ADAPTER, whole={name: t for name, t in written.items() if name.startswith(modules)})


def load(
    folder: Path, *, dtype: torch.dtype = torch.float32, change: Change | None = None
) -> VilaForConditionalGeneration:
    """The model of a folder, plain LLaVA (of any writer) or ours, in eval mode.

    Everything is looked at before memory is taken: files, settings, headers, and shapes by a pass without data. Raises
    CorruptArtifact, or ValueError for a kind of model that we do not read.
    """
    stated = read_config(folder)
    config, state = changed(stated, read_weights(folder, stated), change or Change())
    model, info = VilaForConditionalGeneration.from_pretrained(
        None,
        config=config,
        state_dict=state,
        dtype=dtype,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # they are in the info, and refused below
    )
    wrong = {key: sorted(info[key]) for key in ("missing_keys", "unexpected_keys", "mismatched_keys") if info[key]}
    if wrong:
        raise CorruptArtifact(f"{folder} does not hold the weights that its config names: {wrong}")
    model.tie_weights()
    loaded: VilaForConditionalGeneration = model.eval()
    return loaded


def normalisation(folder: Path) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Channel mean and deviation that a model folder's processor applies."""
    stated = image_processor(folder)
    found: list[Any] = [stated.get(key) for key in ("image_mean", "image_std")]
    for values in found:
        if not isinstance(values, list) or len(values) != 3 or not all(isinstance(one, int | float) for one in values):
            raise CorruptArtifact(
                f"{folder}: its image processor has image_mean and image_std {found}, not 3 numbers each"
            )
    mean, std = (tuple(map(float, values)) for values in found)
    if min(std) <= 0:
        raise CorruptArtifact(f"{folder}: its image processor has image_std {std}; deviations are above 0")
    return mean, std


def image_processor(folder: Path) -> dict[str, Any]:
    """The settings of a folder's image processor, in the file of today or in that of transformers 4."""
    today = folder / "processor_config.json"
    stated = read_json(today).get("image_processor") if today.is_file() else None
    stated = read_json(folder / "preprocessor_config.json") if stated is None else stated
    if not isinstance(stated, dict):
        raise CorruptArtifact(f"{today}: image_processor is no object")
    return stated


def read_config(folder: Path) -> VilaConfig:
    """The config of a folder, proved by a pass without data. Raises CorruptArtifact or ValueError."""
    check_folder(folder)
    stated = read_json(folder / "config.json")
    check_layers(stated, len(stored_tensors(folder)), folder / "config.json")
    _check_plugin(stated, folder)
    kind = stated.pop("model_type", None)
    if kind == LlavaConfig.model_type:
        act = stated.get("projector_hidden_act", "gelu")
        fit, side = fit_of(folder)
        stated |= {"projector": {"kind": "linear" if act == "linear" else "mlp_gelu"}}
        stated |= {"vision_side": side, "image_aspect_ratio": fit}
    elif kind != VilaConfig.model_type:
        raise ValueError(
            f"{folder} holds a {kind!r} model; we read {LlavaConfig.model_type} and {VilaConfig.model_type}"
        )
    try:
        config = VilaConfig(**stated)
        tokens = _image_tokens(config)
    except Exception as error:  # transformers' and torch's classes raise what they like for settings that do not fit
        raise CorruptArtifact(
            f"{folder / 'config.json'} describes no model that can be ({type(error).__name__}: {str(error)[:300]})"
        ) from error
    if kind == LlavaConfig.model_type:
        config.image_seq_length = tokens  # older writers do not say, and stock computes it too
    if tokens != config.image_seq_length:
        raise CorruptArtifact(
            f"{folder / 'config.json'} says {config.image_seq_length} tokens an image, but its tower and projector "
            f"give {tokens}"
        )
    return config


def _check_plugin(stated: dict[str, Any], folder: Path) -> None:
    """Raise ValueError if the projector needs a plugin that is not installed, or is installed in another revision."""
    if (needed := stated.get("projector_plugin")) is None:
        return
    projector = stated.get("projector")
    if not isinstance(projector, dict) or not isinstance(needed, dict) or set(needed) != PLUGIN_FACTS:
        raise CorruptArtifact(
            f"{folder / 'config.json'}: projector_plugin is not {sorted(PLUGIN_FACTS)} of a projector"
        )
    kind = projector.get("kind")
    package = f"{needed['package']} {needed['version']}"
    if (installed := plugin_of(str(kind))) is None:
        raise ValueError(
            f"{folder} has a projector of kind {kind!r}, which the package {package} adds; it is not installed here: "
            f"install it, if you trust it, and load the model again"
        )
    if (installed["package"], installed["revision"]) != (needed["package"], needed["revision"]):
        raise ValueError(
            f"{folder} needs revision {needed['revision']} of the projector {kind!r}, as in {package}; installed is "
            f"revision {installed['revision']}, of {installed['package']} {installed['version']}, whose results differ"
        )


def _image_tokens(config: VilaConfig) -> int:
    """Tokens of an image, found by a pass on the meta device through tower, projector and language model."""
    if not 0 <= config.image_token_index < config.text_config.vocab_size:
        raise ValueError(f"image token {config.image_token_index} of {config.text_config.vocab_size} tokens")
    model = on_meta(config)
    with torch.device("meta"):
        features = model.tower_features(torch.empty(1, 3, config.vision_side, config.vision_side))
        projected: Tensor = model.model.multi_modal_projector(features)
        count = projected.shape[1]
        mask = torch.ones(1, 1, count, count, dtype=torch.bool)  # given, or transformers looks into the data for it
        routing = {"routes": None} if config.visual_expert else {}
        hidden = model.hidden(projected, attention_mask=mask, use_cache=False, **routing).last_hidden_state
        model.lm_head(hidden)
    return count


def fit_of(folder: Path) -> tuple[ImageFit, int]:
    """How a folder's image processor makes a square of an image, and the square's side. Raises CorruptArtifact."""
    stated = image_processor(folder)
    try:
        fit, side = read_fit(stated)
    except (AttributeError, TypeError, ValueError) as error:
        raise CorruptArtifact(f"{folder}: its image processor is none that we have ({error})") from error
    if type(side) is not int or not 0 < side <= MAX_SIDE:
        raise CorruptArtifact(
            f"{folder}: its image processor makes squares of {side} pixels; from 1 to {MAX_SIDE} are read"
        )
    return fit, side


def _write_config(config: VilaConfig, folder: Path, *, dtype: torch.dtype) -> None:
    stated: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    if stated["projector_plugin"] is None:
        del stated["projector_plugin"]
    stated["architectures"] = [VilaForConditionalGeneration.__name__]
    for part in (stated, stated["text_config"], stated["vision_config"]):
        part["dtype"] = str(dtype).removeprefix("torch.")
    _write_json(folder / "config.json", without_place(_plain(stated) if is_plain(config) else stated))


def _set_processor_size(folder: Path, side: int) -> None:
    """Images of another size: every side that the image processor uses becomes `side` pixels."""
    path = folder / "processor_config.json"
    stated = read_json(path)
    images = stated["image_processor"]
    for key in ("size", "crop_size") if images.get("do_center_crop") else ("size",):
        images[key] = {name: value and side for name, value in images[key].items()}
    _write_json(path, stated)


def _plain(config: dict[str, Any]) -> dict[str, Any]:
    """The same config in LLaVA's own terms, for stock transformers."""
    plain = {key: value for key, value in config.items() if key not in OURS}
    act = "linear" if config["projector"]["kind"] == "linear" else config["projector_hidden_act"]
    stock = {"model_type": LlavaConfig.model_type, "architectures": ["LlavaForConditionalGeneration"]}
    return {**plain, **stock, "projector_hidden_act": act}


def _generation(config: VilaConfig, processor: LlavaProcessor) -> dict[str, Any]:
    """What makes stock `generate` say and stop as our generator does: it never says an image, nor a padding id."""
    tokenizer = processor.tokenizer
    unsaid = [config.image_token_index, *range(len(tokenizer), config.text_config.vocab_size)]
    return {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": stop_ids(tokenizer),
        "pad_token_id": config.pad_token_id,
        "suppress_tokens": unsaid,
    }


def _write_json(path: Path, settings: dict[str, Any]) -> None:
    path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
