"""LoRA (Hu et al. 2021, arXiv:2106.09685): adapters while a stage trains; merged, and as a PEFT folder, afterwards.

An adapted layer gives W x + alpha / rank * B A x, with W frozen. Layer and file formats are PEFT's own.
"""

# B rows, T tokens, R rank

import dataclasses
import hashlib
import json
import logging
import math
import re
import sys
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vila_ops.config.train import Lora
from vila_ops.model.seeds import generator, isolated
from vila_ops.model.trainable import LORA
from vila_ops.model.vila import VilaForConditionalGeneration

LANGUAGE_MODEL = "model.language_model."
PEFT_PREFIX = "base_model.model."
"""Of every name in a PEFT folder."""
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
OTHER_KINDS = ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "lora_bias", "fan_in_fan_out")
"""Fields of PEFT's config that change what an adapter computes; all false or empty here."""
LAYER_STRIDE = 0x9E3779B97F4A7C15
"""Odd, so that the layers of a row differ in the low 32 bits too, which are all that torch's CPU generator reads."""


@dataclasses.dataclass(frozen=True)
class Adapter:
    """What a LoRA stage has learnt of the language model."""

    tuning: Lora
    layers: dict[str, tuple[Tensor, Tensor]]
    """Name of an adapted layer in the whole model to its A (R, in) and B (out, R)."""


def add(model: VilaForConditionalGeneration, tuning: Lora, *, seed: int, dtype: torch.dtype) -> None:
    """Put fresh fp32 adapters on every linear layer of the language model; the head is none of them.

    In place; nothing changes yet in what the model computes, because B is 0. The adapters of a seed are the same in
    every process. With `quantise` the frozen layers become 4-bit ones that compute in `dtype`; they are rounded when
    the model is moved to its device. Raises ValueError for a language model without linear layers, or with a visual
    expert.
    """
    _import_bitsandbytes()
    from peft import inject_adapter_in_model  # takes a second
    from peft.tuners.lora import LoraLayer

    linear = _linear_layers(model)
    if tuning.quantise:
        for name, layer in linear.items():
            model.set_submodule(name, _quantised(layer, dtype))
        model.is_loaded_in_4bit = True  # PEFT asks for it
    with isolated(seed, "peft"):  # what it draws is replaced
        inject_adapter_in_model(_peft_config(tuning, layers=linear), model)
    adapted = [(name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer)]
    for number, (name, module) in enumerate(adapted):
        own = generator(seed, f"{name}{LORA}A")
        nn.init.kaiming_uniform_(module.lora_A["default"].weight, a=math.sqrt(5), generator=own)  # as PEFT does
        if tuning.dropout:
            module.lora_dropout["default"] = Dropout(tuning.dropout, number)


def _import_bitsandbytes() -> None:
    """Import bitsandbytes, which PEFT does wherever it is, without what it fetches by itself.

    As it is imported on a CPU it downloads compiled code from the hub where the package `kernels` is installed, and
    warns where it is not (0.50.2).
    """
    if find_spec("bitsandbytes") is None or "bitsandbytes" in sys.modules:
        return
    logger = logging.getLogger("bitsandbytes")
    known, level = sys.modules.get("kernels"), logger.level
    sys.modules["kernels"] = None  # type: ignore[assignment] # an import of it fails
    logger.setLevel(logging.ERROR)
    try:
        import bitsandbytes  # noqa: F401
    finally:
        logger.setLevel(level)
        del sys.modules["kernels"]
        if known is not None:
            sys.modules["kernels"] = known


class Dropout(nn.Module):
    """Dropout that forgets nothing and remembers nothing: its mask is a function of a row's draw and of the layer.

    torch's own generator would have to travel in resume checkpoints, and would give each world size masks of its own.
    """

    def __init__(self, p: float, number: int) -> None:
        super().__init__()
        self.p, self.number = p, number
        self.draws: tuple[int, ...] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, ...) with a share p of its values 0, the rest 1 / (1 - p) times as large; as it is without draws."""
        if self.draws is None:
            return x
        if len(x) != len(self.draws):
            raise ValueError(f"dropout sees {len(x)} rows of a batch of {len(self.draws)}; set tuning.dropout to 0")
        generator = torch.Generator(x.device)
        values = [
            torch.rand(
                x.shape[1:],
                generator=generator.manual_seed((draw + self.number * LAYER_STRIDE) % 2**63),
                device=x.device,
            )
            for draw in self.draws
        ]
        return x * (torch.stack(values) >= self.p) / (1 - self.p)


def draw(seed: int, step: int, keys: Sequence[str]) -> int:
    """What dropout of one row draws from, in 63 bits: a function of seed, step and the row's samples alone.

    So a resumed stage goes on bit for bit, and the masks are the same at any world size and micro-batch size. But they
    differ between CPU and GPU, whose generators differ, and a GPU's deals by the shape of the whole mask: there a row
    that is padded to another length (`pack: false`) has another mask.
    """
    text = json.dumps([seed, step, *keys])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def set_draws(model: nn.Module, draws: tuple[int, ...] | None) -> None:
    """Tell every dropout what the rows of the next pass draw from; None: no dropout."""
    for module in model.modules():
        if isinstance(module, Dropout):
            module.draws = draws


def adapter_of(trained: dict[str, Tensor], tuning: Lora) -> Adapter:
    """The adapter in a stage's trained parameters, by their names in the model; others are passed over."""
    suffix = f"{LORA}A.default.weight"
    first = {name.removesuffix(suffix): tensor for name, tensor in trained.items() if name.endswith(suffix)}
    return Adapter(tuning, {layer: (a, trained[f"{layer}{LORA}B.default.weight"]) for layer, a in first.items()})


