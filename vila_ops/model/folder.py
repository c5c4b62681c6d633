"""Write a model as a transformers folder and read it back; a plain LLaVA folder wherever that format can hold it."""

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
from vila_ops.model.component import described_by, from_state
from vila_ops.model.configuration import VilaConfig
from vila_ops.model.language_models import PLAIN_HEAD, check_language_model, check_plain_head, head_form
from vila_ops.model.modify import Modifications, modified
from vila_ops.model.processing import read_fit
from vila_ops.model.projectors import plugin_of
from vila_ops.model.trainable import LORA
from vila_ops.model.vila import VilaForConditionalGeneration
from vila_ops.model.weights import on_meta, read_weights, write_weights
from vila_ops.packages.tokenizer import stop_ids
from vila_ops.packages.untrusted import check_folder, check_layers, read_json, stored_tensors

OWN_FIELDS = ("projector", "projector_plugin", "visual_expert", "vision_side", "image_aspect_ratio")
"""Config fields that LLaVA's format does not know."""
ADAPTER = "adapter"
"""Subfolder with the adapter, in the folder of a model that a LoRA stage trained."""
TOKENIZER_PATH_KEYS = (
    "is_local", "local_files_only", "name_or_path", "tokenizer_file", "special_tokens_map_file", "vocab_file",
    "merges_file",
)  # fmt: skip
"""Fields of tokenizer_config.json that say where and how the tokenizer was read."""
PATH_KEY = "_name_or_path"
"""Config field in which transformers records where the config was read: a path of one machine."""
PLUGIN_FACTS = {"package", "version", "revision"}
"""Fields of `projector_plugin` in a config."""
MAX_SIDE = 4096
"""Largest image side in pixels that is accepted from a folder."""
_COUNTED: dict[str, int] = {}
"""Tokens of an image, by the config as JSON."""


def save(model: VilaForConditionalGeneration, folder: Path, *, processor: LlavaProcessor) -> None:
    """Write weights (safetensors), config, processor, tokenizer and chat template."""
    processor.save_pretrained(folder)
    drop_local_paths(folder)
    _write_config(model.config, folder, dtype=model.dtype)
    _write_json(folder / "generation_config.json", _generation(model.config, processor))
    write_weights(dict(model.state_dict()), folder, config=model.config)


def drop_local_paths(folder: Path) -> None:
    """Remove the paths of one machine from a folder's settings; a file without them keeps its bytes."""
    for name in ("config.json", "tokenizer_config.json"):
        if not (path := folder / name).is_file():
            continue
        stated = read_json(path)
        kept = without_local_paths(stated)
        if name == "tokenizer_config.json":
            kept = {key: value for key, value in kept.items() if key not in TOKENIZER_PATH_KEYS}
        if kept != stated:
            _write_json(path, kept)


def without_local_paths(stated: Any) -> Any:
    """The settings without PATH_KEY, at any depth."""
    if isinstance(stated, dict):
        return {key: without_local_paths(value) for key, value in stated.items() if key != PATH_KEY}
    return [without_local_paths(item) for item in stated] if isinstance(stated, list) else stated


def is_plain(config: VilaConfig) -> bool:
    """Whether LLaVA's format can hold the model."""
    return (
        config.projector_choice().fits_llava()
        and not config.visual_expert
        and head_form(config.text_config) == PLAIN_HEAD
    )


def save_trained(
    trained: dict[str, Tensor], folder: Path, *, init: Path, modifications: Modifications, tuning: Tuning | None = None
) -> None:
    """Write a copy of the model folder `init` with the `trained` parameters, by name; all others are unchanged bytes.

    `modifications` are those that the stage made before it trained. LoRA's parameters are merged into the weights of
    `init` and also written beside them as a PEFT adapter, which gives the same model on top of `init` unless that was
    modified. Raises ValueError for a parameter that the model does not have.
    """
    for path in init.iterdir():
        if path.is_dir():
            continue  # an earlier stage's adapter, which is merged already
        if path.suffix != ".safetensors" and not path.name.endswith(".index.json"):
            shutil.copyfile(path, folder / path.name)
    stated = read_config(init)
    config, state = modified(stated, read_weights(init, stated), modifications)
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
    folder: Path, *, dtype: torch.dtype = torch.float32, modifications: Modifications | None = None
) -> VilaForConditionalGeneration:
    """The model of a folder in eval mode; the folder is ours or plain LLaVA by any writer.

    Files, settings, headers and shapes are checked before memory is allocated, shapes by a forward pass on the meta
    device. Raises CorruptArtifact, and ValueError for a kind of model that is not supported.
    """
    stated = read_config(folder)
    config, state = modified(stated, read_weights(folder, stated), modifications or Modifications())
    model: VilaForConditionalGeneration = from_state(
        VilaForConditionalGeneration, config, state, dtype=dtype, holder=f"{folder} does not hold the weights"
    )
    model.tie_weights()
    return model


def normalisation(folder: Path) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel that a folder's image processor applies. Raises CorruptArtifact."""
    stated = image_processor(folder)
    pair: list[Any] = [stated.get(key) for key in ("image_mean", "image_std")]
    for values in pair:
        if not isinstance(values, list) or len(values) != 3 or not all(isinstance(one, int | float) for one in values):
            raise CorruptArtifact(
                f"{folder}: its image processor has image_mean and image_std {pair}, not 3 numbers each"
            )
    mean, std = (tuple(map(float, values)) for values in pair)
    if min(std) <= 0:
        raise CorruptArtifact(f"{folder}: its image processor has image_std {std}; each must be above 0")
    return mean, std


