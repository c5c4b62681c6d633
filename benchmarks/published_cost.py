"""Forecast of the training hours that VILA and LLaVA-1.5 published for A100s, from samples, lengths and shapes.

One utilisation, UTILISATION, serves all figures; nothing else is fitted. The forecast models what their scripts
did: gradient checkpointing everywhere, the head at every position, LLaVA's sampler by modality and length for its
SFT (16 samples on a GPU), random batches padded to the longest for align, and VILA v1.0's packing of a micro-batch
inside the forward pass for pretrain and sft. (The paper says that its runs did not pack; padded, its 30 hours would
take all of an A100's peak.) The hours cover what the machine computes: padding and recomputed layers too.

Published: VILA 7B in the paper (arXiv:2312.07533, appendix B: 4 + 30 + 6 h on 128 GPUs), and in the README of v1.0
(align and sft on 8: 3.5 and 25 h for 7B, 5.5 and 40 h for 13B); LLaVA-1.5's README (on 8: 3.5 and 5.5 h for align,
10 and 20 h for SFT; 7B's SFT on GPUs of 40 GB). Samples: 558,128 and 665,298 of LLaVA-1.5, 595,375 of LLaVA-CC3M;
the rest, and every length, from configs/lengths/vila.yaml, which says what is assumed. VILA's sft has the paper's
1M + 1M samples, also for the README's hours, whose data (M3IT, FLAN, ShareGPT4V) have no published count. Target:
every forecast within 25 %.
"""

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from packing import even_chunks
from result import result

from vila_ops.config import Mixture, load
from vila_ops.config.lengths import Lengths, load_lengths
from vila_ops.plan.flops import Load, flops
from vila_ops.plan.lengths import EpochLengths, declared
from vila_ops.plan.plan import config_of
from vila_ops.plan.shapes import shapes_of

CONFIGS = Path(__file__).parents[1] / "configs"
PEAK = 312e12
UTILISATION = 0.48
"""Share of the peak, for every stage: the middle of the seven figures that one value can explain (0.415 to 0.576)."""
TARGET = 0.25
Batching = Literal["random", "llava", "packed"]


@dataclass(frozen=True)
class Figure:
    """One published time."""

    name: str
    recipe: str
    stage: str
    data: str
    gpus: int
    hours: float
    batching: Batching
    batch_size: int = 32


FIGURES = [
    Figure("LLaVA-1.5 7B align", "vila-7b", "align", "llava_align", 8, 3.5, "random"),
    Figure("LLaVA-1.5 13B align", "vila-13b", "align", "llava_align", 8, 5.5, "random"),
    Figure("LLaVA-1.5 7B sft", "vila-7b", "sft", "llava_sft", 8, 10, "llava", 16),
    Figure("LLaVA-1.5 13B sft", "vila-13b", "sft", "llava_sft", 8, 20, "llava", 16),
    Figure("VILA 7B pretrain, paper", "vila-7b", "pretrain", "vila", 128, 30, "packed", 8),
    Figure("VILA 7B align, README", "vila-7b", "align", "vila", 8, 3.5, "random"),
    Figure("VILA 13B align, README", "vila-13b", "align", "vila", 8, 5.5, "random"),
    Figure("VILA 7B sft, README", "vila-7b", "sft", "vila", 8, 25, "packed", 16),
    Figure("VILA 13B sft, README", "vila-13b", "sft", "vila", 8, 40, "packed", 16),
    Figure("VILA 7B align, paper", "vila-7b", "align", "vila", 128, 4, "random"),
    Figure("VILA 7B sft, paper", "vila-7b", "sft", "vila", 128, 6, "packed", 16),
]


