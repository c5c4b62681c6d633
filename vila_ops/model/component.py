"""A vision tower or language model, loaded from a folder that is not trusted."""

import math
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from vila_ops.errors import CorruptArtifact
from vila_ops.packages.untrusted import check_layers, stored_tensors


def read_component(
    auto: Any, folder: Path, config: Any, *, key_mapping: dict[str, str] | None = None
) -> PreTrainedModel:
    """The model of a folder by the class `auto` of transformers, in fp32. Raises CorruptArtifact for missing weights.

    Parameters are counted on the meta device first, so that a config cannot ask for more memory than its files fill.
    """
    stored = stored_tensors(folder)
    check_layers(config.to_dict(), len(stored), folder / "config.json")
    try:
        with torch.device("meta"):
            wanted = sum(parameter.numel() for parameter in auto.from_config(config).parameters())
    except Exception as error:  # transformers' classes raise what they like for settings that do not fit
        raise CorruptArtifact(
            f"{folder / 'config.json'} describes no model that can be built ({type(error).__name__}: "
            f"{str(error)[:300]})"
        ) from error
    held = sum(math.prod(tensor.shape) for tensor in stored.values())
    if wanted > held:
        raise CorruptArtifact(
            f"the config of {folder} describes {wanted} parameters, but its files hold {held} numbers; "
            f"fetch the folder again, or fix the config"
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
        raise CorruptArtifact(
            f"{folder} does not hold the parameters of its config; {len(wrong)} are missing or misshapen: {wrong[:3]}"
        )
    loaded: PreTrainedModel = model
    return loaded
