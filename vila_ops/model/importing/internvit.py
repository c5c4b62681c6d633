"""InternViT as OpenGVLab and NVlabs save it, in the terms of transformers' InternVL tower: the same function."""

import re
from typing import Any

from torch import Tensor
from transformers import InternVLVisionConfig

INTERNVIT = "intern_vit_6b"
"""The model type that their remote code registers."""

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
    """The config; the defaults are those of their configuration_intern_vit.py, the norm theirs too (RMS)."""
    qk_norm = stated.get("qk_normalization", True)
    if qk_norm and (epsilon := stated.get("layer_norm_eps", 1e-6)) != 1e-6:
        raise ValueError(f"InternViT with layer_norm_eps {epsilon}: transformers' query and key norms have 1e-6 fixed")
    if (norm := stated.get("norm_type", "rms_norm")) not in ("rms_norm", "layer_norm"):
        raise ValueError(f"InternViT with norm_type {norm!r}; there are rms_norm and layer_norm")
    if missing := sorted({"hidden_size", "num_hidden_layers", "image_size", "patch_size"} - set(stated)):
        raise ValueError(f"the InternViT config does not tell {missing}")
    return InternVLVisionConfig(
        **{name: stated[name] for name in SHARED if name in stated},
        attention_bias=stated.get("qkv_bias", False),
        use_qk_norm=qk_norm,
        norm_type=norm,
        use_mean_pooling=True,  # that is: no norm behind the last layer
    )


def translated(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights under transformers' names; the joint query-key-value matrix becomes three."""
    out: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if found := QKV.match(name):
            layer = found[1].replace("encoder.layers.", "encoder.layer.")
            for part, third in zip("qkv", tensor.chunk(3), strict=True):
                out[f"{layer}.attention.{part}_proj.{found[2]}"] = third.clone()
            continue
        for pattern, new in NAMES:
            name = re.sub(pattern, new, name)
        out[name] = tensor
    return out
