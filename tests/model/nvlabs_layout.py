"""NVlabs' folders with random weights, written file by file; and what its code computes from them, written again.

The formulas are those of base_projector.py (vila1.5 and b760c34) and llava_arch.py: shapes and orders in own words.
"""

import json
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, linear, pad
from transformers import (
    AutoModelForCausalLM,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen2Config,
    SiglipVisionConfig,
    SiglipVisionModel,
)

TINY = Path(__file__).parent.parent / "tiny"
DIM, CHANNELS, SIDE, PATCH = 64, 48, 70, 14  # a grid of 5 x 5: odd, and not a multiple of 3
IMAGE = 3
"""Id of the image token in the tiny tokenizer."""
COMMON = {"mm_use_im_start_end": False, "mm_use_im_patch_token": False, "mm_vision_select_layer": -2}
V15 = {**COMMON, "model_type": "llava_llama", "transformers_version": "4.36.2", "architectures": ["LlavaLlamaModel"]}
NVILA = {
    **COMMON,
    "model_type": "llava_llama",
    "transformers_version": "4.46.0",
    "dynamic_s2": None,
    "max_tiles": 12,
    "image_encoder": '{"_target_": "llava.model.encoders.BasicImageEncoder"}',
}
PROJECTORS = {
    "linear": 0,
    "mlp1x_gelu": 0,
    "mlp2x_gelu": 0,
    "mlp3x_gelu": 0,
    "mlp_downsample": 2,
    "mlp_downsample_2x2_fix": 2,
    "mlp_downsample_3x3_fix": 3,
}
"""NVlabs' types, each with the side of its blocks."""


def write(folder: Path, config: dict[str, Any], *, projector: str, tower: str = "siglip", llm: str = "llama") -> None:
    """A checkpoint of v1.5 or NVILA. The tower of InternViT is written under its own code's names."""
    torch.manual_seed(len(projector) + len(tower))
    selected = "cls_patch" if tower == "siglip" else "patch"
    stated = {"mm_vision_select_feature": selected, "image_aspect_ratio": "resize", **config}
    for part in ("llm", "vision_tower", "mm_projector"):
        (folder / part).mkdir(parents=True)
    stated |= {"llm_cfg": {}, "vision_tower_cfg": {"model_type": tower}, "mm_projector_cfg": {}}
    _dump(folder / "config.json", stated)
    _language_model(llm).save_pretrained(folder / "llm")
    shutil.copytree(TINY / "tokenizer", folder / "llm", dirs_exist_ok=True)
    if tower == "internvit":
        _internvit(folder / "vision_tower")
    else:
        made = _tower(tower)
        made.save_pretrained(folder / "vision_tower")
        _dump(folder / "vision_tower" / "preprocessor_config.json", {"image_mean": [0.4] * 3, "image_std": [0.6] * 3})
    _dump(folder / "mm_projector" / "config.json", {"model_type": "v2l_projector", "mm_projector_type": projector})
    scales = len(str(config.get("s2_scales") or "1").split(","))
    channels = 128 if tower == "clip128" else CHANNELS
    save_file(projector_state(projector, channels * scales), folder / "mm_projector" / "model.safetensors")


def projector_state(kind: str, channels: int) -> dict[str, Tensor]:
    """Random weights under the names of NVlabs' `layers`."""
    factor = PROJECTORS[kind]
    if kind == "linear":
        return {f"layers.{name}": tensor for name, tensor in _linear(channels, DIM).items()}
    if not factor:
        widths = [channels, *[DIM] * int(kind[3])]
        layers = {2 * n: _linear(a, b) for n, (a, b) in enumerate(pairwise(widths))}
    elif factor == 2:
        wide = 4 * channels
        layers = {1: _norm(wide), 2: _linear(wide, DIM), 4: _linear(DIM, DIM)}
    else:
        wide, narrow = 9 * channels, 3 * channels
        layers = {
            1: _norm(wide),
            2: _linear(wide, narrow),
            4: _norm(narrow),
            5: _linear(narrow, DIM),
            7: _linear(DIM, DIM),
        }
    return {f"layers.{n}.{name}": tensor for n, layer in layers.items() for name, tensor in layer.items()}


