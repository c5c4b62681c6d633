"""Read checkpoints of NVlabs/VILA: folders llm/, vision_tower/ and mm_projector/ (v1.5, NVILA), or one state (v1.0).

The meaning of names is from NVlabs' code: base_projector.py, llava_arch.py, mm_utils.py, conversation.py and
encoders/image/basic.py, at tag v1.0, branch vila1.5 and commit b760c34.
"""

import json
import re
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    CLIPVisionConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from vila_ops.config.model import DownsampleProjector, ImageFit, LinearProjector, MlpProjector, Projector
from vila_ops.model.component import described_by
from vila_ops.model.importing import components
from vila_ops.model.importing.components import Components
from vila_ops.model.towers import class_tokens, square_side
from vila_ops.packages.tokenizer import OWN_TEMPLATE, TEMPLATE_TOKENS
from vila_ops.packages.untrusted import read_json

TokenOrder = Literal["rows", "columns"]
Vintage = Literal["v1.0", "v1.5", "nvila"]

MODEL_TYPES = ("llava_llama", "llava_mistral", "llava_mixtral", "llava_gemma", "llava_qwen2", "vila", "llava")
V1_LANGUAGE_MODELS = {
    "llava": "llama",
    "llava_llama": "llama",
    "llava_mistral": "mistral",
    "llava_gemma": "gemma",
    "llava_qwen2": "qwen2",
}
"""The language model's type in transformers for the model types of checkpoints in one state."""
NVILA_KEYS = ("dynamic_s2", "image_encoder", "max_tiles")
"""Fields that NVILA's config class (Dec 2024) always writes, and earlier ones never do."""
NVILA_TRANSFORMERS = (4, 46)
"""The transformers version of NVILA's code; v1.5 has 4.36, LongVILA 4.37."""
RADIO = {"radio", "radiomodel"}
"""The model type and class of NVIDIA's RADIO, in lower case."""
V1_PROJECTOR, V1_TOWER = "model.mm_projector.", "model.vision_tower.vision_tower."
CLIP_MEAN_STD = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
OPENAI_CLIP = re.compile(r"openai/clip-vit-[a-z]+-patch\d+(-\d+)?")
"""The hub names of OpenAI's CLIP, whose activation no weight shows."""
CLIP_HEAD = 64
"""Channels of an attention head in every ViT of OpenAI's CLIP."""
V1_TEMPLATES = ("llama_3_vila", "hermes_2", "vicuna_v1")
"""Templates of NVlabs' conversations; first those whose control tokens only one language model has."""


def is_nvlabs(folder: Path) -> bool:
    """Whether NVlabs' code wrote a folder's config."""
    config = read_json(folder / "config.json")
    kind = config.get("model_type")
    return kind in MODEL_TYPES and ("mm_vision_tower" in config or "vision_tower_cfg" in config)


def read(folder: Path, *, token_order: TokenOrder | None, chat_template: str | None) -> Components:
    """The components of a checkpoint. Raises ValueError, with the reason, if it cannot be represented exactly."""
    config = read_json(folder / "config.json")
    _check_supported(config, folder)
    vintage = _vintage(config, folder)
    notes: list[str] = []
    kind = _projector_type(config, folder, vintage)
    order = _token_order(kind, config, vintage, requested=token_order, notes=notes)
    if vintage == "v1.0":
        tower, layers, language_model, mean_std = _read_v1(config, folder)
        tokenizer = components.load_tokenizer(folder)
    else:
        tower = components.load_tower(folder / "vision_tower")
        layers = _layers(components.read_state(folder / "mm_projector"), prefix="layers.")
        language_model = components.load_language_model(folder / "llm")
        tokenizer = components.load_tokenizer(folder / "llm")
        mean_std = components.mean_std_of(folder / "vision_tower")
    if config.get("dynamic_s2"):
        layers = _one_scale(layers, config, tower, notes=notes)
    _check_selected(config, tower)
    return Components(
        tower=tower,
        projector=_projector(kind, order),
        layers=layers,
        language_model=language_model,
        tokenizer=tokenizer,
        mean_std=mean_std,
        feature_layer=_feature_layer(config),
        image_aspect_ratio=_image_aspect_ratio(config, tower, notes=notes),
        chat_template=_chat_template(tokenizer, vintage, requested=chat_template, notes=notes),
        after_image=_after_image(config) if vintage == "nvila" else "",
        notes=tuple(notes),
    )


