"""The memory forecast against the live bytes of a real step, and against ZeRO's shards computed here."""

import weakref
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import CLIPVisionConfig, LlamaConfig

from vila_ops.config import Resources, Stage
from vila_ops.config.resources import TrainResources
from vila_ops.model import attention, lora
from vila_ops.model.configuration import VilaConfig
from vila_ops.model.recompute import recompute
from vila_ops.model.trainable import component_of, set_trainable
from vila_ops.model.vila import VilaForConditionalGeneration
from vila_ops.model.visual_expert import add_visual_expert
from vila_ops.plan.memory import MicroBatch, Weights, memory
from vila_ops.plan.shapes import shapes_of
from vila_ops.train.engine import PlainEngine
from vila_ops.train.objective import Batch, Objective

ROWS, TOKENS, SIDE = 2, 192, 112
LLAMA = LlamaConfig(
    hidden_size=96, intermediate_size=256, num_hidden_layers=6, num_attention_heads=6, num_key_value_heads=3,
    vocab_size=256, tie_word_embeddings=False,
)  # fmt: skip
CLIP = CLIPVisionConfig(
    hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4, image_size=SIDE, patch_size=14
)
LANGUAGE = ("projector", "language_model")


class Live(TorchDispatchMode):
    """Counts the bytes of all live storages."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.sizes: dict[int, int] = {}

    def add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.sizes:
            self.sizes[key] = storage.nbytes()
            self.now += self.sizes[key]
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.remove, key)

    def remove(self, key: int) -> None:
        self.now -= self.sizes.pop(key)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.add(leaf)
        return out


@dataclass(frozen=True)
class Case:
    name: str
    trainable: tuple[str, ...]
    precision: str = "bf16"
    tuning: dict[str, Any] = field(default_factory=lambda: {"kind": "full"})
    accumulated: int = 2
    recomputed: bool = False
    vocabulary: int = 256


CASES = [
    Case("pretrain", LANGUAGE),
    Case("pretrain in fp32", LANGUAGE, "fp32"),
    Case("one micro-batch a step", LANGUAGE, accumulated=1),
    Case("recomputed", LANGUAGE, recomputed=True),
    Case("align", ("projector",)),
    Case("everything", ("vision_tower", *LANGUAGE)),
    Case("lora", LANGUAGE, tuning={"kind": "lora", "rank": 8, "dropout": 0.0}),
    Case("expert", LANGUAGE, tuning={"kind": "visual_expert"}),
    *(
        Case(f"a vocabulary of {size}, {precision}", LANGUAGE, precision, vocabulary=size)
        for size in (8192, 32768)
        for precision in ("bf16", "fp32")
    ),
    Case("align, a large vocabulary", ("projector",), vocabulary=32768),
    Case(
        "lora, a large vocabulary",
        LANGUAGE,
        tuning={"kind": "lora", "rank": 8, "dropout": 0.0},
        vocabulary=32768,
    ),
    Case("expert, a large vocabulary", LANGUAGE, tuning={"kind": "visual_expert"}, vocabulary=32768),
]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("kernel", ["sdpa", "varlen"])
def test_the_forecast_is_what_is_alive_at_the_peak_of_a_step(
    case: Case, kernel: Any, make_stage: Any, make_mixture: Any
) -> None:
    stage = make_stage(
        make_mixture("pairs"), trainable=case.trainable, tuning=case.tuning, precision=case.precision,
        global_batch_size=ROWS * case.accumulated, sequence_length=TOKENS,
    )  # fmt: skip
    config = VilaConfig(
        vision_config=CLIP, text_config={**LLAMA.to_dict(), "vocab_size": case.vocabulary}, image_token_index=250,
        vision_side=SIDE, tie_word_embeddings=False,
    )  # fmt: skip
    shapes = shapes_of(config)
    objective, weights = built(config, stage)
    if case.recomputed:
        recompute(objective.model.model.language_model)
    train = TrainResources(micro_batch_size=ROWS, gradient_checkpointing=case.recomputed, attention=kernel)
    resources = Resources(launch="inline", train=train)
    forecast = memory(shapes, weights, stage, resources, MicroBatch(ROWS, TOKENS, ROWS)).total
    assert forecast == pytest.approx(peak(objective, stage, resources, case.accumulated), rel=0.05)


def built(config: VilaConfig, stage: Stage) -> tuple[Objective, Weights]:
    """Return the objective of a stage, and its parameters by state."""
    torch.manual_seed(0)
    model = VilaForConditionalGeneration(config)
    dtype = torch.bfloat16 if stage.precision == "bf16" else torch.float32
    if stage.tuning.kind == "lora":
        lora.add(model, stage.tuning, seed=0, dtype=dtype)
    if stage.tuning.kind == "visual_expert":
        add_visual_expert(model.model.language_model)
        model.config.visual_expert = True
    objective = Objective(model)
    set_trainable(objective, stage.trainable, stage.tuning)
    frozen = {name: p.numel() for name, p in model.named_parameters() if not p.requires_grad}
    decoder = sum(size for name, size in frozen.items() if component_of(name) == "language_model")
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return objective, Weights(trained, decoder, sum(frozen.values()) - decoder)


def peak(objective: Objective, stage: Stage, resources: Resources, accumulated: int) -> int:
    """Return the live bytes at the peak of a step of the plain engine."""
    model = objective.model
    attention.use(model, attention.choose(resources.train.attention, torch.device("cpu"), stage.precision))
    engine = PlainEngine(objective, set_trainable(objective, stage.trainable, stage.tuning), stage, resources)
    ids = torch.randint(0, 200, (ROWS, TOKENS))
    ids[:, 1:65] = 250
    labels = torch.full_like(ids, -100)
    labels[:, 70:100] = 3
    live = Live()
    for tensor in (*model.parameters(), *model.buffers(), *engine.masters):
        live.add(tensor)
    with live:
        engine.step(1.0)  # of zero gradients, so that the optimizer has its states
        live.peak = 0
        for _ in range(accumulated):
            pixels: Tensor | None = torch.rand(ROWS, 3, SIDE, SIDE)
            features = None
            if "vision_tower" not in stage.trainable:
                with torch.no_grad():
                    features, pixels = model.tower_features(pixels), None
            batch = Batch.of_tokens(
                model,
                input_ids=ids,
                position_ids=torch.arange(TOKENS).expand(ROWS, TOKENS),
                segment_ids=torch.ones_like(ids),
                labels=labels,
                any_images=True,
            )
            batch = replace(batch, features=features, pixel_values=pixels)
            engine.backward(engine.loss(batch)[0] / 100)
        engine.step(1.0)
    return live.peak


@pytest.mark.parametrize(
    ("precision", "zero", "offload", "weights", "gradients", "optimizer", "host"),
    [  # GB for 10^9 trained parameters on 8 workers; ZeRO-3 gathers at most 10^9 elements, 7 / 8 of them from others
        ("fp32", 0, "none", 4, 4, 8, 0),
        ("fp32", 1, "none", 4, 4, 12 / 8, 0),
        ("fp32", 2, "none", 4, 4 / 8, 12 / 8, 0),
        ("fp32", 3, "none", 4 / 8 + 4 * 7 / 8, 4 / 8, 12 / 8, 0),
        ("fp32", 2, "optimizer", 4, 0, 0, 16 / 8),
        ("fp32", 3, "parameters", 4 * 7 / 8, 0, 0, 20 / 8),
        ("bf16", 0, "none", 2, 4, 12, 0),
        ("bf16", 1, "none", 2, 6, 12 / 8, 0),
        ("bf16", 2, "none", 2, 4 / 8, 12 / 8, 0),
        ("bf16", 3, "none", 2 / 8 + 2 * 7 / 8, 4 / 8, 12 / 8, 0),
        ("bf16", 3, "parameters", 2 * 7 / 8, 0, 0, 18 / 8),
    ],
)
def test_zero_shares_states_over_the_workers(
    precision: str,
    zero: int,
    offload: str,
    weights: float,
    gradients: float,
    optimizer: float,
    host: float,
    make_stage: Any,
    make_mixture: Any,
) -> None:
    stage = make_stage(make_mixture("pairs"), trainable=("language_model",), global_batch_size=16, precision=precision)
    train = TrainResources.model_validate({"num_workers": 8, "zero_stage": zero, "offload": offload})
    resources = Resources(launch="ray", ray_address="h:1", train=train)
    config = VilaConfig(vision_config=CLIP, text_config=LLAMA, vision_side=SIDE, tie_word_embeddings=False)
    forecast = memory(shapes_of(config), Weights(10**9, 0, 0), stage, resources, MicroBatch(1, 64, 0))
    actual = (forecast.weights, forecast.gradients, forecast.optimizer, forecast.host)
    assert actual == pytest.approx(tuple(size * 1e9 for size in (weights, gradients, optimizer, host)))