def image_processor(folder: Path) -> dict[str, Any]:
    """Settings of a folder's image processor, from the file of transformers 5 or that of transformers 4."""
    current = folder / "processor_config.json"
    stated = read_json(current).get("image_processor") if current.is_file() else None
    stated = read_json(folder / "preprocessor_config.json") if stated is None else stated
    if not isinstance(stated, dict):
        raise CorruptArtifact(f"{current}: image_processor is not an object")
    return stated


def read_config(folder: Path) -> VilaConfig:
    """The config of a folder, checked by a forward pass on the meta device. Raises CorruptArtifact or ValueError."""
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
            f"{folder} holds a {kind!r} model; supported are {LlavaConfig.model_type} and {VilaConfig.model_type}"
        )
    elif "image_aspect_ratio" not in stated:
        raise ValueError(
            f"{folder / 'config.json'} states no image_aspect_ratio: another version of vila-ops wrote it; import or "
            f"train the model again"
        )
    with described_by(folder / "config.json"):
        config = VilaConfig(**stated)
    check_language_model(config.text_config, folder)
    if kind == LlavaConfig.model_type:
        check_plain_head(config.text_config, folder)
    with described_by(folder / "config.json"):
        tokens = _image_tokens(config)
    if kind == LlavaConfig.model_type:
        config.image_seq_length = tokens  # older writers leave it out, and stock transformers computes it
    if tokens != config.image_seq_length:
        raise CorruptArtifact(
            f"{folder / 'config.json'} has image_seq_length {config.image_seq_length}, but its tower and projector "
            f"give {tokens} tokens for an image"
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
    """Tokens of one image. A process counts them once for each config."""
    stated = config.to_json_string(use_diff=False)
    if stated not in _COUNTED:
        _COUNTED[stated] = _count_image_tokens(config)
    return _COUNTED[stated]


def _count_image_tokens(config: VilaConfig) -> int:
    """Tokens of one image, counted by a forward pass on the meta device through the whole model."""
    if not 0 <= config.image_token_index < config.text_config.vocab_size:
        raise ValueError(
            f"image_token_index {config.image_token_index} is not below vocab_size {config.text_config.vocab_size}"
        )
    model = on_meta(config)
    with torch.device("meta"):
        features = model.tower_features(torch.empty(1, 3, config.vision_side, config.vision_side))
        projected: Tensor = model.model.multi_modal_projector(features)
        count = projected.shape[1]
        mask = torch.ones(1, 1, count, count, dtype=torch.bool)  # explicit, or transformers reads the data to build one
        routing = {"routes": None} if config.visual_expert else {}
        hidden = model.hidden(projected, attention_mask=mask, use_cache=False, **routing).last_hidden_state
        model.lm_head(hidden)
    return count


def fit_of(folder: Path) -> tuple[ImageFit, int]:
    """How a folder's image processor makes an image square, and the side in pixels. Raises CorruptArtifact."""
    stated = image_processor(folder)
    try:
        fit, side = read_fit(stated)
    except (AttributeError, TypeError, ValueError) as error:
        raise CorruptArtifact(f"{folder}: its image processor is not supported ({error})") from error
    if type(side) is not int or not 0 < side <= MAX_SIDE:
        raise CorruptArtifact(
            f"{folder}: its image processor gives images of {side} pixels a side; supported are 1 to {MAX_SIDE}"
        )
    return fit, side


def _write_config(config: VilaConfig, folder: Path, *, dtype: torch.dtype) -> None:
    stated: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    if stated["projector_plugin"] is None:
        del stated["projector_plugin"]
    stated["architectures"] = [VilaForConditionalGeneration.__name__]
    for section in (stated, stated["text_config"], stated["vision_config"]):
        section["dtype"] = str(dtype).removeprefix("torch.")
    _write_json(folder / "config.json", without_local_paths(_plain(stated) if is_plain(config) else stated))


def _set_processor_size(folder: Path, side: int) -> None:
    """Set every side that the folder's image processor uses to `side` pixels."""
    path = folder / "processor_config.json"
    stated = read_json(path)
    images = stated["image_processor"]
    for key in ("size", "crop_size") if images.get("do_center_crop") else ("size",):
        images[key] = {name: value and side for name, value in images[key].items()}
    _write_json(path, stated)


def _plain(config: dict[str, Any]) -> dict[str, Any]:
    """The config in LLaVA's terms, for stock transformers."""
    plain = {key: value for key, value in config.items() if key not in OWN_FIELDS}
    act = "linear" if config["projector"]["kind"] == "linear" else config["projector_hidden_act"]
    stock = {"model_type": LlavaConfig.model_type, "architectures": ["LlavaForConditionalGeneration"]}
    return {**plain, **stock, "projector_hidden_act": act}


def _generation(config: VilaConfig, processor: LlavaProcessor) -> dict[str, Any]:
    """Settings with which stock `generate` stops where our generator does and suppresses image and padding ids."""
    tokenizer = processor.tokenizer
    suppressed = [config.image_token_index, *range(len(tokenizer), config.text_config.vocab_size)]
    return {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": stop_ids(tokenizer),
        "pad_token_id": config.pad_token_id,
        "suppress_tokens": suppressed,
    }


def _write_json(path: Path, settings: dict[str, Any]) -> None:
    path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
