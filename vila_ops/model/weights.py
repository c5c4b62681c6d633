"""Read and write the weights of a model folder, in the key layouts of all LLaVA writers."""

import re
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from vila_ops.artifacts.disk_faults import require
from vila_ops.config.model import LinearProjector
from vila_ops.errors import CorruptArtifact
from vila_ops.model.configuration import VilaConfig
from vila_ops.model.projectors import linear
from vila_ops.model.vila import VilaForConditionalGeneration
from vila_ops.packages.untrusted import BYTES_OF, Stored, stored_tensors

PREFIX = "model.multi_modal_projector."
HEAD = "lm_head.weight"
EMBEDDING = "model.language_model.embed_tokens.weight"
RENAMED = tuple(
    (re.compile(old), new)
    for old, new in (
        (r"^language_model\.lm_head\.", "lm_head."),
        (r"^language_model\.model\.", "model.language_model."),
        (r"^(vision_tower|multi_modal_projector)\.", r"model.\1."),
        (r"^model\.vision_tower\.vision_model\.", "model.vision_tower."),
        (r"^(model\.vision_tower\..*)\.attention\.attention\.query\.", r"\1.attention.q_proj."),
        (r"^(model\.vision_tower\..*)\.attention\.attention\.key\.", r"\1.attention.k_proj."),
        (r"^(model\.vision_tower\..*)\.attention\.attention\.value\.", r"\1.attention.v_proj."),
        (r"^(model\.vision_tower\..*)\.attention\.output\.dense\.", r"\1.attention.o_proj."),
    )
)
"""Parameter names of older writers -> current names, as transformers 5 renames them (its conversion_mapping: llava,
LlavaModel, CLIPVisionModel, Dinov2Model): names had no `model.` until 4.51, and CLIP and SigLIP towers had an inner
`vision_model` until 4.57."""
TOWER, INNER = "model.vision_tower.", "model.vision_tower.vision_model."
WITH_INNER = ("clip_vision_model", "siglip_vision_model")
"""Towers written with an inner `vision_model`: vLLM 0.32 and transformers 4 read no other name, transformers 5 reads
both."""
BUFFERS = ("embeddings.position_ids", "rotary_emb.inv_freq")
"""Endings of saved tensors that the config determines; older writers saved them."""


def read_weights(folder: Path, config: VilaConfig) -> dict[str, Tensor]:
    """The parameters of a folder by their names in the model of `config`, in the dtypes of the files.

    Names, shapes and dtypes in the headers are compared with the model before data are read. Raises CorruptArtifact
    with the tensors that are missing, unexpected or misshapen.
    """
    stored = stored_tensors(folder)
    names = _names(stored, folder)
    held = {name: stored[key] for name, key in names.items()}
    _check_shapes(held, config, folder)
    state: dict[str, Tensor] = {}
    for path in sorted({tensor.file for tensor in held.values()}):
        try:
            tensors = load_file(path)
        except SafetensorError as error:
            raise CorruptArtifact(f"{path} is not a readable safetensors file ({error})") from error
        state |= {name: tensors[key] for name, key in names.items() if stored[key].file == path}
    if config.tie_word_embeddings and HEAD in state and not torch.equal(state.pop(HEAD), state[EMBEDDING]):
        raise CorruptArtifact(
            f"{folder} ties the head to the embedding but holds a different head; fix tie_word_embeddings"
        )
    if not isinstance(config.projector_choice(), LinearProjector):
        return state
    try:
        return linear.from_llava(state, PREFIX)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error


def write_weights(state: dict[str, Tensor], folder: Path, *, config: VilaConfig) -> dict[str, Tensor]:
    """Write parameters as safetensors under the names that most programs read, a linear projector as two layers.

    Returns the written tensors by their names in stock transformers 5. Raises DiskFault where they do not fit.
    """
    state = _stored(state, config)
    if config.tie_word_embeddings:
        state = {name: tensor for name, tensor in state.items() if name != HEAD}  # tied to the embedding
    inner = INNER if config.vision_config.model_type in WITH_INNER else TOWER
    written = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    require(folder, sum(tensor.nbytes for tensor in written.values()))
    save_torch_state_dict({name.replace(TOWER, inner): tensor for name, tensor in written.items()}, folder)
    return written


def on_meta(config: VilaConfig) -> VilaForConditionalGeneration:
    """The model of a config on the meta device, without memory for its weights."""
    with torch.device("meta"):
        model: VilaForConditionalGeneration = VilaForConditionalGeneration(config).eval()
    return model


def _names(stored: dict[str, Stored], folder: Path) -> dict[str, str]:
    """Name in the model -> name in the file. Raises CorruptArtifact if two file names mean the same parameter."""
    names: dict[str, str] = {}
    for key in stored:
        if key.endswith(BUFFERS):
            continue
        name = key
        for old, new in RENAMED:
            name = old.sub(new, name)
        if name in names:
            raise CorruptArtifact(f"{folder} holds {name!r} twice, as {names[name]!r} and {key!r}")
        names[name] = key
    return names


def _check_shapes(held: dict[str, Stored], config: VilaConfig, folder: Path) -> None:
    wanted = {name: tuple(tensor.shape) for name, tensor in _stored(dict(on_meta(config).state_dict()), config).items()}
    common = set(wanted) & set(held)
    wrong: dict[str, Any] = {
        "missing": sorted(set(wanted) - set(held) - ({HEAD} if config.tie_word_embeddings else set())),
        "unexpected": sorted(set(held) - set(wanted)),
        "misshapen": {
            name: f"{held[name].shape}, not {wanted[name]}" for name in common if held[name].shape != wanted[name]
        },
        "of an unsupported dtype": {
            name: tensor.dtype for name, tensor in held.items() if tensor.dtype not in BYTES_OF
        },
    }
    if faults := {kind: _first_three(names) for kind, names in wrong.items() if names}:
        raise CorruptArtifact(
            f"{folder} does not hold the weights of its config.json: {faults}; fetch it again, or fix the config"
        )


def _first_three(names: Any) -> Any:
    """The number of names and the first three."""
    items = list(names.items() if isinstance(names, dict) else names)[:3]
    return {"count": len(names), "first": dict(items) if isinstance(names, dict) else items}


def _stored(state: dict[str, Tensor], config: VilaConfig) -> dict[str, Tensor]:
    """Parameters as files hold them: a linear projector is LLaVA's two layers."""
    return linear.to_llava(state, PREFIX) if isinstance(config.projector_choice(), LinearProjector) else state
