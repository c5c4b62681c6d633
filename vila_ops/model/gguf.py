"""A model folder as two GGUF files for llama.cpp's LLaVA: the language model, and tower with projector (`mmproj`).

Names of tensors and keys are those that llama.cpp reads: conversion/llama.py of its converter for the language model,
and tools/mtmd/clip.cpp (load_hparams, load_tensors) for the rest, for which its converter takes no SigLIP.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
from gguf import (
    MODEL_ARCH,
    GGMLQuantizationType,
    GGUFWriter,
    LlamaFileType,
    SpecialVocab,
    TokenType,
    get_tensor_name_map,
)
from gguf.quants import quantize
from numpy.typing import NDArray

from vila_ops.config.base import Config
from vila_ops.model.configuration import VilaConfig
from vila_ops.model.context import context_length
from vila_ops.model.folder import load, normalisation
from vila_ops.model.vila import VilaForConditionalGeneration
from vila_ops.packages.tokenizer import read_tokenizer

GgufType = Literal["f32", "f16", "q8_0"]
TYPES: dict[GgufType, tuple[GGMLQuantizationType, LlamaFileType]] = {
    "f32": (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    "f16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
}
Q8_BLOCK = 32
"""Weights of a row that share a scale."""
PRE_TOKENIZERS: dict[str, list[dict[str, Any]]] = {
    "gpt-2": [{"type": "ByteLevel", "use_regex": True}],
    "smollm": [{"type": "Digits", "individual_digits": True}, {"type": "ByteLevel", "use_regex": True}],
}
"""llama.cpp's name (LLAMA_VOCAB_PRE_TYPE in src/llama-vocab.cpp) -> how a byte-level BPE cuts text into words."""
PROJECTOR = {"linear_1": "mm.0", "linear_2": "mm.2"}
"""A layer of LLaVA's projector -> its name in GGUF."""

Array = NDArray[np.float32]


class GgufFile(Config):
    """A file that was written."""

    name: str
    num_bytes: int
    bits_per_weight: float
    """Of all its tensors; keys and vocabulary do not count."""


def pre_tokenizer(folder: Path) -> str | None:
    """llama.cpp's name of how a folder's tokenizer cuts text; None if llama.cpp has none that is known to agree."""
    stated = json.loads((folder / "tokenizer.json").read_text())
    if stated["model"].get("type") != "BPE" or stated.get("normalizer") is not None:
        return None
    own = stated.get("pre_tokenizer") or {}
    steps = own.get("pretokenizers", [own])
    if any(step.get("add_prefix_space") for step in steps):
        return None
    for name, known in PRE_TOKENIZERS.items():
        if len(steps) == len(known) and all(
            one.items() <= step.items() for one, step in zip(known, steps, strict=True)
        ):
            return name
    return None


def write_gguf(folder: Path, out: Path, kind: GgufType) -> list[GgufFile]:
    """Write `model.gguf` and `mmproj.gguf` of a folder that `export.check` takes for gguf into the folder `out`.

    Matrices of the language model get the type `kind`, F16 where a row does not divide into its blocks; those of tower
    and projector F32 or, for the other kinds, F16. Vectors and position tables are F32.
    """
    model = load(folder)
    text, mmproj = out / "model.gguf", out / "mmproj.gguf"
    return [
        _write_text(folder, model, text, kind),
        _write_mmproj(folder, model, mmproj, "f32" if kind == "f32" else "f16"),
    ]


def feature_blocks(config: VilaConfig) -> int:
    """Blocks of the tower that are computed before its features are read."""
    layer, blocks = int(config.vision_feature_layer), int(config.vision_config.num_hidden_layers)
    return layer if layer >= 0 else blocks + 1 + layer


