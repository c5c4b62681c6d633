from collections.abc import Callable
from typing import Any

import pytest
import torch

from vila_ops.config import Stage
from vila_ops.train.optim import parameter_groups, rate_factor


@pytest.fixture(scope="module")
def stage(make_mixture: Any, make_stage: Any) -> Callable[..., Stage]:
    return lambda **more: make_stage(make_mixture("pairs"), **more)


def test_rate_by_hand(stage: Callable[..., Stage]) -> None:
    # 10 steps, 2 of them warm-up, then half a cosine from 1 to 0.2 whose quarter points are known
    chosen = stage(warmup_ratio=0.2, final_ratio=0.2)
    found = [rate_factor(step, chosen, num_steps=10) for step in range(11)]
    assert found[:3] == [0.5, 1.0, 1.0]
    assert found[4] == pytest.approx(0.2 + 0.8 * (1 + 2**-0.5) / 2)
    assert found[6] == pytest.approx(0.6)
    assert found[8] == pytest.approx(0.2 + 0.8 * (1 - 2**-0.5) / 2)
    assert found[10] == pytest.approx(0.2)


def test_warm_up_is_rounded_up_and_no_warm_up_starts_at_the_peak(stage: Callable[..., Stage]) -> None:
    assert [rate_factor(s, stage(warmup_ratio=0.11), num_steps=10) for s in (0, 1, 2)] == [0.5, 1.0, 1.0]
    assert rate_factor(0, stage(warmup_ratio=0), num_steps=10) == 1.0
    assert rate_factor(0, stage(warmup_ratio=0), num_steps=1) == 1.0


def test_every_rate_of_a_stage_moves_the_weights(stage: Callable[..., Stage]) -> None:
    chosen = stage(warmup_ratio=0.5)
    assert all(rate_factor(step, chosen, num_steps=7) > 0 for step in range(7))


def test_matrices_decay_and_vectors_do_not_and_parts_have_their_rates(stage: Callable[..., Stage]) -> None:
    layer, other = torch.nn.Linear(2, 3), torch.nn.LayerNorm(3)
    chosen = stage(
        trainable=["projector", "language_model"],
        weight_decay=0.1,
        learning_rates={"projector": 0.5},
        learning_rate=0.25,
    )
    trained = {"projector": list(layer.named_parameters()), "language_model": list(other.named_parameters())}
    groups = parameter_groups(chosen, trained)  # type: ignore[arg-type]
    seen = [(len(g["params"]), g["lr"], g["weight_decay"]) for g in groups]  # type: ignore[arg-type]
    assert seen == [(1, 0.5, 0.1), (1, 0.5, 0.0), (2, 0.25, 0.0)]
