"""The config and the device that DeepSpeed gets, by hand."""

import os
from typing import Any

import pytest
import torch

from vila_ops.artifacts.store import content
from vila_ops.config import Resources
from vila_ops.model import folder as model_folder
from vila_ops.plan.messages import MessageSizes, message_sizes, sizes_by_shapes, sizes_of
from vila_ops.plan.shapes import shapes_of
from vila_ops.train.engine import compute_on, deepspeed_config

ZERO = Resources(launch="ray", ray_address="head:1").with_changes({"train.num_workers": 4, "train.micro_batch_size": 2})
COMMON = {
    "train_batch_size": 32, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 4,
    "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False, "steps_per_print": 2147483648,
}  # fmt: skip
MESSAGES = {
    "overlap_comm": False, "reduce_bucket_size": 5, "allgather_bucket_size": 6, "stage3_prefetch_bucket_size": 6,
}  # fmt: skip
CPU = {"device": "cpu"}


@pytest.mark.parametrize(
    ("resources", "most", "own"),
    [
        ({"train.zero_stage": 1}, 0.5, {"gradient_clipping": 0.5, "zero_optimization": {"stage": 1}}),
        (
            {"train.zero_stage": 3},
            None,
            {"gradient_clipping": 0.0, "zero_optimization": {"stage": 3, "overlap_comm": True}},
        ),
        (
            {
                "train.zero_stage": 2,
                "train.offload": "optimizer",
                "train.optimizer": "torch",
                "train.gradient_checkpointing": True,
            },
            1.0,
            {"gradient_clipping": 1.0, "zero_optimization": {"stage": 2, "offload_optimizer": CPU}},
        ),
        (
            {"train.zero_stage": 3, "train.offload": "parameters"},
            1.0,
            {
                "gradient_clipping": 1.0,
                "zero_optimization": {
                    "stage": 3,
                    "overlap_comm": True,
                    "offload_optimizer": CPU,
                    "offload_param": CPU,
                },
            },
        ),
    ],
)
def test_deepspeed_s_config_by_hand(
    resources: dict[str, Any], most: float | None, own: dict[str, Any], make_stage: Any, make_mixture: Any
) -> None:
    stage = make_stage(make_mixture("pairs"), global_batch_size=32, max_grad_norm=most)
    sizes = MessageSizes(reduce=5, gather=6)
    expected = {**COMMON, **own, "zero_optimization": {**MESSAGES, **own["zero_optimization"]}}
    assert deepspeed_config(stage, ZERO.with_changes(resources), sizes) == expected


@pytest.mark.parametrize("reductions", ["bf16", "fp32"])
def test_deepspeed_s_config_of_bf16_by_hand(reductions: str, make_stage: Any, make_mixture: Any) -> None:
    """DeepSpeed's default would add micro-batches up in bf16."""
    stage = make_stage(make_mixture("pairs"), global_batch_size=32, precision="bf16")
    resources = ZERO.with_changes({"train.zero_stage": 2, "train.reductions": reductions})
    config = deepspeed_config(stage, resources, MessageSizes(5, 6))
    assert {key: config[key] for key in ("bf16", "data_types", "communication_data_type")} == {
        "bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}, "communication_data_type": reductions,
    }  # fmt: skip


def test_messages_are_a_layer_of_llama_2_7b_by_hand(bench: Any) -> None:
    """A layer has 4 x 4096^2 + 3 x 4096 x 11008 weights. A tiny layer is sent with others, in messages of 8 MiB."""
    layer = 4 * 4096**2 + 3 * 4096 * 11008
    assert message_sizes(layer) == (layer, layer)
    tiny = model_folder.load(content(bench.init))
    assert sizes_of(tiny) == sizes_by_shapes(shapes_of(tiny.config)) == (2**22, 2**22)


@pytest.mark.parametrize(("device", "read"), [("cuda:1", "1"), ("xpu:0", "0"), ("cpu", "3")])
def test_deepspeed_computes_on_the_device_that_the_process_was_given(
    device: str, read: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For the fourth worker of a node. DeepSpeed reads its GPU in LOCAL_RANK (ray#37212, ray#40803)."""
    monkeypatch.setenv("LOCAL_RANK", "3")
    compute_on(torch.device(device))
    assert os.environ["LOCAL_RANK"] == read
