"""A visual expert through the real task: it trains, the language model stays frozen, and the next stage keeps it."""

from pathlib import Path
from typing import Any

import pytest
import torch

from vila_ops.artifacts.store import content
from vila_ops.model import folder as model_folder
from vila_ops.model.trainable import EXPERT, component_of
from vila_ops.train.stage import train_stage


@pytest.mark.slow
def test_two_steps_train_expert_and_projector_alone_and_a_later_stage_keeps_the_expert(
    bench: Any, make_stage: Any, tmp_path: Path
) -> None:
    resources = bench.resources.with_changes({"storage.store": str(tmp_path)})
    steps = {"num_steps": 2, "validate_every": 1, "validation_rows": 1}
    both = {"trainable": ["projector", "language_model"]}
    stage = make_stage(bench.mixture, **steps, **both, tuning={"kind": "visual_expert"}, weight_decay=0.1)
    first = train_stage(stage, bench.model, bench.data, bench.init, resources)
    before, model = (model_folder.load(content(folder)) for folder in (bench.init, first))
    assert model.config.visual_expert
    old, new = before.state_dict(), model.state_dict()
    language_model = [name for name in old if component_of(name) == "language_model"]
    assert all(torch.equal(old[name], new[name]) for name in language_model)
    expert = [name for name in new if EXPERT in name]
    assert set(new) == set(old) | set(expert)
    assert not any(torch.equal(new[name], new[name.replace(EXPERT, ".")]) for name in expert)

    later = make_stage(bench.mixture, **steps, trainable=["projector"], name="later")
    second = model_folder.load(content(train_stage(later, bench.model, bench.data, first, resources)))
    last = second.state_dict()
    assert second.config.visual_expert
    assert all(torch.equal(new[name], last[name]) for name in [*language_model, *expert])
