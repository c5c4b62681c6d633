"""LoRA (Hu et al. 2021, arXiv:2106.09685): adapters while a stage trains, merged and saved as a PEFT folder after it.

An adapted layer computes W x + alpha / rank * B A x, with W frozen. Layer and file formats are PEFT's own.
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
"""Prefix of every name in a PEFT folder."""
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
OTHER_KINDS = ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "lora_bias", "fan_in_fan_out")
"""Fields of PEFT's config for other kinds of adapters; all false or empty here."""
LAYER_STRIDE = 0x9E3779B97F4A7C15
"""Odd, so that the seeds of layers differ in the low 32 bits too: torch's CPU generator reads no others."""


@dataclasses.dataclass(frozen=True)
class Adapter:
    """The adapter that a LoRA stage trained."""

    tuning: Lora
    layers: dict[str, tuple[Tensor, Tensor]]
    """Name of an adapted layer in the whole model -> its A (R, in) and B (out, R)."""


def add(model: VilaForConditionalGeneration, tuning: Lora, *, seed: int, dtype: torch.dtype) -> None:
    """Put fresh fp32 adapters on every linear layer of the language model except its head, in place.

    The model's outputs do not change yet, because B is 0. Equal seeds give equal adapters in every process. With
    `quantise` the frozen layers become 4-bit ones that compute in `dtype`; they are rounded when the model is moved to
    its device. Raises ValueError for a language model without linear layers or with a visual expert.
    """
    _import_bitsandbytes()
    from peft import inject_adapter_in_model  # heavy: takes a second
    from peft.tuners.lora import LoraLayer

    linear = _linear_layers(model)
    if tuning.quantise:
        for name, layer in linear.items():
            model.set_submodule(name, _quantised(layer, dtype))
        model.is_loaded_in_4bit = True  # PEFT reads this
    with isolated(seed, "peft"):  # its draws are replaced below
        inject_adapter_in_model(_peft_config(tuning, layers=linear), model)
    adapted = [(name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer)]
    for number, (name, module) in enumerate(adapted):
        for part in (module.lora_A, module.lora_B):
            part["default"].float()  # PEFT makes those of 4-bit layers in `dtype`
        layer_generator = generator(seed, f"{name}{LORA}A")
        # Kaiming with a = sqrt 5, as PEFT does.
        nn.init.kaiming_uniform_(module.lora_A["default"].weight, a=math.sqrt(5), generator=layer_generator)
        if tuning.dropout:
            module.lora_dropout["default"] = Dropout(tuning.dropout, number)


def _import_bitsandbytes() -> None:
    """Import bitsandbytes without letting it download code; PEFT imports it wherever it is installed.

    On a CPU its import downloads compiled code from the hub if the package `kernels` is installed, and warns if not
    (0.50.2).
    """
    if find_spec("bitsandbytes") is None or "bitsandbytes" in sys.modules:
        return
    logger = logging.getLogger("bitsandbytes")
    known, level = sys.modules.get("kernels"), logger.level
    sys.modules["kernels"] = None  # type: ignore[assignment] # makes its import fail
    logger.setLevel(logging.ERROR)
    try:
        import bitsandbytes  # noqa: F401
    finally:
        logger.setLevel(level)
        del sys.modules["kernels"]
        if known is not None:
            sys.modules["kernels"] = known


class Dropout(nn.Module):
    """Dropout without generator state: the mask is a function of each row's draw and of the layer's number.

    The state of torch's generator would have to be in resume checkpoints and would make masks depend on the world size.
    """

    def __init__(self, p: float, number: int) -> None:
        super().__init__()
        self.p, self.number = p, number
        self.draws: tuple[int, ...] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, ...) with a share p of its values 0 and the rest times 1 / (1 - p); x itself if draws are None."""
        if self.draws is None:
            return x
        if len(x) != len(self.draws):
            raise ValueError(f"dropout gets {len(x)} rows of a batch of {len(self.draws)}; set tuning.dropout to 0")
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
    """The 63-bit seed of one row's dropout: a function of seed, step and the row's samples.

    So a resumed stage continues bit for bit, and masks do not depend on world size and micro-batch size. They differ
    between CPU and GPU, whose generators differ. On a GPU they also depend on the shape of the mask, so a row that is
    padded to another length (`pack: false`) has another mask.
    """
    text = json.dumps([seed, step, *keys])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def set_draws(model: nn.Module, draws: tuple[int, ...] | None) -> None:
    """Set the seeds of the next forward pass's rows in every dropout; None turns dropout off."""
    for module in model.modules():
        if isinstance(module, Dropout):
            module.draws = draws


