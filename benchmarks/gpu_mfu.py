"""MFU of training on one GPU: a language model of 1.2 billion weights with a tower of 400 million, all random, bf16.

Sequences of 4,096 tokens are packed from samples with LLaVA-like lengths (benchmarks/peers.py). An image is 576 tokens.
Tower, projector and language model all train, by the same step as in a stage. FLOPs follow the rule of
`vila_ops/plan/flops.py`: padding and recomputation do not count. `ours` is the MFU, `peer` the peak that it is a share
of: dense bf16 of an H100 or H200. Target: 0.45. `memory` compares the planner's forecast with the most that torch's
allocator held; its target is 5 %.

Needs an NVIDIA GPU. VILA_BENCH_SMALL=1 runs a small version on any machine, as a check, and keeps no result.
"""

import json
import os
import statistics
import sys
import time
from typing import Any

import numpy as np
import torch
from peers import llava_like
from result import result
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig

from vila_ops.config import Resources, Stage
from vila_ops.config.resources import TrainResources
from vila_ops.data.loading.packing import IGNORE_INDEX
from vila_ops.model import attention
from vila_ops.model.configuration import VilaConfig
from vila_ops.model.trainable import set_trainable
from vila_ops.model.vila import VilaForConditionalGeneration
from vila_ops.plan.flops import training_flops
from vila_ops.plan.memory import MicroBatch, Weights, memory
from vila_ops.plan.shapes import Shapes, shapes_of
from vila_ops.train.engine import TrainEngine, build_engine
from vila_ops.train.objective import Batch, Objective

SMALL = bool(os.environ.get("VILA_BENCH_SMALL"))
TARGET, MEMORY_TARGET = 0.45, 0.05
PEAK_TFLOPS = 989.4
"""Dense bf16 of an H100 SXM, which an H200 has too (NVIDIA's data sheets)."""
WARM_UP, STEPS = (1, 2) if SMALL else (5, 20)
SEQUENCE_LENGTH, ROWS, PASSES = (768, 1, 2) if SMALL else (4096, 2, 4)
"""Packed sequences in a forward pass, and forward passes in a step."""
SIDE = 336
"""(336 / 14)^2 = 576 tokens an image."""
IMAGE_TOKEN = 5
TOWER = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
DECODER = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
if not SMALL:
    TOWER = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16}
    DECODER = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32}
STAGE = {
    "name": "gpu_mfu", "mixture": {"name": "m", "sources": {"a": {"kind": "jsonl", "path": "x", "render": "caption"}}},
    "trainable": ["vision_tower", "projector", "language_model"], "num_steps": 100, "global_batch_size": ROWS * PASSES,
    "sequence_length": SEQUENCE_LENGTH, "learning_rate": 1e-5, "precision": "bf16", "save_every": 100,
    "validate_every": 100,
}  # fmt: skip


def main() -> None:
    if not torch.cuda.is_available() and not SMALL:
        sys.exit("gpu_mfu needs an NVIDIA GPU; VILA_BENCH_SMALL=1 runs it in small without one, and keeps no result")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    stage = Stage.model_validate(STAGE)
    train = TrainResources(micro_batch_size=ROWS)
    resources = Resources(launch="inline", device="auto" if device.type == "cuda" else "cpu", train=train)
    config = _config()
    with device:
        model = VilaForConditionalGeneration(config)
    attention.use(model, attention.choose(resources.train.attention, device, stage.precision))
    objective = Objective(model)
    engine = build_engine(objective, set_trainable(objective, stage.trainable, stage.tuning), stage, resources)
    draw = np.random.default_rng(0)
    passes = [[_row(draw) for _ in range(ROWS)] for _ in range(PASSES)]
    batches = [_batch(rows, device) for rows in passes]
    shapes = shapes_of(config)
    flops = sum(_flops(row, shapes, stage) for rows in passes for row in rows)
    took = statistics.median([_step(engine, batches) for _ in range(WARM_UP + STEPS)][WARM_UP:])
    most = max(sum(shows for row in rows for _, shows in row) for rows in passes)
    weights = Weights(sum(p.numel() for p in model.parameters()), 0, 0)
    forecast = memory(shapes, weights, stage, resources, MicroBatch(ROWS, SEQUENCE_LENGTH, most)).total
    tokens = sum(length for rows in passes for row in rows for length, _ in row)
    said: dict[str, Any] = {
        "unit": f"share of {PEAK_TFLOPS} TFLOP/s",
        "seconds_per_step": round(took, 4),
        "tflops": round(flops / took / 1e12, 3),
        "tokens_per_s": round(tokens / took, 1),
        "weights": weights.trained,
        "attention": config.text_config._attn_implementation,
        "memory": {"forecast_gib": round(forecast / 2**30, 3)},
    }
    mfu = flops / took / (PEAK_TFLOPS * 1e12)
    if device.type != "cuda" or SMALL:
        print(json.dumps({"mfu": mfu, **said}))
        return
    held = torch.cuda.max_memory_allocated()
    said["memory"] |= {"measured_gib": round(held / 2**30, 3), "deviation": round(forecast / held - 1, 4)}
    said["device"] = torch.cuda.get_device_name()
    ok = mfu >= TARGET and abs(forecast / held - 1) <= MEMORY_TARGET
    result("gpu_mfu", ours=mfu, peer=1.0, target=TARGET, ok=ok, **said)


