"""Two steps of the real task with every choice of a stage or model. A new choice is a new line of CASES."""

import dataclasses
import json
import math
from typing import Any

import pytest
import torch

from vila_ops.artifacts.kinds import Checkpoint, Pretrained
from vila_ops.artifacts.store import content
from vila_ops.config import Stage
from vila_ops.data.preprocess.prepare import prepare
from vila_ops.model import folder as model_folder
from vila_ops.model.assemble import assemble
from vila_ops.model.trainable import EXPERT
from vila_ops.train.loop import modifications_of
from vila_ops.train.stage import train_stage

SIDE = 70  # 5 x 5 patches, which neither 2 nor 3 divides


@dataclasses.dataclass(frozen=True)
class Case:
    """Changes of model and stage to the default case, and parts of the names of the tensors that the stage changes."""

    name: str
    model: dict[str, Any] = dataclasses.field(default_factory=dict)
    stage: dict[str, Any] = dataclasses.field(default_factory=dict)
    moves: tuple[str, ...] = ("multi_modal_projector.",)


def projector(**choice: Any) -> dict[str, Any]:
    return {"projector": choice}


CASES = [
    Case("linear", projector(kind="linear")),
    Case("mlp", projector(kind="mlp_gelu")),
    Case("mlp-3", projector(kind="mlp_gelu", depth=3)),
    Case("transformer", projector(kind="transformer", num_layers=2, num_heads=4)),
    *(
        Case(f"downsample-{depth}-{order}", projector(kind="mlp_downsample", depth=depth, token_order=order))
        for depth in (1, 2, 3)
        for order in ("rows", "columns")
    ),
    Case("downsample-3x3", projector(kind="mlp_downsample", depth=3, factor=3)),
    Case("internvit", {"vision_tower": {"kind": "random", "architecture": "internvit"}}),
    Case("larger-images", stage={"image_size": 84}),
    Case(
        "visual-expert",
        stage={"trainable": ["projector", "language_model"], "tuning": {"kind": "visual_expert"}},
        moves=("multi_modal_projector.", EXPERT),
    ),
]


@pytest.fixture(scope="module")
def trained(bench: Any, make_model: Any, make_stage: Any) -> Any:
    """Return the stage of a case, its initial model and its checkpoint."""

    def train(case: Case) -> tuple[Stage, Pretrained, Checkpoint]:
        model = make_model(image_size=SIDE)
        model = model.model_validate({**model.model_dump(), **case.model})
        stage = make_stage(bench.mixture, num_steps=2, validate_every=1, validation_rows=1, **case.stage)
        seen = model.model_validate({**model.model_dump(), "image_size": stage.image_size or SIDE})
        data = prepare(bench.mixture, seen.text(max_tokens=128), bench.resources)
        init = assemble(model, bench.resources)
        return stage, init, train_stage(stage, seen, data, init, bench.resources)

    return train


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_two_steps_train_what_the_stage_names_and_keep_all_else_bit_for_bit(case: Case, trained: Any) -> None:
    stage, init, checkpoint = trained(case)
    curve = json.loads((content(checkpoint) / "curve.json").read_text())
    assert [row["step"] for row in curve] == [0, 1, 2]
    assert all(math.isfinite(float.fromhex(row["validation_loss"])) for row in curve)
    before = model_folder.load(content(init), modifications=modifications_of(stage)).state_dict()
    after = model_folder.load(content(checkpoint)).state_dict()
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    named = {name for name in before if any(fragment in name for fragment in case.moves)}
    assert moved <= named
    assert {name for name in named if name.endswith("weight")} <= moved