def main() -> None:
    counted = {figure.name: _flops(figure) for figure in FIGURES}
    seconds = {figure.name: figure.hours * 3600 * figure.gpus * PEAK for figure in FIGURES}
    implied = {name: machine / seconds[name] for name, (_, machine) in counted.items()}
    figures = {
        figure.name: {
            "published_hours": figure.hours,
            "gpus": figure.gpus,
            "forecast_hours": round(implied[figure.name] / UTILISATION * figure.hours, 2),
            "deviation": round(implied[figure.name] / UTILISATION - 1, 3),
            "implied_mfu": round(counted[figure.name][0] / seconds[figure.name], 3),
            "implied_utilisation": round(implied[figure.name], 3),
        }
        for figure in FIGURES
    }
    for name, one in figures.items():
        print(name, one)
    within = [name for name, one in figures.items() if abs(one["deviation"]) <= TARGET]
    pretrain = figures["VILA 7B pretrain, paper"]
    result(
        "published_cost",
        ours=pretrain["forecast_hours"],
        peer=pretrain["published_hours"],
        target=TARGET,
        ok=len(within) == len(figures),
        unit="hours of VILA 7B's pretrain on 128 A100; the target is the deviation of every figure",
        utilisation=UTILISATION,
        within=within,
        figures=figures,
    )


def _flops(figure: Figure) -> tuple[float, float]:
    """FLOPs of the model, and of the machine as the scripts used it."""
    run = load(CONFIGS / f"recipes/{figure.recipe}.yaml", resources=CONFIGS / "resources/vila_128.yaml")
    stage = run.recipe.stages[figure.stage]
    model = run.recipe.model_of(figure.stage)
    shapes = shapes_of(config_of(model, run.resources))
    epoch = _epoch(figure, stage.mixture, image_tokens=model.image_tokens())
    longest = padded_lengths(epoch.tokens, epoch.images > 0, figure.batching, figure.batch_size)
    useful = machine = 0.0
    for shows in (epoch.images > 0, epoch.images == 0):
        own, wide = epoch.tokens[shows], longest[shows]
        images, targets = float(epoch.images[shows].sum()), float(epoch.targets[shows].sum())
        loads = (
            Load(float(own.sum()), float((own * (own + 1) / 2).sum()), images, targets),
            Load(float(wide.sum()), float((wide * (wide + 1) / 2).sum()), images, float(wide.sum())),
        )
        if loads[0].tokens:
            useful += flops(shapes, stage, loads[0]).model * epoch.times
            machine += flops(shapes, stage, loads[1]).machine * epoch.times
    return useful, machine


def _epoch(figure: Figure, mixture: Mixture, *, image_tokens: int) -> EpochLengths:
    lengths = load_lengths(CONFIGS / "lengths/vila.yaml")
    most = {"max_tokens": 4096, "image_tokens": image_tokens}
    if figure.data == "vila":
        return declared(lengths, mixture, **most)
    source = {"llava_align": "llava_cc3m", "llava_sft": "llava_1_5_mix"}[figure.data]
    groups = lengths.sources[source]
    if figure.data == "llava_align":
        groups = (type(groups[0]).model_validate({**groups[0].model_dump(), "samples": 558_128}),)
    own = Lengths(sources={source: groups})
    alone = Mixture.model_validate({**mixture.model_dump(), "sources": {source: mixture.sources[source].model_dump()}})
    return declared(own, alone, **{**most, "max_tokens": 2048})


def padded_lengths(
    tokens: NDArray[np.int64], shows: NDArray[np.bool_], batching: Batching, batch_size: int
) -> NDArray[np.int64]:
    """The length of each sample as its batch computes it."""
    longest = tokens.copy()
    if batching == "packed":
        return longest
    draw = random.Random(0)
    groups = [np.arange(len(tokens))] if batching == "random" else [np.flatnonzero(shows), np.flatnonzero(~shows)]
    for group in groups:
        order = draw.sample(group.tolist(), len(group))
        mega = batch_size * (8 if batching == "llava" else 1)
        for start in range(0, len(order), mega):
            part = order[start : start + mega]
            batches = [part]
            if batching == "llava" and len(part) == mega:
                by_length = sorted(part, key=lambda at: -int(tokens[at]))
                chunks = even_chunks([int(tokens[at]) for at in by_length], 8, batch_size)
                batches = _places(by_length, chunks, tokens)
            for batch in batches:
                longest[batch] = tokens[batch].max()
    return longest


def _places(order: list[int], chunks: list[list[int]], tokens: NDArray[np.int64]) -> list[list[int]]:
    """The samples in chunks of lengths."""
    by_length: dict[int, list[int]] = {}
    for at in order:
        by_length.setdefault(int(tokens[at]), []).append(at)
    return [[by_length[length].pop() for length in chunk] for chunk in chunks]


if __name__ == "__main__":
    main()