def _check_supported(config: dict[str, Any], folder: Path) -> None:
    """Raise ValueError for a model that is more than one square image, one tower and one projector."""
    towers = _tower_types(config, folder)
    if config.get("ps3") or any(kind.startswith("ps3") for kind in towers):
        raise ValueError(
            "a PS3 tower (VILA-HD) reads parts of an image that the prompt selects, which is not supported"
        )
    if towers & RADIO:
        raise ValueError("a RADIO tower exists only as code that comes with its checkpoint, which is not run")
    if config.get("s2"):
        raise ValueError(
            f"S2 features join the scales {config.get('s2_scales')} of an image on channels, which our one-scale "
            f"tower cannot compute; take the checkpoint without -s2"
        )
    if config.get("mm_use_im_start_end"):
        raise ValueError("mm_use_im_start_end puts tokens around each image, which is not supported")


def _tower_types(config: dict[str, Any], folder: Path) -> set[str]:
    """Model types and classes of the tower that the settings state, in lower case; names and paths state none."""
    own = folder / "vision_tower" / "config.json"
    settings = [config.get("vision_tower_cfg"), read_json(own) if own.is_file() else None]
    kinds: list[Any] = []
    for stated in settings:
        if isinstance(stated, dict):
            classes = stated.get("architectures")
            kinds += [stated.get("model_type"), *(classes if isinstance(classes, list) else [])]
    return {kind.lower() for kind in kinds if isinstance(kind, str)}


def _vintage(config: dict[str, Any], folder: Path) -> Vintage:
    if any(key in config for key in NVILA_KEYS):
        return "nvila"
    if (folder / "llm").is_dir():
        return "v1.5"
    if isinstance(config.get("mm_vision_tower"), str):
        return "v1.0"
    raise ValueError(f"{folder} has neither a folder llm/ (v1.5 and later) nor a field mm_vision_tower (v1.0)")


def _projector_type(config: dict[str, Any], folder: Path, vintage: Vintage) -> str:
    stated = config if vintage == "v1.0" else read_json(folder / "mm_projector" / "config.json")
    kind = stated.get("mm_projector_type", "linear" if vintage == "v1.0" else None)
    if not isinstance(kind, str):
        raise ValueError(f"{folder} names no mm_projector_type")
    return kind


def _token_order(
    kind: str, config: dict[str, Any], vintage: Vintage, *, requested: TokenOrder | None, notes: list[str]
) -> TokenOrder:
    """The order of a downsampling projector's tokens.

    The name mlp_downsample has meant two orders: until NVILA's release (Dec 2024) its code returned the grid
    transposed. Two fields of the config show which code trained a checkpoint. If they disagree, or the config is from a
    later re-upload (type `vila`), the user has to state the order, else ValueError is raised.
    """
    if kind != "mlp_downsample":
        if requested == "columns":
            raise ValueError(f"--token-order columns is for mlp_downsample; {kind} has always given rows")
        return "rows"
    if requested is not None:
        return requested
    version = tuple(int(part) for part in re.findall(r"\d+", str(config.get("transformers_version", "")))[:2])
    by_fields: TokenOrder = "rows" if vintage == "nvila" else "columns"
    by_version: TokenOrder = "rows" if version >= NVILA_TRANSFORMERS else "columns"
    if len(version) < 2 or by_fields != by_version or config.get("model_type") == "vila":
        raise ValueError(
            f"mlp_downsample gave its tokens by columns before NVILA's code and by rows since, and this config does "
            f"not show which code trained it (its fields are {vintage}'s, type {config.get('model_type')!r}, "
            f"transformers_version {config.get('transformers_version')!r}); say --token-order rows or "
            f"--token-order columns (VILA-1.5's own weights: columns)"
        )
    notes.append(f"token order {by_fields}: the config was saved by {vintage}'s code")
    return by_fields


def _projector(kind: str, order: TokenOrder) -> Projector:
    if kind in ("linear", "mlp1x_gelu"):
        return LinearProjector()
    if mlp := re.fullmatch(r"mlp(\d+)x_gelu", kind):
        return MlpProjector(depth=int(mlp[1]))
    if kind in ("mlp_downsample", "mlp_downsample_2x2_fix"):
        return DownsampleProjector(factor=2, depth=2, token_order=order)
    if kind == "mlp_downsample_3x3_fix":
        return DownsampleProjector(factor=3, depth=3)
    if kind in ("mlp_downsample_3x3_s2", "mlp_downsample_3x3_s2_new"):
        raise ValueError(f"projector {kind} reads features of several scales, which is not supported")
    raise ValueError(
        f"projector {kind!r} is not supported; supported are linear, mlpNx_gelu, mlp_downsample, "
        f"mlp_downsample_2x2_fix and mlp_downsample_3x3_fix"
    )


