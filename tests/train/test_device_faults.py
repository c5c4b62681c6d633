"""The next setting that saves memory is the cheapest that is left; what the errors say is in tests/fake_device."""

from typing import Any

import pytest

from vila_ops.config import Resources
from vila_ops.config.resources import TrainResources
from vila_ops.train.device_faults import next_setting

RAY = {"num_workers": 2}


@pytest.mark.parametrize(
    ("launch", "train", "setting"),
    [
        ("inline", {"micro_batch_size": 8}, "micro_batch_size: 4"),  # 5, 6 and 7 do not divide 8
        ("inline", {}, "gradient_checkpointing: true"),
        ("inline", {"gradient_checkpointing": True}, None),
        ("ray", {**RAY, "micro_batch_size": 4}, "micro_batch_size: 2"),
        ("ray", {**RAY, "zero_stage": 2}, "zero_stage: 3"),
        ("ray", {**RAY, "zero_stage": 3}, "gradient_checkpointing: true"),
        ("ray", {**RAY, "zero_stage": 3, "gradient_checkpointing": True}, "offload: optimizer"),
        (
            "ray",
            {**RAY, "zero_stage": 3, "gradient_checkpointing": True, "offload": "optimizer"},
            "offload: parameters",
        ),
        ("ray", {**RAY, "zero_stage": 3, "gradient_checkpointing": True, "offload": "parameters"}, None),
        ("ray", {"gradient_checkpointing": True}, None),  # one worker shards nothing
    ],
)
def test_the_next_setting_is_the_cheapest_that_is_left(
    launch: Any, train: dict[str, Any], setting: str | None, make_stage: Any, make_mixture: Any
) -> None:
    address = {"ray_address": "head:6379"} if launch == "ray" else {}
    resources = Resources(launch=launch, train=TrainResources(**train), **address)
    assert next_setting(make_stage(make_mixture("pairs"), global_batch_size=8), resources) == setting