def _write_text(folder: Path, model: VilaForConditionalGeneration, path: Path, kind: GgufType) -> GgufFile:
    config = model.config
    text = config.text_config
    context = context_length(text.to_dict())
    assert context is not None  # every Llama states it
    writer = GGUFWriter(path, "llama")
    writer.add_name("vila-ops")
    writer.add_file_type(TYPES[kind][1])
    writer.add_context_length(context)
    writer.add_embedding_length(text.hidden_size)
    writer.add_block_count(text.num_hidden_layers)
    writer.add_feed_forward_length(text.intermediate_size)
    writer.add_head_count(text.num_attention_heads)
    writer.add_head_count_kv(text.num_key_value_heads)
    writer.add_key_length(text.head_dim)
    writer.add_value_length(text.head_dim)
    writer.add_rope_dimension_count(text.head_dim)
    writer.add_rope_freq_base(text.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(text.rms_norm_eps)
    writer.add_vocab_size(text.vocab_size)
    _add_vocabulary(writer, folder, rows=text.vocab_size)
    names = get_tensor_name_map(MODEL_ARCH.LLAMA, text.num_hidden_layers)
    heads = {"q_proj.weight": text.num_attention_heads, "k_proj.weight": text.num_key_value_heads}
    tensors = _TensorWriter(writer, kind)
    parts = [("model.language_model.", "model."), ("lm_head.", "lm_head.")]
    for name, values in [(to + name, one) for part, to in parts for name, one in _tensors(model, part)]:
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue  # llama.cpp takes the embedding
        count = next((count for end, count in heads.items() if name.endswith(end)), None)
        tensors.add(_named(names, name), _interleaved(values, count) if count else values)
    return tensors.written(path)


def _write_mmproj(folder: Path, model: VilaForConditionalGeneration, path: Path, kind: GgufType) -> GgufFile:
    config = model.config
    tower, blocks = config.vision_config, feature_blocks(config)
    mean, std = normalisation(folder)
    writer = GGUFWriter(path, "clip")
    writer.add_name("vila-ops")
    writer.add_file_type(TYPES[kind][1])
    writer.add_clip_has_vision_encoder(True)
    writer.add_clip_projector_type("mlp")
    writer.add_vision_image_size(tower.image_size)
    writer.add_vision_patch_size(tower.patch_size)
    writer.add_vision_embedding_length(tower.hidden_size)
    writer.add_vision_feed_forward_length(tower.intermediate_size)
    writer.add_vision_projection_dim(config.text_config.hidden_size)
    writer.add_vision_block_count(blocks)
    writer.add_vision_head_count(tower.num_attention_heads)
    writer.add_vision_attention_layernorm_eps(tower.layer_norm_eps)
    writer.add_vision_image_mean(list(mean))
    writer.add_vision_image_std(list(std))
    writer.add_vision_use_gelu(True)
    writer.add_array("clip.vision.feature_layer", [blocks])
    names = get_tensor_name_map(MODEL_ARCH.MMPROJ, blocks)
    tensors = _TensorWriter(writer, kind)
    for name, values in _tensors(model, "model.vision_tower."):
        stock = f"vision_tower.vision_model.{name.removeprefix('vision_model.')}"
        if (known := names.get_name(stock, try_suffixes=(".weight", ".bias"))) and not known.startswith("v.post_ln"):
            tensors.add(known, values)  # blocks that are not computed have no name
    for layer, known in PROJECTOR.items():
        for name, values in _tensors(model, f"model.multi_modal_projector.{layer}"):
            tensors.add(known + name, values)
    return tensors.written(path)


class _TensorWriter:
    """Adds tensors to a file, and counts weights and bytes."""

    def __init__(self, writer: GGUFWriter, kind: GgufType) -> None:
        self.writer, self.kind, self.weights, self.num_bytes = writer, TYPES[kind][0], 0, 0

    def add(self, name: str, values: Array) -> None:
        """Add a tensor in the type that it gets."""
        kind = self.kind
        if values.ndim == 1 or "position_embd" in name:
            kind = GGMLQuantizationType.F32
        elif kind is GGMLQuantizationType.Q8_0 and values.shape[-1] % Q8_BLOCK:
            kind = GGMLQuantizationType.F16
        data = quantize(values, kind)
        self.weights += values.size
        self.num_bytes += data.nbytes
        self.writer.add_tensor(name, data, raw_dtype=kind)

    def written(self, path: Path) -> GgufFile:
        """Write the file."""
        self.writer.write_header_to_file()
        self.writer.write_kv_data_to_file()
        self.writer.write_tensors_to_file()
        self.writer.close()
        bits = 8 * self.num_bytes / self.weights
        return GgufFile(name=path.name, num_bytes=path.stat().st_size, bits_per_weight=round(bits, 3))


def _add_vocabulary(writer: GGUFWriter, folder: Path, *, rows: int) -> None:
    """Tokens, merges, control tokens and the chat template; rows of the embedding without a token are unused."""
    fast, cut = read_tokenizer(folder), pre_tokenizer(folder)
    assert cut is not None  # or the folder would be refused
    texts: list[str] = [fast.convert_ids_to_tokens(number) for number in range(len(fast))]
    kinds = [TokenType.NORMAL] * len(texts)
    for number, token in fast.added_tokens_decoder.items():
        texts[number] = token.content
        kinds[number] = TokenType.CONTROL if token.special else TokenType.USER_DEFINED
    padding = range(len(texts), rows)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(cut)
    writer.add_token_list([*texts, *(f"[PAD{number}]" for number in padding)])
    writer.add_token_types([*kinds, *(TokenType.UNUSED for _ in padding)])
    special = SpecialVocab(folder, load_merges=True, n_vocab=rows)
    special.add_special_token = {"bos": False, "eos": False}  # the chat template writes them
    special.add_to_gguf(writer, quiet=True)


def _named(names: Any, name: str) -> str:
    known: str | None = names.get_name(name, try_suffixes=(".weight", ".bias"))
    if known is None:
        raise ValueError(f"GGUF has no name for the tensor {name} of a Llama")
    return known


def _interleaved(weight: Array, heads: int) -> Array:
    """Rows of a query or key matrix as llama.cpp rotates them: pairs side by side, not in halves of a head."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _tensors(model: VilaForConditionalGeneration, part: str) -> Iterator[tuple[str, Array]]:
    """The tensors of a part of a model, in fp32, with their names in it."""
    for name, values in model.state_dict().items():
        if name.startswith(part):
            yield name.removeprefix(part), np.ascontiguousarray(values.float().numpy())
