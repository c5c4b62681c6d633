"""The weights of a model folder: looked at in the headers, then read; and written. Key layouts of all writers."""

import re
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

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
"""Names of older writers to those of today, as transformers 5 renames them (its conversion_mapping: llava, LlavaModel,
CLIPVisionModel, Dinov2Model): until 4.51 the parts were called without `model.`, and until 4.57 CLIP and SigLIP towers
had a `vision_model` inside."""
TOWER, INNER = "model.vision_tower.", "model.vision_tower.vision_model."
WITH_INNER = ("clip_vision_model", "siglip_vision_model")
"""Towers that are written with `vision_model` inside: vLLM 0.32 and transformers 4 know them under no other name, and
transformers 5 reads both."""
BUFFERS = ("embeddings.position_ids", "rotary_emb.inv_freq")
"""Endings of what old writers saved too, and what follows from the config."""


def read_weights(folder: Path, config: VilaConfig) -> dict[str, Tensor]:
    """The parameters of a folder by their names in the model of `config`, in the dtypes of the files.

    Names, shapes and dtypes are compared with the headers before anything is read. Raises CorruptArtifact with what is
    missing, too much or of a wrong shape.
    """
    stored = stored_tensors(folder)
    names = _names(stored, folder)
    held = {name: stored[there] for name, there in names.items()}
    _check_shapes(held, config, folder)
    state: dict[str, Tensor] = {}
    for path in sorted({one.file for one in held.values()}):
        try:
            tensors = load_file(path)
        except SafetensorError as error:
            raise CorruptArtifact(f"{path} is not a readable safetensors file ({error})") from error
        state |= {name: tensors[there] for name, there in names.items() if stored[there].file == path}
    if config.tie_word_embeddings and HEAD in state and not torch.equal(state.pop(HEAD), state[EMBEDDING]):
        raise CorruptArtifact(f"{folder} ties the head to the embedding but holds another head; which one is not clear")
    if not isinstance(config.projector_choice(), LinearProjector):
        return state
    try:
        return linear.from_llava(state, PREFIX)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error


def write_weights(state: dict[str, Tensor], folder: Path, *, config: VilaConfig) -> dict[str, Tensor]:
    """Write parameters as safetensors under the names that most programs read; a linear projector as two layers.

    Returns what is written, by the names of the modules in stock transformers 5.
    """
    state = _stored(state, config)
    if config.tie_word_embeddings:
        state = {name: tensor for name, tensor in state.items() if name != HEAD}  # the embedding again
    inner = INNER if config.vision_config.model_type in WITH_INNER else TOWER
    written = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    save_torch_state_dict({name.replace(TOWER, inner): tensor for name, tensor in written.items()}, folder)
    return written


def on_meta(config: VilaConfig) -> VilaForConditionalGeneration:
    """The model of a config without memory for its weights."""
    with torch.device("meta"):
        model: VilaForConditionalGeneration = VilaForConditionalGeneration(config).eval()
    return model


def _names(stored: dict[str, Stored], folder: Path) -> dict[str, str]:
    """The model's name of each tensor to its name in the file."""
    found: dict[str, str] = {}
    for there in stored:
        if there.endswith(BUFFERS):
            continue
        name = there
        for old, new in RENAMED:
            name = old.sub(new, name)
        if name in found:
            raise CorruptArtifact(f"{folder} holds {name!r} twice, as {found[name]!r} and {there!r}")
        found[name] = there
    return found


def _check_shapes(held: dict[str, Stored], config: VilaConfig, folder: Path) -> None:
    wanted = {name: tuple(tensor.shape) for name, tensor in _stored(dict(on_meta(config).state_dict()), config).items()}
    common = set(wanted) & set(held)
    wrong: dict[str, Any] = {
        "missing": sorted(set(wanted) - set(held) - ({HEAD} if config.tie_word_embeddings else set())),
        "unexpected": sorted(set(held) - set(wanted)),
        "of another shape": {
            name: f"{held[name].shape}, not {wanted[name]}" for name in common if held[name].shape != wanted[name]
        },
        "of a dtype that is no weight": {name: one.dtype for name, one in held.items() if one.dtype not in BYTES_OF},
    }
    if told := {kind: _some(names) for kind, names in wrong.items() if names}:
        raise CorruptArtifact(
            f"{folder} does not hold the weights that its config.json names: {told}; fetch it again, or fix the config"
        )


def _some(names: Any) -> Any:
    """The first three of many."""
    items = list(names.items() if isinstance(names, dict) else names)[:3]
    return {"count": len(names), "first": dict(items) if isinstance(names, dict) else items}


def _stored(state: dict[str, Tensor], config: VilaConfig) -> dict[str, Tensor]:
    """Parameters as files hold them: a linear projector is LLaVA's two layers."""
    return linear.to_llava(state, PREFIX) if isinstance(config.projector_choice(), LinearProjector) else state
