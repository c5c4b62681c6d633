"""Two ranks with rows with and without images, for `ranks.py`."""

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import save_file
from torch import Tensor

from vila_ops.config import Resources, Stage
from vila_ops.model import folder as model_folder
from vila_ops.model.trainable import set_trainable
from vila_ops.train import engine as engines
from vila_ops.train.engine import TrainEngine, deepspeed_config
from vila_ops.train.job import RankInfo
from vila_ops.train.loop import modifications_of
from vila_ops.train.objective import Batch, Objective

STEPS = (("PT", "TP"), ("TT", "TT"), ("TT", "PT"), ("PP", "TT"))
"""For each optimizer step its passes, and for each pass the row of each rank: with an image (P) or only text (T)."""


def make_batch(objective: Objective, kind: str, seed: int, *, any_images: bool) -> Batch:
    """Return a batch of one row, with pixels if the tower trains, and features otherwise."""
    config = objective.model.config
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(10, 200, (1, 24), generator=random)
    pixels = torch.rand(1, 3, config.vision_side, config.vision_side, generator=random)
    features = torch.randn(1, config.image_seq_length, config.vision_config.hidden_size, generator=random)
    tower_trains = any(p.requires_grad for p in objective.model.model.vision_tower.parameters())
    labels = ids.clone()
    labels[:, :8] = -100
    if kind == "P":
        ids[:, 2 : 2 + config.image_seq_length] = config.image_token_id
    batch = Batch.of_tokens(
        objective.model,
        input_ids=ids,
        position_ids=torch.arange(24)[None],
        segment_ids=torch.ones(1, 24, dtype=torch.long),
        labels=labels,
        any_images=any_images,
    )
    return replace(
        batch,
        features=features.to(objective.model.dtype) if kind == "P" and not tower_trains else None,
        pixel_values=pixels if kind == "P" and tower_trains else None,
    )


def walk(engine: TrainEngine, objective: Objective, *, ranks: tuple[int, ...]) -> dict[str, Tensor]:
    """Take all steps with the rows of some ranks. Returns the state by name."""
    for number, passes in enumerate(STEPS):
        for micro, kinds in enumerate(passes):
            for rank in ranks:
                any_images = "P" in (kinds if len(ranks) == 1 else kinds[rank])
                batch = make_batch(objective, kinds[rank], 100 * number + 10 * micro + rank, any_images=any_images)
                engine.backward(engine.loss(batch)[0] / 60)
        engine.step(1.0)
    states = {name: {k: t.clone() for k, t in tensors.items()} for name, tensors in engine.state()}
    return {f"{kind}/{name}": t.contiguous() for name, tensors in states.items() for kind, t in tensors.items()}


def set_out(folder: str, stage: Stage, resources: Resources) -> tuple[TrainEngine, Objective]:
    """Return engine and objective of a stage. ZeRO-3 gathers every weight, also the small ones, which all are here."""
    model = model_folder.load(Path(folder), modifications=modifications_of(stage))
    objective = Objective(model)
    trained = set_trainable(objective, stage.trainable, stage.tuning)
    with mock.patch.object(engines, "deepspeed_config", _with_all_weights_sharded):
        return engines.build_engine(objective, trained, stage, resources), objective


def _with_all_weights_sharded(*args: Any) -> dict[str, Any]:
    """DeepSpeed's default keeps weights of up to 100,000 numbers whole on every rank."""
    config = deepspeed_config(*args)
    return {**config, "zero_optimization": {**config["zero_optimization"], "stage3_param_persistence_threshold": 0}}


def run(task: dict[str, Any], rank_info: RankInfo) -> None:
    """Write the state after the steps of a case. A single process takes the rows of both ranks."""
    stage, resources = Stage.model_validate(task["stage"]), Resources.model_validate(task["resources"])
    ranks = (0, 1) if rank_info.world_size == 1 else (rank_info.rank,)
    state = walk(*set_out(task["folder"], stage, resources), ranks=ranks)
    if rank_info.rank == 0:
        save_file(state, task["out"])
