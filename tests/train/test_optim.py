from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import get_cosine_schedule_with_warmup

from vila_ops.config import Resources, Stage
from vila_ops.train.optim import build_optimizer, lr_multiplier, parameter_groups


@pytest.fixture(scope="module")
def stage(make_mixture: Any, make_stage: Any) -> Callable[..., Stage]:
    return lambda **more: make_stage(make_mixture("pairs"), **more)


def test_rate_by_hand(stage: Callable[..., Stage]) -> None:
    # 10 steps, 2 of them warm-up, then half a cosine from 1 to 0.2 whose quarter points are known
    chosen = stage(warmup_ratio=0.2, final_ratio=0.2)
    multipliers = [lr_multiplier(step, chosen, num_steps=10) for step in range(11)]
    assert multipliers[:3] == [0.5, 1.0, 1.0]
    assert multipliers[4] == pytest.approx(0.2 + 0.8 * (1 + 2**-0.5) / 2)
    assert multipliers[6] == pytest.approx(0.6)
    assert multipliers[8] == pytest.approx(0.2 + 0.8 * (1 - 2**-0.5) / 2)
    assert multipliers[10] == pytest.approx(0.2)


def _rates(schedule: torch.optim.lr_scheduler.LRScheduler, *, num_steps: int) -> list[float]:
    rates = []
    for _ in range(num_steps):
        rates.append(schedule.get_last_lr()[0])
        schedule.optimizer.step()
        schedule.step()
    return rates


@pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step")  # SequentialLR itself causes it
def test_rates_are_those_of_torch_s_schedulers(stage: Callable[..., Stage]) -> None:
    sgd = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    warm = torch.optim.lr_scheduler.LinearLR(sgd, start_factor=1 / 6, total_iters=5)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(sgd, T_max=34, eta_min=0.1)
    both = torch.optim.lr_scheduler.SequentialLR(sgd, [warm, cosine], milestones=[6])
    chosen = stage(warmup_ratio=0.15, final_ratio=0.1)
    multipliers = [lr_multiplier(step, chosen, num_steps=40) for step in range(40)]
    assert multipliers == pytest.approx(_rates(both, num_steps=40), abs=1e-12)


def test_rates_are_those_of_transformers_but_that_the_warm_up_does_not_begin_with_zero(
    stage: Callable[..., Stage],
) -> None:
    """The first step of transformers has rate 0. Here the warm-up is one step ahead, and the cosine is the same."""
    sgd = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    stock = _rates(get_cosine_schedule_with_warmup(sgd, 6, 40), num_steps=40)
    multipliers = [lr_multiplier(step, stage(warmup_ratio=0.15), num_steps=40) for step in range(40)]
    assert multipliers[:6] == pytest.approx(stock[1:7], abs=1e-12)
    assert multipliers[6:] == pytest.approx(stock[6:], abs=1e-12)
    assert stock[0] == 0.0


def test_warm_up_is_rounded_up_and_no_warm_up_starts_at_the_peak(stage: Callable[..., Stage]) -> None:
    assert [lr_multiplier(s, stage(warmup_ratio=0.11), num_steps=10) for s in (0, 1, 2)] == [0.5, 1.0, 1.0]
    assert lr_multiplier(0, stage(warmup_ratio=0), num_steps=10) == 1.0
    assert lr_multiplier(0, stage(warmup_ratio=0), num_steps=1) == 1.0


def test_every_rate_of_a_stage_moves_the_weights(stage: Callable[..., Stage]) -> None:
    chosen = stage(warmup_ratio=0.5)
    assert all(lr_multiplier(step, chosen, num_steps=7) > 0 for step in range(7))


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


@pytest.mark.parametrize(("kind", "implementation"), [("fused", (True, None)), ("torch", (False, False))])
def test_the_optimizer_is_torch_s_adamw_as_the_resources_ask(
    kind: str, implementation: tuple[bool, bool | None], stage: Callable[..., Stage]
) -> None:
    """Five steps of random gradients, against AdamW with the implementation that torch chooses."""
    random = torch.Generator().manual_seed(0)
    start = torch.randn(4, 3, generator=random)
    mine, stock = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    chosen = stage(learning_rate=0.1, weight_decay=0.2, betas=[0.8, 0.9])
    own = build_optimizer(
        chosen, {"projector": [("w", mine)]}, Resources(launch="inline").with_changes({"train.optimizer": kind})
    )  # type: ignore[arg-type]
    other = torch.optim.AdamW([stock], lr=0.1, weight_decay=0.2, betas=(0.8, 0.9))
    assert [(group["fused"], group["foreach"]) for group in own.param_groups] == [implementation]
    for _ in range(5):
        mine.grad = torch.randn(4, 3, generator=random)
        stock.grad = mine.grad.clone()
        own.step()
        other.step()
    assert torch.allclose(mine, stock, atol=1e-6)
    assert not torch.allclose(mine, start, atol=0.1)
