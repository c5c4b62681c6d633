"""Masters at the start of a stage and after a restore, for `ranks.py`."""

import json
from pathlib import Path
from typing import Any

from engines_step import state
from mixed_ranks import STEPS, make_batch, set_out
from safetensors.torch import load_file
from torch import Tensor

from vila_ops.config import Resources, Stage
from vila_ops.train.engine import TrainEngine
from vila_ops.train.job import RankInfo


def run(task: dict[str, Any], rank_info: RankInfo) -> None:
    """Take a step, restore its state into another engine, and take one more step with both.

    Rank 0 writes to `out` the largest difference of the masters from the folder's weights before the first step, of the
    state from the one that was restored, and of both states after the last step.
    """
    stage, resources = Stage.model_validate(task["stage"]), Resources.model_validate(task["resources"])
    engine, objective = set_out(task["folder"], stage, resources)
    stored = load_file(Path(task["folder"]) / "model.safetensors")
    begun = {name.removeprefix("param/model."): weight for name, weight in state(engine).items() if "param/" in name}
    begins = _apart(begun, {name: stored[name] for name in begun})

    def step(engine: TrainEngine, number: int) -> None:
        for micro, kinds in enumerate(STEPS[number]):
            seed = 100 * number + 10 * micro + rank_info.rank
            batch = make_batch(objective, kinds[rank_info.rank], seed, any_images="P" in kinds)
            engine.backward(engine.loss(batch)[0] / 60)
        engine.step(1.0)

    step(engine, 0)
    saved = state(engine)
    by_name: dict[str, dict[str, Tensor]] = {}
    for key, tensor in saved.items():
        kind, _, name = key.partition("/")
        by_name.setdefault(name, {})[kind] = tensor
    again, objective = set_out(task["folder"], stage, resources)
    again.restore(by_name, step=1)
    restored = _apart(state(again), saved)
    for one in (engine, again):
        step(one, 1)
    facts = {"begins": begins, "restored": restored, "continued": _apart(state(again), state(engine)), **engine.facts()}
    if rank_info.rank == 0:
        Path(task["out"]).write_text(json.dumps(facts))


def _apart(own: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert own.keys() == other.keys()
    return max(float((own[name] - other[name]).abs().max()) for name in own)