def logits(folder: Path, pixels: Tensor, ids: list[int], *, transposed: bool = False, layer: int = -2) -> Tensor:
    """Logits (T, V) of one row: parts read from the checkpoint, run in NVlabs' order; each IMAGE is one image."""
    stated = json.loads((folder / "config.json").read_text())
    features = tower_states(folder / "vision_tower", pixels)[layer]
    if stated["mm_vision_select_feature"] == "patch":
        features = features[:, 1:]
    if stated.get("dynamic_s2"):
        features = features.repeat(1, 1, len(stated["s2_scales"].split(",")))
    kind = json.loads((folder / "mm_projector" / "config.json").read_text())["mm_projector_type"]
    held = load_file(folder / "mm_projector" / "model.safetensors")
    images = iter(project(kind, held, features, transposed=transposed))
    language_model = AutoModelForCausalLM.from_pretrained(folder / "llm", dtype=torch.float32).eval()
    table = language_model.get_input_embeddings().weight
    row = torch.cat([next(images) if token == IMAGE else table[token][None] for token in ids])
    out: Tensor = language_model(inputs_embeds=row[None]).logits[0]
    return out


def project(kind: str, held: dict[str, Tensor], features: Tensor, *, transposed: bool) -> Tensor:
    """(I, P, C) -> (I, Q, D)."""

    def affine(number: int, x: Tensor) -> Tensor:
        return linear(x, held[f"layers.{number}.weight"], held[f"layers.{number}.bias"])

    def normed(number: int, x: Tensor) -> Tensor:
        return layer_norm(x, x.shape[-1:], held[f"layers.{number}.weight"], held[f"layers.{number}.bias"])

    factor = PROJECTORS[kind]
    if kind == "linear":
        return linear(features, held["layers.weight"], held["layers.bias"])
    if not factor:
        for number in range(int(kind[3])):
            features = affine(2 * number, gelu(features) if number else features)
        return features
    x = normed(1, flat_square(features, factor, transposed=transposed))
    if factor == 2:
        return affine(4, gelu(affine(2, x)))
    return affine(7, gelu(affine(5, normed(4, gelu(affine(2, x))))))


