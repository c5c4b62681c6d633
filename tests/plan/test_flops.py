"""The FLOP rule against torch's own counter over a real step, product by product."""

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig, LlamaConfig

from vila_ops.config import Stage
from vila_ops.model import lora
from vila_ops.model.configuration import VilaConfig
from vila_ops.model.trainable import set_trainable
from vila_ops.model.visual_expert import add_visual_expert
from vila_ops.plan.flops import Load, flops, training_flops
from vila_ops.plan.shapes import shapes_of
from vila_ops.train.objective import Batch, Objective

TOKENS, IMAGES, TARGETS = 96, 2, 11
LORA = {"kind": "lora", "rank": 4, "dropout": 0.0}
EXPERT = {"kind": "visual_expert"}
ALL = ("vision_tower", "projector", "language_model")


@dataclass(frozen=True)
class Case:
    name: str
    trainable: tuple[str, ...]
    tuning: dict[str, Any] = field(default_factory=lambda: {"kind": "full"})
    model: dict[str, Any] = field(default_factory=dict)
    tower: str = "clip"
    images: int = IMAGES


def projector(**choice: Any) -> dict[str, Any]:
    return {"projector": choice}


CASES = [
    Case("align", ("projector",)),
    Case("align, text alone", ("projector",), images=0),
    Case("pretrain", ("projector", "language_model")),
    Case("sft of everything", ALL),
    Case("text alone", ALL, images=0),
    Case("vit pretrain", ("vision_tower", "projector")),
    Case("tower alone", ("vision_tower",)),
    Case("language model alone", ("language_model",)),
    Case("lora", ("projector", "language_model"), LORA),
    Case("lora alone", ("language_model",), LORA),
    Case("lora, text alone", ("projector", "language_model"), LORA, images=0),
    Case("expert", ("projector", "language_model"), EXPERT),
    Case("expert alone", ("language_model",), EXPERT),
    Case("expert, text alone", ("projector", "language_model"), EXPERT, images=0),
    Case("linear", ("projector",), model=projector(kind="linear")),
    Case("mlp of 3", ALL, model=projector(kind="mlp_gelu", depth=3)),
    Case("transformer", ("projector",), model=projector(kind="transformer", num_layers=2, num_heads=4)),
    Case("transformer below a tower", ALL, model=projector(kind="transformer", num_layers=2, num_heads=4)),
    Case("downsample", ("projector",), model=projector(kind="mlp_downsample", factor=3, depth=3)),
    Case("dinov2", ALL, tower="dinov2"),
    Case("internvit", ALL, tower="internvit"),
    Case("siglip", ALL, tower="siglip"),
]


@pytest.fixture
def measured(make_model: Any, make_stage: Any, make_mixture: Any, build: Any) -> Any:
    """Return the shapes and stage of a case, and torch's FLOPs of products with weights and of attention."""

    def run(case: Case, *, feature_layer: int = -1) -> Any:
        config = make_model(case.tower, feature_layer=feature_layer, image_size=70)
        model, _ = build(config.model_validate({**config.model_dump(), **case.model}))
        stage = make_stage(make_mixture("pairs"), trainable=case.trainable, tuning=case.tuning)
        shapes = shapes_of(model.config)
        if case.tuning["kind"] == "lora":
            lora.add(model, stage.tuning, seed=0, dtype=torch.float32)
        if case.tuning["kind"] == "visual_expert":
            add_visual_expert(model.model.language_model)
            model.config.visual_expert = True
        return shapes, stage, counted(model, stage, case)

    return run


def counted(model: Any, stage: Stage, case: Case) -> tuple[int, int]:
    """Return torch's FLOPs of products with weights, and of products of activations."""
    for module in model.modules():
        if hasattr(module, "config"):
            module.config._attn_implementation = "eager"  # its products are counted one by one
    model.model.vision_tower.use_head = False  # SigLIP's pooling has no effect
    objective = Objective(model).train()
    set_trainable(objective, stage.trainable, stage.tuning)
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(10, 200, (1, TOKENS), generator=random)
    ids[0, 1 : 1 + case.images * shapes_of(model.config).image_tokens] = model.config.image_token_id
    labels = torch.full((1, TOKENS), -100)
    labels[0, -TARGETS:] = 3
    pixels = torch.rand(case.images, 3, 70, 70) if case.images else None
    # torch does not count products that are added in place.
    in_place = {torch.ops.aten.addmm_: lambda _, left, right, **__: 2 * left[0] * left[1] * right[1]}
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        features = None
        if pixels is not None and "vision_tower" not in stage.trainable:
            with torch.no_grad():
                features = model.tower_features(pixels)
        batch = Batch.of_tokens(
            model,
            input_ids=ids,
            position_ids=torch.arange(TOKENS)[None],
            segment_ids=torch.ones_like(ids),
            labels=labels,
            any_images=pixels is not None,
        )
        pixels = pixels if features is None else None
        total, _ = objective(replace(batch, features=features, pixel_values=pixels))
        if total.requires_grad:
            total.backward()
    by_kind = {str(kind): count for kind, count in counter.get_flop_counts()["Global"].items()}
    activations = sum(count for kind, count in by_kind.items() if "bmm" in kind)
    return counter.get_total_flops() - activations, activations


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_step_costs_what_torch_counts_but_for_the_half_that_a_causal_mask_hides(case: Case, measured: Any) -> None:
    shapes, stage, (products, attention) = measured(case)
    whole = flops(shapes, stage, Load(TOKENS, TOKENS**2, case.images, TARGETS)).model
    assert whole == products + attention
    alone = flops(shapes, stage, Load(TOKENS, 0, case.images, TARGETS)).model
    own = training_flops(shapes, stage, segments=[TOKENS], images=case.images, targets=TARGETS)
    assert own == alone + (whole - alone) * (TOKENS + 1) / (2 * TOKENS)


def test_what_transformers_runs_above_the_state_that_is_read_does_not_count(measured: Any) -> None:
    shapes, stage, (products, attention) = measured(CASES[0], feature_layer=-2)
    counted = flops(shapes, stage, Load(TOKENS, TOKENS**2, IMAGES, TARGETS)).model
    last_layer = (
        2 * IMAGES * 26 * (4 * 32 * 32 + 2 * 32 * 64 + 26 * 2 * 32)
    )  # q, k, v, output; MLP; 25 patches and [CLS]
    assert products + attention - counted == last_layer


def test_cached_features_cost_nothing(measured: Any) -> None:
    shapes, stage, _ = measured(CASES[0])
    row = {"segments": [60, 36], "images": IMAGES, "targets": TARGETS}
    tower = 2 * IMAGES * (25 * 588 * 32 + 2 * 26 * (4 * 32 * 32 + 2 * 32 * 64 + 26 * 2 * 32))
    saved = training_flops(shapes, stage, **row) - training_flops(shapes, stage, **row, features_cached=True)
    assert saved == tower


def test_llama_2_7b_costs_6_n_a_token_but_for_its_embedding_and_attention(make_stage: Any, make_mixture: Any) -> None:
    llama = LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32)
    config = VilaConfig(vision_config=CLIPVisionConfig(), text_config=llama, tie_word_embeddings=False)
    stage = make_stage(make_mixture("pairs"), trainable=("language_model",))
    embedding, norms = 32_000 * 4096, 65 * 4096
    by_6n = 6 * (6_738_415_616 - embedding - norms) * 4096  # the number that Meta publishes
    attention = 6 * 32 * 2 * 4096 * 4096 * 4097 / 2
    counted = training_flops(shapes_of(config), stage, segments=[4096], images=0, targets=4096)
    assert counted == by_6n + attention
