"""Loss curves of bf16 training, beside those of the engine that kept fp32 weights under autocast.

results/bf16_curves_before.json has the curves of that engine: this program, called with `record` in a tree of commit
6d700a6, wrote them. They are of three seeds of the sample order, over 200 steps of the tiny recipe's model, whose
projector and language model train at the rates of its stage `pretrain`. (200 steps of the demo's model take hours on a
CPU without instructions for bf16.) Here the curves are computed by the engine at hand, and those of seed 0 in fp32 by
both, which shows that data, initial model and order are the same. The record ends with these samples: once the tiny
recipe has others, there is nothing to compare with.

Points of a curve: means of every 20 steps, and validations. Peer: how far the recorded seeds are from each other at a
point, from the least to the greatest. Ours: how far a seed is from its recorded curve. Target: nowhere farther.
"""

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from result import result
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from vila_ops.config import NO_CONTEXT, Run, Stage, load
from vila_ops.data.loading.loader import RowLoader
from vila_ops.data.preprocess.prepare import prepare
from vila_ops.model.assemble import assemble
from vila_ops.train import loop
from vila_ops.train.job import RankInfo, TrainJob

ROOT = Path(__file__).parents[1]
RECORDED = ROOT / "benchmarks/results/bf16_curves_before.json"
SEEDS = os.environ.get("VILA_BENCH_SEEDS", "0,1,2").split(",")
STEPS, VALIDATE_EVERY, WINDOW = 200, 50, 20
ORDER = "0123456789abcdef"
"""Stands for the digest of the data, which decides the order of samples and changes with the format of shards."""
PRODUCTS = {
    getattr(getattr(torch.ops.aten, name), overload)
    for name in ("mm", "bmm", "addmm", "baddbmm")
    for overload in ("default", "out")
}
Curve = dict[str, list[float]]
"""Losses of the steps and of the validations, nats per target token."""


class RoundedProducts(TorchDispatchMode):
    """Products of bf16 matrices as products in fp32 that are rounded to bf16 at the end, which is the rule of GPUs.

    A CPU without AVX-512 takes fifty times as long for torch's own.
    """

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function not in PRODUCTS or args[0].dtype != torch.bfloat16:
            return function(*args, **kwargs)
        product = function.overloadpacket(*(one.float() if isinstance(one, Tensor) else one for one in args))
        return kwargs["out"].copy_(product) if "out" in kwargs else product.to(torch.bfloat16)


class InFixedOrder(RowLoader):
    """Reads samples in an order that does not depend on the digest of the data."""

    def __init__(self, file: Any, *, digest: str, **more: Any) -> None:
        super().__init__(file, digest=ORDER, **more)


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if sys.argv[1:] == ["record"]:
            curves = {f"{seed}": curve(folder, seed) for seed in range(3)} | {"fp32": curve(folder, 0, "fp32")}
            RECORDED.write_text(json.dumps(curves, indent=1) + "\n")
            return
        ours = {seed: curve(folder, int(seed)) for seed in SEEDS}
        fp32 = curve(folder, 0, "fp32")
    recorded: dict[str, Curve] = json.loads(RECORDED.read_text())
    spreads = np.ptp([points(recorded[seed]) for seed in "012"], axis=0)
    apart = np.array([np.abs(points(ours[seed]) - points(recorded[seed])) for seed in SEEDS])
    fp32_apart = float(np.abs(points(fp32) - points(recorded["fp32"])).max())
    result(
        "bf16_curves",
        ours=1e3 * float(apart.mean()),
        peer=1e3 * float(spreads.mean()),
        target=1.0,
        ok=bool((apart <= spreads).all()) and fp32_apart <= 1e-6,
        unit="thousandths of a nat per target token, mean over the points of a curve",
        seeds=list(SEEDS),
        greatest_share_of_spread=round(float((apart / spreads).max()), 3),
        fp32_farthest=round(fp32_apart, 6),
        points={seed: points(ours[seed]).round(5).tolist() for seed in SEEDS},
        recorded_points={seed: points(recorded[seed]).round(5).tolist() for seed in "012"},
    )


def points(curve: Curve) -> NDArray[np.float64]:
    """Means of every 20 steps, then the validations but the first, before which no seed was read."""
    return np.array([*np.reshape(curve["loss"], (-1, WINDOW)).mean(1), *curve["validation_loss"][1:]])


def curve(folder: Path, seed: int, precision: str = "bf16") -> Curve:
    """Train the stage of a seed."""
    run = load(
        ROOT / "configs/recipes/tiny.yaml",
        resources=ROOT / "configs/resources/inline.yaml",
        overrides=(
            f"resources.storage.store={folder}/store",
            f"resources.storage.cache={folder}/cache",
            "resources.train.threads_per_worker=1",
        ),
    )
    stage = stage_of(run, seed, precision)
    loop.RowLoader = InFixedOrder  # type: ignore[misc]
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        job = TrainJob(
            stage=stage,
            data=prepare(stage.mixture, run.recipe.text(), run.resources),
            init=assemble(run.recipe.model, run.resources),
            resources=run.resources,
            context=NO_CONTEXT,
            attempt=scratch,
            resume=f"{scratch}/resume",
            run_id=None,
            fresh_projector=True,
        )
        with RoundedProducts():
            loop.train(job, RankInfo())
        rows: list[dict[str, Any]] = json.loads((Path(scratch) / loop.CURVE).read_text())
    return {
        key: [round(float.fromhex(row[key]), 6) for row in rows if key in row] for key in ("loss", "validation_loss")
    }


def stage_of(run: Run, seed: int, precision: str) -> Stage:
    """The stage `pretrain` of the recipe with more steps."""
    return Stage.model_validate({
        **run.recipe.stages["pretrain"].model_dump(), "seed": seed, "precision": precision, "num_steps": STEPS,
        "save_every": STEPS, "validate_every": VALIDATE_EVERY, "validation_rows": 4,
    })  # fmt: skip


if __name__ == "__main__":
    main()