def adapter_of(trained: dict[str, Tensor], tuning: Lora) -> Adapter:
    """The adapter in a stage's trained parameters, by their names in the model; other parameters are ignored."""
    suffix = f"{LORA}A.default.weight"
    first = {name.removesuffix(suffix): tensor for name, tensor in trained.items() if name.endswith(suffix)}
    return Adapter(tuning, {layer: (a, trained[f"{layer}{LORA}B.default.weight"]) for layer, a in first.items()})


def merge(state: dict[str, Tensor], adapter: Adapter) -> dict[str, Tensor]:
    """The weights of `state` with the adapter merged in: W + alpha / rank * B A, summed in fp32, in the dtype of W.

    Raises ValueError if a layer's shape is not that of the adapter.
    """
    return _with_delta(state, adapter, sign=1)


def unmerge(state: dict[str, Tensor], adapter: Adapter) -> dict[str, Tensor]:
    """The reverse of `merge`: W - alpha / rank * B A, up to the rounding of two sums in the dtype of W."""
    return _with_delta(state, adapter, sign=-1)


def write(adapter: Adapter, folder: Path, *, whole: dict[str, Tensor]) -> None:
    """Write a PEFT folder that `peft.PeftModel.from_pretrained(base, folder)` loads.

    `whole` are the parameters of modules that were trained entirely, by name; they become `modules_to_save`. The config
    names no base model: the checkpoint's manifest has its digest, and a path would be one of this machine.
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
    """The adapter in a PEFT folder, without `modules_to_save`. Raises ValueError for other kinds of adapters."""
    stated: dict[str, Any] = json.loads((folder / CONFIG).read_text())
    other = [field for field in OTHER_KINDS if stated.get(field)]
    if stated.get("peft_type") != "LORA" or other:
        raise ValueError(
            f"{folder} holds an adapter of kind {stated.get('peft_type')} {other}; only plain LoRA is supported"
        )
    tuning = Lora(rank=stated["r"], alpha=stated["lora_alpha"], dropout=stated["lora_dropout"])
    renamed = {
        name.removeprefix(PEFT_PREFIX).replace(".weight", ".default.weight"): tensor
        for name, tensor in load_file(folder / WEIGHTS).items()
        if LORA in name
    }
    return adapter_of(renamed, tuning)


def _with_delta(state: dict[str, Tensor], adapter: Adapter, *, sign: int) -> dict[str, Tensor]:
    weights = dict(state)
    scaling = sign * adapter.tuning.alpha / adapter.tuning.rank
    for layer, (a, b) in adapter.layers.items():
        weight = state.get(f"{layer}.weight")
        if weight is None or weight.shape != (len(b), a.shape[1]):
            shape = None if weight is None else tuple(weight.shape)
            raise ValueError(
                f"the adapter of {layer} fits a weight of shape {(len(b), a.shape[1])}, but the model has {shape}"
            )
        weights[f"{layer}.weight"] = (weight.float() + b.float() @ a.float() * scaling).to(weight.dtype)
    return weights


def _linear_layers(model: VilaForConditionalGeneration) -> dict[str, nn.Linear]:
    """The layers that get an adapter, by name."""
    if model.config.visual_expert:
        raise ValueError("a model with a visual expert has two weights a layer, and LoRA adapts one; use tuning full")
    named = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not (adapted := {name: layer for name, layer in named if name.startswith(LANGUAGE_MODEL)}):
        raise ValueError("the language model has no linear layer to adapt; use tuning full")
    return adapted


def _peft_config(tuning: Lora, *, layers: Iterable[str], modules_to_save: list[str] | None = None) -> Any:
    """PEFT's config for these layers; its pattern matches full names, because the tower also has a q_proj."""
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
    """The layer in 4 bits: nf4 with double quantisation (Dettmers et al. 2023, arXiv:2305.14314)."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    settings: dict[str, Any] = {"quant_type": "nf4", "compress_statistics": True}
    shape = (layer.in_features, layer.out_features)
    quantised: nn.Linear = Linear4bit(*shape, bias=False, compute_dtype=dtype, device="meta", **settings)
    quantised.weight = Params4bit(layer.weight.data, requires_grad=False, **settings)
    quantised.bias = layer.bias
    return quantised
