"""A model to a transformers folder and back. What LLaVA's format can hold is saved as a plain LLaVA folder."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlavaConfig, LlavaProcessor

from vila_ops.artifacts.store import CorruptArtifact
from vila_ops.config.model import LinearProjector, MlpProjector
from vila_ops.config.train import Lora, Tuning
from vila_ops.model import lora
from vila_ops.model.change import Change, changed
from vila_ops.model.configuration import VilaConfig
from vila_ops.model.processing import read_fit
from vila_ops.model.trainable import LORA
from vila_ops.model.vila import VilaForConditionalGeneration

PREFIX = "model.multi_modal_projector."
OURS = ("projector", "visual_expert", "vision_side", "image_fit")
"""Config fields that LLaVA's format does not know."""
HEAD = "lm_head.weight"
ADAPTER = "adapter"
"""Folder inside the folder of a model that a LoRA stage trained."""


def save(model: VilaForConditionalGeneration, folder: Path, *, processor: LlavaProcessor) -> None:
    """Write weights (safetensors), config, processor, tokenizer and chat template."""
    processor.save_pretrained(folder)
    _write_config(model.config, folder)
    _write_weights(dict(model.state_dict()), folder, tied=model.config.tie_word_embeddings)


def is_plain(config: VilaConfig) -> bool:
    """Whether LLaVA's own format can hold the model."""
    match config.projector_choice():
        case LinearProjector() | MlpProjector(depth=2):
            return not config.visual_expert
        case _:
            return False


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
    stated = _read_config(init)
    config, state = changed(stated, _read_weights(init, stated), change)
    whole = {name: tensor for name, tensor in trained.items() if LORA not in name}
    if unknown := sorted(set(whole) - set(state)):
        raise ValueError(f"{init} has no parameters {unknown[:3]} that were trained")
    state |= {name: tensor.to(state[name].dtype) for name, tensor in whole.items()}
    if config is not stated:
        _write_config(config, folder)
        _set_processor_size(folder, config.vision_side)
    if not isinstance(tuning, Lora):
        _write_weights(state, folder, tied=config.tie_word_embeddings)
        return
    adapter = lora.adapter_of(trained, tuning)
    written = _write_weights(lora.merge(state, adapter), folder, tied=config.tie_word_embeddings)
    modules = tuple({".".join(name.split(".")[:2]) + "." for name in whole})
    lora.write(adapter, folder / ADAPTER, whole={name: t for name, t in written.items() if name.startswith(modules)})


def load(
    folder: Path, *, dtype: torch.dtype = torch.float32, change: Change | None = None
) -> VilaForConditionalGeneration:
    """The model of a folder, plain LLaVA or ours, in eval mode. Raises CorruptArtifact on a wrong set of weights."""
    stated = _read_config(folder)
    config, state = changed(stated, _read_weights(folder, stated), change or Change())
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
    stated = json.loads((folder / "processor_config.json").read_text())["image_processor"]
    return tuple(stated["image_mean"]), tuple(stated["image_std"])


def _read_config(folder: Path) -> VilaConfig:
    stated: dict[str, Any] = json.loads((folder / "config.json").read_text())
    kind = stated.pop("model_type")
    if kind == LlavaConfig.model_type:
        projector = {"kind": "linear" if stated["projector_hidden_act"] == "linear" else "mlp_gelu"}
        images = json.loads((folder / "processor_config.json").read_text())["image_processor"]
        fit, side = read_fit(images)
        return VilaConfig(**stated, projector=projector, vision_side=side, image_fit=fit)
    if kind != VilaConfig.model_type:
        raise ValueError(
            f"{folder} holds a {kind!r} model; we read {LlavaConfig.model_type} and {VilaConfig.model_type}"
        )
    return VilaConfig(**stated)


def _write_config(config: VilaConfig, folder: Path) -> None:
    stated: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    stated["architectures"] = [VilaForConditionalGeneration.__name__]
    if is_plain(config):
        stated = _plain(stated)
    (folder / "config.json").write_text(json.dumps(stated, indent=2, sort_keys=True) + "\n")


def _set_processor_size(folder: Path, side: int) -> None:
    """Pictures of another size: every side that the image processor uses becomes `side` pixels."""
    path = folder / "processor_config.json"
    stated = json.loads(path.read_text())
    images = stated["image_processor"]
    for key in ("size", "crop_size") if images.get("do_center_crop") else ("size",):
        images[key] = {name: value and side for name, value in images[key].items()}
    path.write_text(json.dumps(stated, indent=2, sort_keys=True) + "\n")


def _plain(config: dict[str, Any]) -> dict[str, Any]:
    """The same config in LLaVA's own terms, for stock transformers."""
    plain = {key: value for key, value in config.items() if key not in OURS}
    act = "linear" if config["projector"]["kind"] == "linear" else "gelu"
    stock = {"model_type": LlavaConfig.model_type, "architectures": ["LlavaForConditionalGeneration"]}
    return {**plain, **stock, "projector_hidden_act": act}


def _read_weights(folder: Path, config: VilaConfig) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            state.update(load_file(path))
        except SafetensorError as error:
            raise CorruptArtifact(f"{path} is not a readable safetensors file ({error})") from error
    return _mlp_as_linear(state, folder) if isinstance(config.projector_choice(), LinearProjector) else state


def _write_weights(state: dict[str, Tensor], folder: Path, *, tied: bool) -> dict[str, Tensor]:
    """Write weights as LLaVA's format names them; returns them so."""
    if f"{PREFIX}linear.weight" in state:
        state = _linear_as_mlp(state)
    if tied:
        state.pop(HEAD, None)  # the embedding again
    written = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    save_torch_state_dict(written, folder)
    return written


def _linear_as_mlp(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A linear projector is an MLP with identity activation and an identity second layer: exact."""
    out = {name: tensor for name, tensor in state.items() if not name.startswith(PREFIX)}
    weight, bias = state[f"{PREFIX}linear.weight"], state[f"{PREFIX}linear.bias"]
    out[f"{PREFIX}linear_1.weight"], out[f"{PREFIX}linear_1.bias"] = weight, bias
    out[f"{PREFIX}linear_2.weight"] = torch.eye(len(weight), dtype=weight.dtype)
    out[f"{PREFIX}linear_2.bias"] = torch.zeros(len(weight), dtype=weight.dtype)
    return out


def _mlp_as_linear(state: dict[str, Tensor], folder: Path) -> dict[str, Tensor]:
    out = {name: tensor for name, tensor in state.items() if not name.startswith(PREFIX)}
    if missing := sorted({f"{PREFIX}linear_{n}.{kind}" for n in (1, 2) for kind in ("weight", "bias")} - set(state)):
        raise CorruptArtifact(f"{folder} does not hold {missing}")
    second = state[f"{PREFIX}linear_2.weight"]
    if not torch.equal(second, torch.eye(len(second), dtype=second.dtype)) or state[f"{PREFIX}linear_2.bias"].any():
        raise ValueError(f"{folder}: the projector's second layer is not the identity, so it is no linear projector")
    out[f"{PREFIX}linear.weight"] = state[f"{PREFIX}linear_1.weight"]
    out[f"{PREFIX}linear.bias"] = state[f"{PREFIX}linear_1.bias"]
    return out
