"""The language models that a VILA may have: those that tests show to compute here what stock transformers computes.

`tests/model/test_language_models.py` compares each class with its stock: losses, packed rows, decoding, saved folders.
"""

from dataclasses import dataclass
from typing import Literal

from transformers import PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

Windows = Literal["none", "all", "by_layer"]
"""Which layers have a sliding window: none, all (if the config sets one), or those that the config's layer_types name.
"""
LANGUAGE_MODELS: dict[str, Windows] = {
    "apertus": "none",
    "arcee": "none",
    "cohere": "none",
    "cohere2": "by_layer",
    "ernie4_5": "none",
    "exaone4": "by_layer",
    "gemma": "none",
    "gemma2": "by_layer",
    "gemma3_text": "by_layer",
    "glm": "none",
    "glm4": "none",
    "granite": "none",
    "helium": "none",
    "hunyuan_v1_dense": "none",
    "llama": "none",
    "ministral": "by_layer",
    "mistral": "all",
    "nemotron": "none",
    "olmo": "none",
    "olmo2": "none",
    "olmo3": "by_layer",
    "phi": "none",
    "phi3": "all",
    "qwen2": "by_layer",
    "qwen3": "by_layer",
    "seed_oss": "none",
    "smollm3": "by_layer",
    "starcoder2": "all",
}
"""Model type in transformers -> its sliding windows."""


@dataclass(frozen=True)
class HeadForm:
    """What a language model does to its hidden states besides the product with the head's matrix."""

    bias: bool = False
    scale: float = 1.0
    """Factor of the logits."""
    softcap: float | None = None
    """c of c tanh(logits / c); None: no soft-capping."""

    def __str__(self) -> str:
        stated = ("a bias" if self.bias else "", f"scale {self.scale:g}" if self.scale != 1 else "",
                  f"soft-capping at {self.softcap:g}" if self.softcap else "")  # fmt: skip
        return ", ".join(part for part in stated if part) or "nothing else"


PLAIN_HEAD = HeadForm()
"""The head of Llama, and of stock LLaVA whatever its language model."""


def check_language_model(config: PreTrainedConfig, source: object) -> None:
    """Raise ValueError, by its name, for a language model that is not in LANGUAGE_MODELS; `source` is named too."""
    kind = config.model_type
    if kind not in LANGUAGE_MODELS:
        name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(kind)
        raise ValueError(
            f"{source} holds a language model of type {kind!r}{f' ({name})' if name else ''}, which vila-ops does not "
            f"support: its results would not be those of transformers; supported types are "
            f"{', '.join(sorted(LANGUAGE_MODELS))}"
        )
    if getattr(config, "use_bidirectional_attention", False) or not getattr(config, "is_causal", True):
        raise ValueError(f"{source} holds a {kind} whose tokens attend to later ones; use a causal language model")
    windows = layer_windows(config)
    stated = windows if isinstance(windows, dict) else {"sliding_attention": windows}
    if unknown := sorted(set(stated) - {"full_attention", "sliding_attention"}):
        raise ValueError(f"{source} has layers of type {unknown}; supported are full_attention and sliding_attention")
    if any(window is not None and window < 1 for window in stated.values()):
        raise ValueError(f"{source} has a sliding_window of 0, in which no token sees itself; null means no window")


def check_plain_head(config: PreTrainedConfig, source: object) -> None:
    """Raise ValueError if a language model in LLaVA's format has a head that LLaVA does not compute."""
    if (form := head_form(config)) != PLAIN_HEAD:
        raise ValueError(
            f"{source} is a LLaVA, whose head is a product alone, but its language model is a {config.model_type} with "
            f"{form}; if it was trained as a LLaVA, set that to its neutral value in text_config of config.json"
        )


def head_form(config: PreTrainedConfig) -> HeadForm:
    """The form of a language model's head, as the forward pass of its class in transformers has it."""
    match config.model_type:
        case "phi":
            return HeadForm(bias=True)
        case "cohere" | "cohere2":
            return HeadForm(scale=config.logit_scale)
        case "granite":
            return HeadForm(scale=1 / config.logits_scaling)
        case "gemma2" | "gemma3_text":
            return HeadForm(softcap=config.final_logit_softcapping)
        case _:
            return PLAIN_HEAD


def layer_windows(config: PreTrainedConfig) -> dict[str, int | None] | int | None:
    """The sliding window of each of the layer types, or of all layers, in tokens; None: a layer sees all before it."""
    match LANGUAGE_MODELS[config.model_type]:
        case "none":
            return None
        case "all":
            window: int | None = config.sliding_window
            return window
        case "by_layer":
            kinds = sorted(set(config.layer_types))
            return {kind: config.sliding_window if kind == "sliding_attention" else None for kind in kinds}
