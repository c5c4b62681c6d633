"""A pass of a tower is computed in parts, and its caller sees only the end."""

import gc
import weakref

import pytest
import torch
from torch import Tensor, nn
from transformers import SiglipVisionConfig, SiglipVisionModel

from vila_ops.generate.torch_engine.tower_pass import TowerPass, pause_between_layers

LAYERS = 4
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tower() -> nn.Module:
    config = SiglipVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
    )
    torch.manual_seed(0)
    model: nn.Module = SiglipVisionModel(config).eval()
    pause_between_layers(model)
    pause_between_layers(model)
    return model


def features(tower: nn.Module, seed: int) -> Tensor:
    pixels = torch.rand(1, 3, 28, 28, generator=torch.Generator().manual_seed(seed))
    states: Tensor = tower(pixels, output_hidden_states=True).hidden_states[-2]
    return states


@torch.no_grad()
def test_passes_that_take_turns_layer_by_layer_compute_what_each_computes_at_once(tower: nn.Module) -> None:
    passes = [TowerPass(lambda seed=seed: features(tower, seed), CPU) for seed in range(3)]  # type: ignore[misc]
    for _ in range(LAYERS):
        assert [one.run_for(0) for one in passes] == [None] * 3
        assert features(tower, 7).shape == (1, 4, 16), "a pass at once, while others are unfinished"
    for seed, one in enumerate(passes):
        found = one.run_for(0)
        assert found is not None
        assert torch.equal(found, features(tower, seed))


@torch.no_grad()
def test_a_pass_without_a_limit_ends_at_once(tower: nn.Module) -> None:
    found = TowerPass(lambda: features(tower, 1), CPU).run_for(None)
    assert found is not None
    assert torch.equal(found, features(tower, 1))


def test_an_error_of_the_tower_reaches_the_caller(tower: nn.Module) -> None:
    broken = TowerPass(lambda: features(tower, 1)[99], CPU)
    assert broken.run_for(0) is None
    with pytest.raises(IndexError):
        broken.run_for(None)


def test_nothing_is_left_of_a_pass_that_is_closed(tower: nn.Module) -> None:
    """A suspended greenlet that is only forgotten stays in memory, with all that its frames hold."""
    one = TowerPass(lambda: features(tower, 1), CPU)
    assert one.run_for(0) is None
    left = weakref.ref(one)
    one.close()
    del one
    gc.collect()
    assert left() is None
