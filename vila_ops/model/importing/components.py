"""Read the components of a third-party checkpoint: safetensors only, no code is run, every tensor is used."""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from vila_ops.config.model import Component, HubTower, ImageFit, Projector
from vila_ops.errors import CorruptArtifact
from vila_ops.model.component import check_tied, component_config, described_by, from_state
from vila_ops.model.importing.internvit import INTERNVIT, translated, translated_config
from vila_ops.model.language_models import check_language_model
from vila_ops.model.towers import vision_part
from vila_ops.packages.imagenet import IMAGENET, Channels
from vila_ops.packages.normalisation import mean_std
from vila_ops.packages.untrusted import check_layers, read_header, read_json

MeanStd = tuple[Channels, Channels]
DERIVED = ("position_ids", "rotary_emb.inv_freq")
"""Endings of saved tensors that the config determines; older transformers saved them."""
PRECISIONS = {torch.float64, torch.float32, torch.bfloat16, torch.float16}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


@dataclass(frozen=True)
class Components:
    """The components and settings of a checkpoint, as a recipe states them."""

    tower: PreTrainedModel
    projector: Projector
    layers: list[dict[str, Tensor]]
    """Weight and bias of the projector's norms and linear layers, in the order of their application."""
    language_model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    mean_std: MeanStd
    feature_layer: int
    image_aspect_ratio: ImageFit
    chat_template: str
    """Name of a template in vila_ops/templates, or `tokenizer`."""
    after_image: str
    notes: tuple[str, ...]
    """For the user: what was inferred, and what was left out."""


def read_state(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder's safetensors files. Raises ValueError if there are none; pickles are never opened."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
        raise ValueError(
            f"{folder} has no safetensors file"
            + (f"; its {pickles} are pickles, which may run code and are never opened" if pickles else "")
            + "; save the weights as safetensors, where you trust the code, and import that"
        )
    state: dict[str, Tensor] = {}
    for path in files:
        read_header(path)  # refuses a false header before data are loaded
        try:
            held = load_file(path)
        except SafetensorError as error:
            raise CorruptArtifact(f"{path} is not a readable safetensors file ({error})") from error
        if twice := sorted(set(held) & set(state)):
            raise CorruptArtifact(f"{path} holds {twice[:3]}, which another file of the folder holds too")
        state |= held
    return state


def load_tower(folder: Path) -> PreTrainedModel:
    """The vision tower of a folder; InternViT's own format becomes transformers' InternVL tower."""
    stated = read_json(folder / "config.json")
    state = read_state(folder)
    if stated.get("model_type") == INTERNVIT:
        return load_strictly("vision_tower", translated_config(stated), translated(state), folder)
    return load_strictly("vision_tower", component_config(folder), state, folder)


def load_language_model(folder: Path) -> PreTrainedModel:
    """The causal language model of a folder."""
    stated = read_json(folder / "config.json")
    if method := stated.get("quantization_config"):
        name = method.get("quant_method") if isinstance(method, dict) else method
        raise ValueError(f"{folder} is quantised ({name}); import the checkpoint that it was made from")
    return load_strictly("language_model", component_config(folder), read_state(folder), folder)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a folder, from tokenizer.json, sentencepiece's tokenizer.model, or vocab.json and merges.txt."""
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise ValueError(f"{folder} has no tokenizer: none of {list(TOKENIZER_FILES)}")
    try:
        if (folder / "tokenizer.json").is_file():
            return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False, legacy=False)
    except Exception as error:  # the tokenizers library raises no other kind
        raise CorruptArtifact(f"the tokenizer in {folder} is not readable ({str(error)[:200]})") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ValueError(
            f"{folder}: {type(tokenizer).__name__} is not a fast tokenizer, the only kind that is supported"
        )
    return tokenizer


def mean_std_of(folder: Path) -> MeanStd:
    """Mean and standard deviation per channel of a tower's pixels, from its folder."""
    if read_json(folder / "config.json").get("model_type") == INTERNVIT:
        return IMAGENET  # constant in NVlabs' intern_encoder.py; the folder does not state it
    return mean_std(HubTower(name=str(folder), revision="local"))


def load_strictly(
    component: Component, config: PreTrainedConfig, state: dict[str, Tensor], folder: Path
) -> PreTrainedModel:
    """A tower or language model with exactly these weights, in their precision.

    Raises CorruptArtifact with the tensors that are missing, unexpected or misshapen.
    """
    if component == "language_model":
        check_language_model(config, folder)
    else:
        config = vision_part(config)
    check_layers(config.to_dict(), len(state), folder / "config.json")
    state = {name: tensor for name, tensor in state.items() if not name.endswith(DERIVED)}
    config.architectures, config._name_or_path = None, ""  # facts of the other program and of this machine
    if hasattr(config, "auto_map"):
        del config.auto_map
    dtype = _precision(component, state, folder)
    auto = AutoModelForCausalLM if component == "language_model" else AutoModel
    with described_by(folder / "config.json"):
        with torch.device("meta"):
            empty = auto.from_config(config, trust_remote_code=False)
        holder = f"{folder} does not hold the {component}"
        model: PreTrainedModel = from_state(type(empty), config, state, dtype=dtype, holder=holder)
    check_tied(model, folder)
    return model


def _precision(component: Component, state: dict[str, Tensor], folder: Path) -> torch.dtype:
    """The widest precision of weights. Raises CorruptArtifact for none, and for those of quantised weights."""
    precisions = {tensor.dtype for tensor in state.values() if tensor.is_floating_point()}
    if not precisions or not precisions <= PRECISIONS:
        names = sorted(map(str, precisions)) or "no numbers"
        raise CorruptArtifact(
            f"{folder} holds {names} for the {component}; supported are weights in {sorted(map(str, PRECISIONS))}"
        )
    return max(precisions, key=lambda dtype: dtype.itemsize)