def merge(state: dict[str, Tensor], adapter: Adapter) -> dict[str, Tensor]:
    """Weights that compute what `state` and adapter do together: W + alpha / rank * B A.

    Summed in fp32, kept in the dtype of W. Raises ValueError where the adapter is of another model.
    """
    return _moved(state, adapter, sign=1)


def unmerge(state: dict[str, Tensor], adapter: Adapter) -> dict[str, Tensor]:
    """The base of merged weights: W - alpha / rank * B A, to the rounding of two sums in the dtype of W."""
    return _moved(state, adapter, sign=-1)


def write(adapter: Adapter, folder: Path, *, whole: dict[str, Tensor]) -> None:
    """A PEFT folder that `peft.PeftModel.from_pretrained(base, folder)` loads.

    `whole` are parameters of modules that trained as a whole, by name; they become `modules_to_save`. The config names
    no base model: the checkpoint's manifest holds its digest, and a path would be of this machine.
    """
    modules = sorted({name.split(".")[1] for name in whole})
    folder.mkdir()
    _peft_config(adapter.tuning, layers=adapter.layers, modules_to_save=modules or None).save_pretrained(folder)
    tensors = dict(whole)
    for layer, (a, b) in adapter.layers.items():
        tensors |= {f"{layer}{LORA}A.weight": a, f"{layer}{LORA}B.weight": b}
    save_file(
        {f"{PEFT_PREFIX}{name}": tensor.cpu().contiguous() for name, tensor in tensors.items()},
        folder / WEIGHTS,
        metadata={"format": "pt"},
    )


def read(folder: Path) -> Adapter:
    """The adapter of a PEFT folder, without modules that trained as a whole. Raises ValueError for other kinds."""
    stated: dict[str, Any] = json.loads((folder / CONFIG).read_text())
    other = [field for field in OTHER_KINDS if stated.get(field)]
    if stated.get("peft_type") != "LORA" or other:
        raise ValueError(
            f"{folder} holds an adapter of kind {stated.get('peft_type')} {other}; only plain LoRA is read"
        )
    tuning = Lora(rank=stated["r"], alpha=stated["lora_alpha"], dropout=stated["lora_dropout"])
    renamed = {
        name.removeprefix(PEFT_PREFIX).replace(".weight", ".default.weight"): tensor
        for name, tensor in load_file(folder / WEIGHTS).items()
        if LORA in name
    }
    return adapter_of(renamed, tuning)


def _moved(state: dict[str, Tensor], adapter: Adapter, *, sign: int) -> dict[str, Tensor]:
    moved = dict(state)
    scaling = sign * adapter.tuning.alpha / adapter.tuning.rank
    for layer, (a, b) in adapter.layers.items():
        weight = state.get(f"{layer}.weight")
        if weight is None or weight.shape != (len(b), a.shape[1]):
            shape = None if weight is None else tuple(weight.shape)
            raise ValueError(f"adapter of {layer} is for a weight of {(len(b), a.shape[1])}, the model's is {shape}")
        moved[f"{layer}.weight"] = (weight.float() + b.float() @ a.float() * scaling).to(weight.dtype)
    return moved


def _linear_layers(model: VilaForConditionalGeneration) -> dict[str, nn.Linear]:
    """The layers that get an adapter, by name."""
    if model.config.visual_expert:
        raise ValueError(
            "a model with a visual expert has two weights in a layer, and LoRA adapts one; use tuning full"
        )
    named = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not (own := {name: layer for name, layer in named if name.startswith(LANGUAGE_MODEL)}):
        raise ValueError("the language model has no linear layer that an adapter could sit on; use tuning full")
    return own


def _peft_config(tuning: Lora, *, layers: Iterable[str], modules_to_save: list[str] | None = None) -> Any:
    """PEFT's config for adapters of layers by name. Its pattern is of whole names: the tower has a q_proj too."""
    from peft import LoraConfig

    targets = sorted({name.rpartition(".")[2] for name in layers})
    return LoraConfig(
        r=tuning.rank,
        lora_alpha=int(tuning.alpha) if tuning.alpha.is_integer() else tuning.alpha,  # other readers expect an int
        lora_dropout=tuning.dropout,
        target_modules=rf"{re.escape(LANGUAGE_MODEL)}.*\.({'|'.join(targets)})",
        modules_to_save=modules_to_save,
        bias="none",
    )


def _quantised(layer: nn.Linear, dtype: torch.dtype) -> nn.Linear:
    """A 4-bit layer in its place: nf4 with double quantisation (Dettmers et al. 2023, arXiv:2305.14314)."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    settings: dict[str, Any] = {"quant_type": "nf4", "compress_statistics": True}
    shape = (layer.in_features, layer.out_features)
    small: nn.Linear = Linear4bit(*shape, bias=False, compute_dtype=dtype, device="meta", **settings)
    small.weight = Params4bit(layer.weight.data, requires_grad=False, **settings)
    small.bias = layer.bias
    return small
