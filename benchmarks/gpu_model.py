"""Model, batches and step of the GPU benchmarks: 1.2 billion weights with a tower of 400 million, all random, in bf16.

Sequences of 4,096 tokens are packed from samples with LLaVA-like lengths (peers.py). An image is 576 tokens.
VILA_BENCH_SMALL=1 takes a tiny model on the CPU, so that every benchmark can be tried without a GPU.
"""

import os
import sys
import time
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from peers import llava_like
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig

from vila_ops.config import Resources, Stage
from vila_ops.config.train import Lora
from vila_ops.data.loading.packing import IGNORE_INDEX
from vila_ops.device import device_of
from vila_ops.model import attention, lora
from vila_ops.model.configuration import VilaConfig
from vila_ops.model.features import BATCH
from vila_ops.model.trainable import component_of, set_trainable
from vila_ops.model.vila import VilaForConditionalGeneration
from vila_ops.plan.memory import MicroBatch, Weights, memory
from vila_ops.plan.shapes import shapes_of
from vila_ops.train.engine import TrainEngine, build_engine
from vila_ops.train.objective import Batch, Objective, copied

SMALL = bool(os.environ.get("VILA_BENCH_SMALL"))
SEQUENCE_LENGTH, ROWS, PASSES = (640, 1, 1) if SMALL else (4096, 2, 4)
"""Tokens of a packed sequence, sequences in a forward pass, and forward passes in a step."""
VOCABULARY = 512 if SMALL else 32_000
SIDE = 336
"""(336 / 14)^2 = 576 tokens an image."""
IMAGE_TOKEN = 5
TOWER = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
DECODER = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
if not SMALL:
    TOWER = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16}
    DECODER = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32}
STAGE: dict[str, Any] = {
    "name": "gpu", "mixture": {"name": "m", "sources": {"a": {"kind": "jsonl", "path": "x", "render": "caption"}}},
    "trainable": ["vision_tower", "projector", "language_model"], "num_steps": 100, "global_batch_size": ROWS * PASSES,
    "sequence_length": SEQUENCE_LENGTH, "learning_rate": 1e-5, "precision": "bf16", "save_every": 100,
    "validate_every": 100,
}  # fmt: skip
Row = list[tuple[int, bool]]
"""Samples of a packed sequence: tokens, and whether they show an image."""


def device() -> torch.device:
    """The GPU, or the CPU in small. Ends the process without either."""
    try:
        return device_of("cpu" if SMALL else "gpu")
    except ValueError as error:
        sys.exit(f"{error}; or VILA_BENCH_SMALL=1, which runs a benchmark in small without a GPU")


def config() -> VilaConfig:
    """The model's shapes."""
    heads = DECODER["num_attention_heads"] // 4
    return VilaConfig(
        vision_config=CLIPVisionConfig(**TOWER, image_size=SIDE, patch_size=14),
        text_config=LlamaConfig(**DECODER, num_key_value_heads=heads, vocab_size=VOCABULARY),
        image_token_index=IMAGE_TOKEN, vision_side=SIDE, tie_word_embeddings=False,
    )  # fmt: skip


def random_model(on: torch.device) -> VilaForConditionalGeneration:
    """A model with random weights."""
    torch.manual_seed(0)
    with on:
        return VilaForConditionalGeneration(config())


