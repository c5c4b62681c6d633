"""Translate InternViT, as OpenGVLab and NVlabs save it, to transformers' InternVL tower, which computes the same."""

import re
from typing import Any

from torch import Tensor
from transformers import InternVLVisionConfig

INTERNVIT = "intern_vit_6b"
"""The model type that their code registers."""

NAMES = (
    (r"^embeddings\.class_embedding$", "embeddings.cls_token"),
    (r"^embeddings\.patch_embedding\.", "embeddings.patch_embeddings.projection."),
    (r"^embeddings\.position_embedding$", "embeddings.position_embeddings"),
    (r"^encoder\.layers\.", "encoder.layer."),
    (r"\.attn\.proj\.", ".attention.projection_layer."),
    (r"\.attn\.(q_norm|k_norm)\.", r".attention.\1."),
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"\.ls([12])$", r".lambda_\1"),
)
QKV = re.compile(r"^(.*)\.attn\.qkv\.(weight|bias)$")
SHARED = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "hidden_act",
    "image_size",
    "patch_size",
    "layer_norm_eps",
)


def translated_config(stated: dict[str, Any]) -> InternVLVisionConfig:
    """transformers' config, with the defaults of their configuration_intern_vit.py, RMS norms among them.

    Raises ValueError for settings that transformers' tower cannot represent.
    """
    qk_norm = stated.get("qk_normalization", True)
    if qk_norm and (epsilon := stated.get("layer_norm_eps", 1e-6)) != 1e-6:
        raise ValueError(f"InternViT with layer_norm_eps {epsilon}; transformers' query and key norms have 1e-6 only")
    if (norm := stated.get("norm_type", "rms_norm")) not in ("rms_norm", "layer_norm"):
        raise ValueError(f"InternViT with norm_type {norm!r}; supported are rms_norm and layer_norm")
    if missing := sorted({"hidden_size", "num_hidden_layers", "image_size", "patch_size"} - set(stated)):
        raise ValueError(f"the InternViT config does not state {missing}; add them to its config.json")
    return InternVLVisionConfig(
        **{name: stated[name] for name in SHARED if name in stated},
        attention_bias=stated.get("qkv_bias", False),
        use_qk_norm=qk_norm,
        norm_type=norm,
        use_mean_pooling=True,  # means: no norm after the last layer
    )


def translated(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights under transformers' names; the joint query-key-value matrix is split in three."""
    out: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if qkv := QKV.match(name):
            layer = qkv[1].replace("encoder.layers.", "encoder.layer.")
            for letter, third in zip("qkv", tensor.chunk(3), strict=True):
                out[f"{layer}.attention.{letter}_proj.{qkv[2]}"] = third.clone()
            continue
        for pattern, new in NAMES:
            name = re.sub(pattern, new, name)
        out[name] = tensor
    return out