def _config() -> VilaConfig:
    return VilaConfig(
        vision_config=CLIPVisionConfig(**TOWER, image_size=SIDE, patch_size=14),
        text_config=LlamaConfig(**DECODER, num_key_value_heads=DECODER["num_attention_heads"] // 4, vocab_size=32_000),
        image_token_index=IMAGE_TOKEN, vision_side=SIDE, tie_word_embeddings=False,
    )  # fmt: skip


def _step(engine: TrainEngine, batches: list[Batch]) -> float:
    """Seconds of one step."""
    targets = sum(int((batch.labels != IGNORE_INDEX).sum()) for batch in batches)
    started = time.perf_counter()
    for batch in batches:
        engine.backward(engine.loss(batch)[0] / targets)
    engine.step(1.0)  # returns the gradient's norm, which waits for the device
    return time.perf_counter() - started


def _flops(row: list[tuple[int, bool]], shapes: Shapes, stage: Stage) -> float:
    return training_flops(
        shapes, stage, segments=[length for length, _ in row], images=sum(shows for _, shows in row),
        targets=sum(_targets(length, shows) for length, shows in row),
    )  # fmt: skip


def _row(draw: np.random.Generator) -> list[tuple[int, bool]]:
    """Samples of a packed sequence: tokens, and whether they include an image; the last is cut to fill the sequence."""
    row: list[tuple[int, bool]] = []
    left = SEQUENCE_LENGTH
    lengths, shown = llava_like(64, seed=int(draw.integers(2**31)))
    for length, shows in zip(lengths.tolist(), shown.tolist(), strict=True):
        length = min(length, left)
        row.append((length, bool(shows) and length > 600))
        left -= length
        if not left:
            return row
    raise AssertionError(f"64 samples have fewer than {SEQUENCE_LENGTH} tokens")


def _targets(length: int, shows: bool) -> int:
    """Target tokens of a sample: three quarters of its text."""
    return (length - 576 * shows) * 3 // 4


def _batch(rows: list[list[tuple[int, bool]]], device: torch.device) -> Batch:
    """Packed sequences of a forward pass: an image begins at the second token of its sample, target tokens end it."""
    shape = (len(rows), SEQUENCE_LENGTH)
    ids, positions, segments = torch.randint(6, 32_000, shape), torch.zeros(shape).long(), torch.zeros(shape).long()
    labels = torch.full(shape, IGNORE_INDEX)
    for number, row in enumerate(rows):
        start = 0
        for sample, (length, shows) in enumerate(row, start=1):
            end = start + length
            positions[number, start:end], segments[number, start:end] = torch.arange(length), sample
            ids[number, start + 1 : start + 1 + 576 * shows] = IMAGE_TOKEN
            first = end - _targets(length, shows) - 1
            labels[number, first : end - 1] = ids[number, first + 1 : end]
            start = end
    images = sum(shows for row in rows for _, shows in row)
    pixels: Tensor | None = torch.rand(images, 3, SIDE, SIDE, device=device) if images else None
    moved = [tensor.to(device) for tensor in (ids, positions, segments, labels)]
    return Batch(*moved, features=None, pixel_values=pixels)


if __name__ == "__main__":
    main()