def flat_square(features: Tensor, factor: int, *, transposed: bool) -> Tensor:
    """NVlabs' merging: its two views and permutes; until NVILA the last permute was missing (`transposed`)."""
    images, patches, channels = features.shape
    side = int(patches**0.5)
    more = -side % factor
    x = pad(features.reshape(images, side, side, channels), (0, 0, 0, more, 0, more))
    side += more
    x = x.reshape(images, side, side // factor, channels * factor).permute(0, 2, 1, 3)
    x = x.reshape(images, side // factor, side // factor, channels * factor**2)
    if not transposed:
        x = x.permute(0, 2, 1, 3)
    return x.reshape(images, -1, channels * factor**2)


def tower_states(folder: Path, pixels: Tensor) -> list[Tensor]:
    """The hidden states of a tower, embedding first."""
    stated = json.loads((folder / "config.json").read_text())
    if stated["model_type"] == "intern_vit_6b":
        return _internvit_states(load_file(folder / "model.safetensors"), stated, pixels)
    kind: Callable[..., Any] = SiglipVisionModel if "siglip" in stated["model_type"] else CLIPVisionModel
    tower = kind.from_pretrained(folder, dtype=torch.float32).eval()
    return list(tower(pixels, output_hidden_states=True).hidden_states)


def _internvit_states(held: dict[str, Tensor], stated: dict[str, Any], pixels: Tensor) -> list[Tensor]:
    """modeling_intern_vit.py: pre-norm blocks of joint query-key-value, RMS norms, layer scales; no dropout."""

    def rms(name: str, x: Tensor) -> Tensor:
        return held[name] * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)

    patch = torch.nn.functional.conv2d(
        pixels, held["embeddings.patch_embedding.weight"], held["embeddings.patch_embedding.bias"], stride=PATCH
    )
    patch = patch.flatten(2).transpose(1, 2)
    first = held["embeddings.class_embedding"].expand(len(patch), 1, -1)
    x = torch.cat([first, patch], 1) + held["embeddings.position_embedding"]
    states = [x]
    heads = stated["num_attention_heads"]
    for number in range(stated["num_hidden_layers"]):
        at = f"encoder.layers.{number}."
        images, tokens, channels = x.shape
        joint = linear(rms(at + "norm1.weight", x), held[at + "attn.qkv.weight"])
        query, key, value = joint.view(images, tokens, 3, channels).unbind(2)
        query, key = rms(at + "attn.q_norm.weight", query), rms(at + "attn.k_norm.weight", key)
        query, key, value = (each.view(images, tokens, heads, -1).transpose(1, 2) for each in (query, key, value))
        weights = (query @ key.transpose(-2, -1) * (channels // heads) ** -0.5).softmax(-1)
        seen = (weights @ value).transpose(1, 2).reshape(images, tokens, channels)
        seen = linear(seen, held[at + "attn.proj.weight"], held[at + "attn.proj.bias"])
        x = x + seen * held[at + "ls1"]
        wide = gelu(linear(rms(at + "norm2.weight", x), held[at + "mlp.fc1.weight"], held[at + "mlp.fc1.bias"]))
        x = x + linear(wide, held[at + "mlp.fc2.weight"], held[at + "mlp.fc2.bias"]) * held[at + "ls2"]
        states.append(x)
    return states


def _internvit(folder: Path) -> None:
    shape = {"hidden_size": CHANNELS, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    stated = {**shape, "image_size": SIDE, "patch_size": PATCH, "qkv_bias": False, "qk_normalization": True}
    auto = {"AutoModel": "modeling_intern_vit.InternVisionModel"}
    _dump(folder / "config.json", {**stated, "model_type": "intern_vit_6b", "auto_map": auto})
    _dump(folder / "preprocessor_config.json", {"image_processor_type": "InternVisionPreprocessor"})
    state = {
        "embeddings.class_embedding": torch.randn(1, 1, CHANNELS),
        "embeddings.patch_embedding.weight": torch.randn(CHANNELS, 3, PATCH, PATCH) / 20,
        "embeddings.patch_embedding.bias": torch.randn(CHANNELS),
        "embeddings.position_embedding": torch.randn(1, (SIDE // PATCH) ** 2 + 1, CHANNELS),
    }
    for number in range(2):
        layer = {
            "attn.qkv.weight": torch.randn(3 * CHANNELS, CHANNELS) / 5,
            **{f"attn.{name}.weight": torch.rand(CHANNELS) + 0.5 for name in ("q_norm", "k_norm")},
            **{f"attn.proj.{name}": tensor for name, tensor in _linear(CHANNELS, CHANNELS).items()},
            **{f"mlp.fc1.{name}": tensor for name, tensor in _linear(CHANNELS, 64).items()},
            **{f"mlp.fc2.{name}": tensor for name, tensor in _linear(64, CHANNELS).items()},
            **{f"{name}.weight": torch.rand(CHANNELS) + 0.5 for name in ("norm1", "norm2")},
            **{name: torch.rand(CHANNELS) for name in ("ls1", "ls2")},
        }
        state |= {f"encoder.layers.{number}.{name}": tensor for name, tensor in layer.items()}
    save_file(state, folder / "model.safetensors")


def _tower(kind: str) -> PreTrainedModel:
    shape = {"hidden_size": CHANNELS, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    size = {"image_size": SIDE, "patch_size": PATCH}
    if kind == "siglip":
        return _spread(SiglipVisionModel(SiglipVisionConfig(**shape, **size)))
    if kind == "clip128":  # heads of 64 channels, as OpenAI's
        shape |= {"hidden_size": 128}
    return _spread(CLIPVisionModel(CLIPVisionConfig(**shape, **size)))


def _language_model(kind: str) -> PreTrainedModel:
    shape = {"hidden_size": DIM, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
    rows = {"vocab_size": 640, "max_position_embeddings": 512}
    if kind == "qwen2":
        config = Qwen2Config(**shape, **rows, num_key_value_heads=2, tie_word_embeddings=True)
    elif kind == "mistral":
        config = MistralConfig(**shape, **rows, num_key_value_heads=4, sliding_window=4)
    else:
        stretched = {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}}
        config = LlamaConfig(**shape, **rows, num_key_value_heads=4, **stretched)
    return _spread(AutoModelForCausalLM.from_config(config))


def _spread(model: PreTrainedModel) -> PreTrainedModel:
    """Weights large enough that each one changes the logits."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def _linear(before: int, after: int) -> dict[str, Tensor]:
    return {"weight": torch.randn(after, before) / before**0.5, "bias": torch.randn(after)}


def _norm(wide: int) -> dict[str, Tensor]:
    return {"weight": torch.rand(wide) + 0.5, "bias": torch.randn(wide) / 4}


def _dump(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value))