def _layers(state: dict[str, Tensor], *, prefix: str) -> list[dict[str, Tensor]]:
    """Weight and bias of each layer, by order, from names as `prefix`0.weight or, for one layer, `prefix`weight."""
    layers: dict[int, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        match = re.fullmatch(rf"{re.escape(prefix)}(?:(\d+)\.)?(weight|bias)", name)
        if match is None:
            raise ValueError(f"the projector's weights hold {name!r}, which no supported projector has")
        layers.setdefault(int(match[1] or 0), {})[match[2]] = tensor
    return [layers[number] for number in sorted(layers)]


def _one_scale(
    layers: list[dict[str, Tensor]], config: dict[str, Any], tower: PreTrainedModel, *, notes: list[str]
) -> list[dict[str, Tensor]]:
    """A Dynamic-S2 projector for images of one tile, exactly: NVlabs' code then repeats the tile once per scale.

    Repeating channels keeps their mean and variance, so the layer norm of the repeated features repeats that of the
    tile. Its scale and shift, and the sum over the copies, are folded into the linear layer after it.
    """
    stated = str(config.get("s2_scales"))
    if not re.fullmatch(r"\d+(,\d+)*", stated):
        raise ValueError(f"s2_scales {stated!r} of a Dynamic-S2 model is no list of sides, such as 448,896,1344")
    scales = sorted(map(int, stated.split(",")))
    side = square_side(tower.config.image_size)
    if scales[0] != side:
        raise ValueError(
            f"the tiles of Dynamic-S2 have {scales[0]} pixels a side, the tower's images {side}; they must be equal"
        )
    if len(layers) != 3:
        raise ValueError(
            "Dynamic-S2 before a 3x3 projector is not supported: its narrow layer is wider by the number of scales"
        )
    norm, linear, *rest = layers
    channels = tower.config.hidden_size
    repeated = linear["weight"].shape[1]
    if norm["weight"].shape != (repeated,) or repeated % (len(scales) * channels):
        raise ValueError(f"the projector's first layers are not those of {len(scales)} scales of {channels} channels")
    weight, scale, shift = linear["weight"].double(), norm["weight"].double(), norm["bias"].double()
    folded = (weight * scale).view(len(weight), -1, len(scales), channels).sum(2).flatten(1)
    wide = folded.shape[1]
    kept = linear["weight"].dtype
    notes.append(f"Dynamic-S2 of scales {scales}: every image is one tile, so large images lose detail")
    return [
        {"weight": torch.ones(wide, dtype=kept), "bias": torch.zeros(wide, dtype=kept)},
        {"weight": folded.to(kept), "bias": (linear["bias"].double() + weight @ shift).to(kept)},
        *rest,
    ]


def _check_selected(config: dict[str, Any], tower: PreTrainedModel) -> None:
    """Raise ValueError unless the selection leaves patches only: `patch` drops the class token, `cls_patch` none."""
    selected = config.get("mm_vision_select_feature", "patch")
    fits = "patch" if class_tokens(tower.config) else "cls_patch"
    if selected != fits:
        raise ValueError(
            f"mm_vision_select_feature {selected!r} of a {tower.config.model_type} tower; supported is {fits!r}, "
            f"which selects the patches and no other token"
        )


def _feature_layer(config: dict[str, Any]) -> int:
    layer = config.get("mm_vision_select_layer", -2)
    if type(layer) is not int or layer >= 0:
        raise ValueError(
            f"mm_vision_select_layer {layer!r}: supported is one hidden state of the tower, counted from the end"
        )
    return layer


def _image_aspect_ratio(config: dict[str, Any], tower: PreTrainedModel, *, notes: list[str]) -> ImageFit:
    """image_aspect_ratio of the config, or else what the tower's processor does: CLIP's crops, others resize."""
    stated = config.get("image_aspect_ratio")
    if stated == "pad":
        return "pad"
    if stated == "resize":
        return "resize"
    if isinstance(stated, str) and "dynamic" in stated:
        notes.append(f"image_aspect_ratio {stated}: an image is one square; NVlabs' code cuts a single one into tiles")
    return "crop" if tower.config.model_type == CLIPVisionConfig.model_type else "resize"


def _after_image(config: dict[str, Any]) -> str:
    """The text that NVILA's image encoder puts after an image: a newline by default."""
    stated = config.get("image_encoder") or {}
    try:
        encoder = json.loads(stated) if isinstance(stated, str) else stated
    except ValueError as error:
        raise ValueError(f"image_encoder {stated!r} is neither an object nor the text of one") from error
    if not str(encoder.get("_target_", "BasicImageEncoder")).endswith("BasicImageEncoder") or encoder.get(
        "start_tokens"
    ):
        raise ValueError(f"image_encoder {encoder} adds more than text after an image, which is not supported")
    return str(encoder.get("end_tokens", "\n") or "")


def _chat_template(
    tokenizer: PreTrainedTokenizerFast, vintage: Vintage, *, requested: str | None, notes: list[str]
) -> str:
    """The template's name: NVILA's tokenizer has its own; earlier ones are inferred from control tokens.

    Raises ValueError if the checkpoint does not determine it.
    """
    if requested is not None:
        return requested
    if vintage == "nvila" and tokenizer.chat_template:
        return OWN_TEMPLATE
    added = set(tokenizer.get_added_vocab())
    fit = [name for name in V1_TEMPLATES if set(TEMPLATE_TOKENS[name]) <= added]
    if vintage == "nvila" or not fit:
        raise ValueError(
            f"neither the config nor the tokenizer determines the chat template; say --chat-template, one of "
            f"{sorted(TEMPLATE_TOKENS)} or {OWN_TEMPLATE!r}"
        )
    notes.append(f"chat template {fit[0]}: inferred from the tokenizer's control tokens; --chat-template overrides it")
    return fit[0]


def _read_v1(
    config: dict[str, Any], folder: Path
) -> tuple[PreTrainedModel, list[dict[str, Tensor]], PreTrainedModel, components.MeanStd]:
    """Tower, projector layers, language model and normalisation of v1.0 and LLaVA-1.5, which are one state."""
    state = components.read_state(folder)
    name = config["mm_vision_tower"]
    tower = {key.removeprefix(V1_TOWER): state.pop(key) for key in sorted(state) if key.startswith(V1_TOWER)}
    if not OPENAI_CLIP.fullmatch(name) or not tower:
        raise ValueError(
            f"{folder} has mm_vision_tower {name!r} and holds {len(tower)} tensors of it; a checkpoint in one state is "
            f"supported if its tower is OpenAI's CLIP by its hub name (openai/clip-vit-large-patch14-336) and it holds "
            f"the tower's weights; if it is that tower, write the name in config.json"
        )
    layers = {key: state.pop(key) for key in sorted(state) if key.startswith(V1_PROJECTOR)}
    language_model = _v1_language_model(config, folder)
    return (
        components.load_strictly("vision_tower", _clip_config(tower, folder), tower, folder),
        _layers(layers, prefix=V1_PROJECTOR),
        components.load_strictly("language_model", language_model, state, folder),
        CLIP_MEAN_STD,
    )


def _v1_language_model(config: dict[str, Any], folder: Path) -> PreTrainedConfig:
    """The language model's config, whose fields stand beside those of LLaVA's own; the model type says which it is."""
    kind = V1_LANGUAGE_MODELS.get(config["model_type"])
    if kind is None:
        raise ValueError(
            f"{folder} has model_type {config['model_type']!r}; of checkpoints in one state, supported are "
            f"{', '.join(V1_LANGUAGE_MODELS)}"
        )
    fields = {*CONFIG_MAPPING[kind]().to_dict(), "rope_theta", "rope_scaling"} - {"architectures", "model_type"}
    with described_by(folder / "config.json"):
        made: PreTrainedConfig = CONFIG_MAPPING[kind](**{key: config[key] for key in fields & set(config)})
    return made


def _clip_config(state: dict[str, Tensor], folder: Path) -> CLIPVisionConfig:
    """The config of an OpenAI CLIP tower, from the shapes of its weights."""
    shapes = {name.removeprefix("vision_model."): tensor.shape for name, tensor in state.items()}
    try:
        hidden, _, patch, _ = shapes["embeddings.patch_embedding.weight"]
        positions = shapes["embeddings.position_embedding.weight"][0]
        wide = shapes["encoder.layers.0.mlp.fc1.weight"][0]
    except KeyError as error:
        raise ValueError(f"{folder} does not hold the CLIP tower's {error}") from error
    return CLIPVisionConfig(
        hidden_size=hidden,
        intermediate_size=wide,
        num_attention_heads=hidden // CLIP_HEAD,
        num_hidden_layers=len({layer[1] for name in shapes if (layer := re.match(r"encoder\.layers\.(\d+)", name))}),
        patch_size=patch,
        image_size=round((positions - 1) ** 0.5) * patch,
    )
