"""Read LLaVA folders in transformers' format: those of llava-hf, and those that transformers and vila-ops save."""

import re
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from torch import Tensor, equal, eye
from transformers import LlavaConfig, PreTrainedModel, PreTrainedTokenizerFast

from vila_ops.config.model import ImageFit, LinearProjector, MlpProjector, Projector
from vila_ops.model.component import described_by
from vila_ops.model.importing import components
from vila_ops.model.importing.components import Components
from vila_ops.model.language_models import check_language_model, check_plain_head
from vila_ops.model.processing import read_fit
from vila_ops.model.towers import select_strategy, square_side
from vila_ops.packages.tokenizer import IMAGE_TOKEN, OWN_TEMPLATE, TEMPLATE_TOKENS, TEMPLATES
from vila_ops.packages.untrusted import check_counts, read_json

PREFIXES = (
    (r"(?:model\.)?vision_tower\.", "vision_tower", ""),
    (r"(?:model\.)?multi_modal_projector\.", "projector", ""),
    (r"model\.language_model\.", "language_model", "model."),
    (r"language_model\.(?=model\.|lm_head\.)", "language_model", ""),
    (r"(?=lm_head\.)", "language_model", ""),
)
"""Pattern of a tensor's prefix, the component it belongs to, and the prefix in that component.

transformers 4.52 and vila-ops write the names of its modules, transformers 5 those from before 4.52."""
QUESTION, ANSWER = "What is it", "A dog"
"""Messages that a chat template has to render."""


def read(folder: Path, *, chat_template: str | None) -> Components:
    """The components of a folder. Raises ValueError, with the reason, for what cannot be represented exactly."""
    stated = read_json(folder / "config.json")
    if stated.get("model_type") != LlavaConfig.model_type:
        raise ValueError(
            f"{folder} holds a {stated.get('model_type')!r} model; supported are NVlabs' VILA and folders of type "
            f"{LlavaConfig.model_type!r}"
        )
    check_counts(stated, folder / "config.json")
    with described_by(folder / "config.json"):
        config = LlavaConfig(**{key: value for key, value in stated.items() if key not in ("model_type", "auto_map")})
    config.text_config.tie_word_embeddings = config.tie_word_embeddings  # which is true if either says so
    check_language_model(config.text_config, folder)
    check_plain_head(config.text_config, folder)
    states = _by_component(components.read_state(folder), folder)
    tower = components.load_strictly("vision_tower", config.vision_config, states["vision_tower"], folder)
    projector, layers = _projector(config, states["projector"], folder)
    _check_selected(config)
    tokenizer = _tokenizer(config, folder)
    fit = _image_aspect_ratio(tower, folder)
    return Components(
        tower=tower,
        projector=projector,
        layers=layers,
        language_model=components.load_strictly("language_model", config.text_config, states["language_model"], folder),
        tokenizer=tokenizer,
        mean_std=components.mean_std_of(folder),
        feature_layer=config.vision_feature_layer,
        image_aspect_ratio=fit,
        chat_template=chat_template or _template(tokenizer),
        after_image=stated.get("after_image", ""),
        notes=(f"image_aspect_ratio {fit}: from the folder's processor; LLaVA-1.5 and VILA v1 were trained with pad",)
        if fit == "crop"
        else (),
    )


def _by_component(state: dict[str, Tensor], folder: Path) -> dict[str, dict[str, Tensor]]:
    states: dict[str, dict[str, Tensor]] = {"vision_tower": {}, "projector": {}, "language_model": {}}
    for name, tensor in state.items():
        for pattern, component, prefix in PREFIXES:
            if match := re.match(pattern, name):
                states[component][prefix + name[match.end() :]] = tensor
                break
        else:
            raise ValueError(f"{folder} holds {name!r}, which is not a tensor of a LLaVA")
    return states


def _projector(
    config: LlavaConfig, state: dict[str, Tensor], folder: Path
) -> tuple[Projector, list[dict[str, Tensor]]]:
    """Kind and layers of the projector: an MLP with GELU, or a linear layer before an identity without activation."""
    wanted = {f"linear_{number}.{kind}" for number in (1, 2) for kind in ("weight", "bias")}
    if set(state) != wanted:
        raise ValueError(f"{folder}: the projector has the tensors {sorted(state)}, not {sorted(wanted)}")
    layers = [{kind: state[f"linear_{number}.{kind}"] for kind in ("weight", "bias")} for number in (1, 2)]
    if config.projector_hidden_act == "gelu":
        return MlpProjector(), layers
    second = layers[1]["weight"]
    is_identity = equal(second, eye(len(second), dtype=second.dtype)) and not layers[1]["bias"].any()
    if config.projector_hidden_act != "linear" or not is_identity:
        raise ValueError(
            f"{folder}: projector_hidden_act {config.projector_hidden_act!r}; supported are gelu, and linear before an "
            f"identity"
        )
    return LinearProjector(), layers[:1]


def _check_selected(config: LlavaConfig) -> None:
    layer, strategy = config.vision_feature_layer, config.vision_feature_select_strategy
    fits = select_strategy(config.vision_config)
    if type(layer) is not int or layer >= 0:
        raise ValueError(
            f"vision_feature_layer {layer}: supported is one hidden state of the tower, counted from the end"
        )
    if strategy != fits:
        raise ValueError(
            f"vision_feature_select_strategy {strategy!r} of a {config.vision_config.model_type} tower; supported "
            f"is {fits!r}, which selects the patches and no other token"
        )


def _tokenizer(config: LlavaConfig, folder: Path) -> PreTrainedTokenizerFast:
    tokenizer = components.load_tokenizer(folder)
    named = tokenizer.convert_ids_to_tokens(config.image_token_id) if config.image_token_id < len(tokenizer) else None
    if named != IMAGE_TOKEN:
        raise ValueError(
            f"{folder}: the image token {config.image_token_id} of the config is {named!r} in the tokenizer, not "
            f"{IMAGE_TOKEN!r}"
        )
    return tokenizer


def _image_aspect_ratio(tower: PreTrainedModel, folder: Path) -> ImageFit:
    """How the folder's image processor makes an image square."""
    whole = folder / "processor_config.json"
    stated: dict[str, Any] = read_json(whole).get("image_processor", {}) if whole.is_file() else {}
    fit, side = read_fit(stated or read_json(folder / "preprocessor_config.json"))
    if side != (own := square_side(tower.config.image_size)):
        raise ValueError(f"{folder}: the image processor gives {side} pixels a side, but the tower reads {own}")
    return fit


def _template(tokenizer: PreTrainedTokenizerFast) -> str:
    """Name of the template of ours that the tokenizer has; `tokenizer` for another one that renders plain text."""
    own = tokenizer.chat_template
    for name in TEMPLATE_TOKENS:
        if own == (TEMPLATES / f"{name}.jinja").read_text():
            return name
    messages = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False) if own else ""
    except TemplateError:
        text = ""
    if QUESTION in text and ANSWER in text:
        return OWN_TEMPLATE
    raise ValueError(
        f"the folder has no chat template, or one that does not read messages of plain text; say --chat-template, one "
        f"of {sorted(TEMPLATE_TOKENS)} (LLaVA-1.5 and VILA v1: vicuna_v1)"
    )
