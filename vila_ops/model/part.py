"""A tower or a language model from a folder that others wrote."""

import math
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from vila_ops.errors import CorruptArtifact
from vila_ops.packages.untrusted import check_layers, stored_tensors


def read_part(auto: Any, folder: Path, config: Any, *, key_mapping: dict[str, str] | None = None) -> PreTrainedModel:
    """A part from its folder, fp32. Raises CorruptArtifact where the files do not hold it in whole.

    Numbers are counted on the meta device first, so that a config cannot ask for memory that its files do not fill.
    """
    stored = stored_tensors(folder)
    check_layers(config.to_dict(), len(stored), folder / "config.json")
    try:
        with torch.device("meta"):
            wanted = sum(one.numel() for one in auto.from_config(config).parameters())
    except Exception as error:  # transformers' classes raise what they like for settings that do not fit
        raise CorruptArtifact(
            f"{folder / 'config.json'} describes no model that can be ({type(error).__name__}: {str(error)[:300]})"
        ) from error
    held = sum(math.prod(one.shape) for one in stored.values())
    if wanted > held:
        raise CorruptArtifact(
            f"the config of {folder} asks for {wanted} numbers, its files hold {held}; they do not match"
        )
    model, info = auto.from_pretrained(
        folder,
        config=config,
        key_mapping=key_mapping,
        local_files_only=True,
        dtype=torch.float32,
        use_safetensors=True,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # refused below
    )
    if wrong := sorted(map(str, {*info["missing_keys"], *info["mismatched_keys"]})):
        raise CorruptArtifact(f"{folder} does not hold {wrong[:3]} ({len(wrong)} in all) as its config names them")
    part: PreTrainedModel = model
    return part