@dataclass(frozen=True)
class Trainee:
    """A model with its engine."""

    model: VilaForConditionalGeneration
    engine: TrainEngine
    stage: Stage
    resources: Resources
    device: torch.device

    def batch(self, rows: list[Row]) -> Batch:
        """A micro-batch on the device: an image begins at the second token of its sample, target tokens end it."""
        host = Batch.of_tokens(self.model, **_tokens(rows), any_images=any(shows for row in rows for _, shows in row))
        batch: Batch = copied(host, lambda tensor: tensor.to(self.device))
        images = sum(shows for row in rows for _, shows in row)
        if not images:
            return batch
        pixels = torch.rand(images, 3, SIDE, SIDE, device=self.device)
        if "vision_tower" in self.stage.trainable:
            return replace(batch, pixel_values=pixels)
        with torch.no_grad():
            features = [self.model.tower_features(part) for part in torch.split(pixels, BATCH)]
        return replace(batch, features=torch.cat(features))

    def step(self, batches: list[Batch]) -> float:
        """Seconds of an optimizer step."""
        targets = sum(len(batch.labels) for batch in batches)
        started = time.perf_counter()
        for batch in batches:
            self.engine.backward(self.engine.loss(batch)[0] / targets)
        float(self.engine.step(1.0))  # waits for the device
        return time.perf_counter() - started

    def forecast(self, rows: list[list[Row]]) -> float:
        """The planner's bytes for the largest of some micro-batches."""
        images = max(sum(shows for row in each for _, shows in row) for each in rows)
        frozen = {name: p.numel() for name, p in self.model.named_parameters() if not p.requires_grad}
        decoder = sum(size for name, size in frozen.items() if component_of(name) == "language_model")
        trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        weights = Weights(trained, decoder, sum(frozen.values()) - decoder)
        largest = MicroBatch(len(rows[0]), SEQUENCE_LENGTH, images)
        return memory(shapes_of(self.model.config), weights, self.stage, self.resources, largest).total


def trainee(stage: dict[str, Any] | None = None, **train: Any) -> Trainee:
    """A random model with the engine of a stage, on resources with these settings of `train`."""
    on, own = device(), Stage.model_validate({**STAGE, **(stage or {})})
    place: dict[str, Any] = {"launch": "inline", "device": "cpu" if SMALL else "gpu"}
    if train.get("zero_stage"):
        place |= {"launch": "ray", "ray_address": "127.0.0.1:1"}  # workers that a benchmark starts itself, without Ray
    resources = Resources.model_validate({**place, "train": {"micro_batch_size": ROWS, **train}})
    model = random_model(on)
    attention.use(model, attention.choose(resources.train.attention, on, own.precision))
    if isinstance(own.tuning, Lora):
        lora.add(model, own.tuning, seed=0, dtype=torch.bfloat16)
    objective = Objective(model)
    engine = build_engine(objective, set_trainable(objective, own.trainable, own.tuning), own, resources)
    return Trainee(model, engine, own, resources, on)


def packed(number: int, *, seed: int = 0) -> list[Row]:
    """Packed sequences, each full: its last sample is cut."""
    draw = np.random.default_rng(seed)
    return [_row(draw) for _ in range(number)]


def targets(length: int, shows: bool) -> int:
    """Target tokens of a sample: three quarters of its text."""
    return (length - 576 * shows) * 3 // 4


def _row(draw: np.random.Generator) -> Row:
    row: Row = []
    left = SEQUENCE_LENGTH
    lengths, shown = llava_like(64, seed=int(draw.integers(2**31)))
    for length, shows in zip(lengths.tolist(), shown.tolist(), strict=True):
        length = min(length, left)
        row.append((length, bool(shows) and length > 600))
        left -= length
        if not left:
            return row
    raise AssertionError(f"64 samples have fewer than {SEQUENCE_LENGTH} tokens")


def _tokens(rows: list[Row]) -> dict[str, Tensor]:
    shape = (len(rows), SEQUENCE_LENGTH)
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(6, VOCABULARY, shape, generator=draw)
    positions, segments = torch.zeros(shape).long(), torch.zeros(shape).long()
    labels = torch.full(shape, IGNORE_INDEX)
    for number, row in enumerate(rows):
        start = 0
        for sample, (length, shows) in enumerate(row, start=1):
            end = start + length
            positions[number, start:end], segments[number, start:end] = torch.arange(length), sample
            ids[number, start + 1 : start + 1 + 576 * shows] = IMAGE_TOKEN
            first = end - targets(length, shows) - 1
            labels[number, first : end - 1] = ids[number, first + 1 : end]
            start = end
    return {"input_ids": ids, "position_ids": positions, "segment_ids": segments, "labels": labels}
