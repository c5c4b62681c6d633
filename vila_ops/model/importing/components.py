"""The parts of third-party checkpoint, read from their folders: safetensors alone, no code run, every key used."""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from vila_ops.config.model import Component, HubTower, ImageFit, Projector
from vila_ops.errors import CorruptArtifact
from vila_ops.model.importing.internvit import INTERNVIT, translated, translated_config
from vila_ops.packages.imagenet import IMAGENET, Channels
from vila_ops.packages.normalisation import mean_std
from vila_ops.packages.untrusted import check_layers, read_header, read_json

MeanStd = tuple[Channels, Channels]
DERIVED = ("position_ids", "rotary_emb.inv_freq")
"""Ends of keys that old transformers saved though they follow from the config."""
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


@dataclass(frozen=True)
class Components:
    """What a checkpoint holds, in our terms."""

    tower: PreTrainedModel
    projector: Projector
    layers: list[dict[str, Tensor]]
    """Weight and bias of the projector's norms and linear layers, in the order in which they are applied."""
    language_model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    mean_std: MeanStd
    feature_layer: int
    image_aspect_ratio: ImageFit
    chat_template: str
    """Name of a template of ours, or `tokenizer`."""
    after_image: str
    notes: tuple[str, ...]
    """What the user should know: how things were told, and what is not taken over."""


def read_state(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder's safetensors files. Pickles are never opened; a folder of nothing else is refused."""
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
        read_header(path)  # refuses what lies about itself, before any of it is loaded
        held = load_file(path)
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
    return load_strictly("vision_tower", _native_config(folder), state, folder)


def load_language_model(folder: Path) -> PreTrainedModel:
    """The causal language model of a folder."""
    stated = read_json(folder / "config.json")
    if method := stated.get("quantization_config"):
        name = method.get("quant_method") if isinstance(method, dict) else method
        raise ValueError(f"{folder} is quantised ({name}); import the checkpoint that it was made from")
    return load_strictly("language_model", _native_config(folder), read_state(folder), folder)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a folder, from tokenizer.json, sentencepiece's tokenizer.model, or vocab.json and merges.txt."""
    if (folder / "tokenizer.json").is_file():
        return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise ValueError(f"{folder} has no tokenizer: none of {list(TOKENIZER_FILES)}")
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False, legacy=False)
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ValueError(f"{folder}: {type(tokenizer).__name__} is no fast tokenizer, the only kind that is supported")
    return tokenizer


def mean_std_of(folder: Path) -> MeanStd:
    """Channel mean and deviation of a tower's pixels, by its folder."""
    if read_json(folder / "config.json").get("model_type") == INTERNVIT:
        return IMAGENET  # fixed in NVlabs' intern_encoder.py; its preprocessor_config.json tells nothing
    return mean_std(HubTower(name=str(folder), revision="local"))


def _native_config(folder: Path) -> PreTrainedConfig:
    """A folder's config by transformers' own class; `auto_map` in it is never followed."""
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (KeyError, ValueError) as error:
        kind = read_json(folder / "config.json").get("model_type")
        raise ValueError(
            f"{folder} holds a model of type {kind!r}, for which transformers has no class of its own; code that comes "
            f"with a checkpoint is not run"
        ) from error


def load_strictly(part: Component, config: PreTrainedConfig, state: dict[str, Tensor], folder: Path) -> PreTrainedModel:
    """A tower or language model of exactly these weights, in the precision that they have.

    Raises CorruptArtifact that names what is missing, unknown or misshapen.
    """
    check_layers(config.to_dict(), len(state), folder / "config.json")
    state = {name: tensor for name, tensor in state.items() if not name.endswith(DERIVED)}
    precisions = {tensor.dtype for tensor in state.values() if tensor.is_floating_point()}
    config.architectures, config._name_or_path = None, ""  # theirs, and this machine's
    if hasattr(config, "auto_map"):
        del config.auto_map
    with torch.device("meta"):
        auto = AutoModelForCausalLM if part == "language_model" else AutoModel
        empty = auto.from_config(config, trust_remote_code=False)
    model, info = type(empty).from_pretrained(
        None,
        config=config,
        state_dict=state,
        dtype=max(precisions, key=lambda dtype: dtype.itemsize),
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # they are in the info, and refused below
    )
    wrong = {key: sorted(info[key]) for key in ("missing_keys", "unexpected_keys", "mismatched_keys") if info[key]}
    if wrong:
        raise CorruptArtifact(f"{folder} does not hold the {part} that its config names: {wrong}")
    loaded: PreTrainedModel = model.eval()
    return loaded
