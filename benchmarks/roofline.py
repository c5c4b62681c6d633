"""The roofline of VILA 7B's stages on four GPUs, from the planner's FLOPs, weights and activations.

A forward and backward pass of one GPU takes at least as long as each of three things alone:

compute   the machine's FLOPs, recomputed layers included, at the dense bf16 peak
memory    bf16 weights read in the forward pass, in the backward pass and when layers are recomputed; activations
          written and read; fp32 gradients added; the pass's share of an update: 30 bytes for each weight updated here
links     bf16 gradients reduced (ZeRO-2 and 3), bf16 weights gathered twice a pass (ZeRO-3) or once a step (ZeRO-2)

The slowest of them is the roof. `share` is the share of the peak that is left if nothing happens beside anything else,
the worst case. Peaks are those of the vendors' data sheets: A100, H100 and H200 SXM, MI300X. Links within a node of
eight count one direction (NVLink 300 and 450 GB/s, Infinity Fabric 448). Across nodes the eight network cards of a node
count together, with 200 Gb/s each beside A100s and 400 Gb/s beside the others. Nothing here was measured. `ours` is the
smallest share of all, `peer` the 0.48 that explains the published hours (published_cost.py), which it has to exceed.
"""

from dataclasses import dataclass
from pathlib import Path

from result import result

from vila_ops.config import load
from vila_ops.config.lengths import load_lengths
from vila_ops.plan.plan import StagePlan, plan_run

CONFIGS = Path(__file__).parents[1] / "configs"
UTILISATION = 0.48
NODE = 8
"""GPUs of a node."""
BF16, FP32 = 2, 4
OPTIMIZER = 30
"""Bytes for each weight: master, gradient and moments are read, master and moments written, and the bf16 weight."""


@dataclass(frozen=True)
class Gpu:
    """Peaks of a GPU: FLOP/s, and bytes per second of its memory, of its links in a node, and of its network card."""

    flops: float
    memory: float
    link: float
    card: float


GPUS = {
    "A100": Gpu(312e12, 2.039e12, 300e9, 25e9),
    "H100": Gpu(989.4e12, 3.35e12, 450e9, 50e9),
    "H200": Gpu(989.4e12, 4.8e12, 450e9, 50e9),
    "MI300X": Gpu(1307.4e12, 5.3e12, 448e9, 50e9),
}


def main() -> None:
    run = load(CONFIGS / "recipes/vila-7b.yaml", resources=CONFIGS / "resources/vila_128.yaml")
    plan = plan_run(run, load_lengths(CONFIGS / "lengths/vila.yaml"))
    shares: dict[str, dict[str, float]] = {}
    print(
        f"{'stage':<9} {'GPU':<7} {'GPUs':>4} {'compute':>9} {'memory':>9} {'links':>9}  {'bound by':<8} {'share':>6}"
    )
    for one in plan.stages:
        train = run.resources.train.for_stage(one.stage)
        passes = run.recipe.stages[one.stage].global_batch_size // (train.micro_batch_size * train.num_workers)
        for name, gpu in GPUS.items():
            times = _times(
                one, gpu, workers=train.num_workers, passes=passes, zero=train.zero_stage,
                recomputes=train.gradient_checkpointing,
            )  # fmt: skip
            share = times["compute"] / sum(times.values())
            shares.setdefault(one.stage, {})[name] = round(share, 3)
            columns = " ".join(f"{1000 * time:6.0f} ms" for time in times.values())
            bound = max(times, key=lambda key: times[key])
            print(f"{one.stage:<9} {name:<7} {train.num_workers:>4} {columns}  {bound:<8} {share:6.0%}")
    worst = min(min(each.values()) for each in shares.values())
    result(
        "roofline",
        ours=worst,
        peer=UTILISATION,
        target=1.0,
        ok=worst > UTILISATION,
        unit="smallest share of the peak",
        shares=shares,
    )


def _times(one: StagePlan, gpu: Gpu, *, workers: int, passes: int, zero: int, recomputes: bool) -> dict[str, float]:
    """Least seconds of a pass by what takes them."""
    weights, trained = BF16 * one.total_parameters, one.trained_parameters
    updated = trained / workers if zero else trained
    summed = updated if zero >= 2 else trained
    moved = (2 + recomputes) * weights + 2 * one.memory.activations * 2**30 + 2 * FP32 * summed
    sent = BF16 * trained + (2 * weights if zero == 3 else BF16 * trained / passes)
    link = gpu.link if workers <= NODE else min(gpu.link, NODE * gpu.card)
    return {
        "compute": one.machine_flops / (one.steps * passes * workers) / gpu.flops,
        "memory": (moved + OPTIMIZER * updated / passes) / gpu.memory,
        "links": sent * (workers - 1) / workers / link,
    }


if __name__ == "__main__":
    main()
