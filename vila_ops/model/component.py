"""A vision tower or language model, read from a folder that is not trusted."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig, PreTrainedModel

from vila_ops.errors import CorruptArtifact, VilaError
from vila_ops.packages.untrusted import check_counts, check_layers, read_json, stored_tensors


def component_config(folder: Path) -> PreTrainedConfig:
    """The config of a folder by transformers' class of its model_type; an `auto_map` in it is ignored.

    Raises ValueError for a type that transformers does not have, and CorruptArtifact for settings that do not fit it.
    """
    path = folder / "config.json"
    stated = read_json(path)
    check_counts(stated, path)
    kind = stated.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:  # transformers guesses a missing one from the path
        raise ValueError(
            f"{path} has model_type {kind!r}, for which transformers has no class; code that comes with a checkpoint "
            f"is not run"
        )
    with described_by(path):
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


@contextmanager
def described_by(path: object) -> Iterator[None]:
    """Turn any error while a config is read or its model built into a CorruptArtifact that names the config's file."""
    try:
        yield
    except (VilaError, OSError, MemoryError):
        raise
    except Exception as error:  # transformers' and torch's classes raise what they like for settings that do not fit
        raise CorruptArtifact(
            f"{path} describes no model that can be built ({type(error).__name__}: {str(error)[:300]})"
        ) from error


def read_component(
    auto: Any, folder: Path, config: Any, *, key_mapping: dict[str, str] | None = None
) -> PreTrainedModel:
    """The model of a folder by the class `auto` of transformers, in fp32. Raises CorruptArtifact for missing weights.

    Parameters are counted on the meta device first, so that a config cannot ask for more memory than its files fill.
    """
    stored = stored_tensors(folder)
    check_layers(config.to_dict(), len(stored), folder / "config.json")
    with described_by(folder / "config.json"), torch.device("meta"):
        wanted = sum(parameter.numel() for parameter in auto.from_config(config).parameters())
    held = sum(math.prod(tensor.shape) for tensor in stored.values())
    if wanted > held:
        raise CorruptArtifact(
            f"the config of {folder} describes {wanted} parameters, but its files hold {held} numbers; "
            f"fetch the folder again, or fix the config"
        )
    with described_by(folder / "config.json"):
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
    check_tied(model, folder)
    loaded: PreTrainedModel = model
    return loaded


def from_state(kind: Any, config: Any, state: dict[str, Tensor], *, dtype: torch.dtype, holder: str) -> Any:
    """A model of a class of transformers in eval mode, with the tensors of a state.

    Raises CorruptArtifact, which begins with `holder` ("FOLDER does not hold the ..."), unless they are those of the
    config.
    """
    model, info = kind.from_pretrained(
        None,
        config=config,
        state_dict=state,
        dtype=dtype,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # refused below
    )
    wrong = {key: sorted(info[key]) for key in ("missing_keys", "unexpected_keys", "mismatched_keys") if info[key]}
    if wrong:
        raise CorruptArtifact(f"{holder} of its config: {wrong}")
    return model.eval()


def check_tied(model: PreTrainedModel, folder: Path) -> None:
    """Raise CorruptArtifact if the config ties a head to its embedding and the folder holds another head.

    transformers keeps both then, and a model that is saved as tied would lose its head.
    """
    head = model.get_output_embeddings()
    if head is not None and model.config.tie_word_embeddings and head.weight is not model.get_input_embeddings().weight:
        raise CorruptArtifact(
            f"{folder} ties the head to the embedding but holds a different head; fix tie_word_embeddings"
        )
