from collections.abc import Callable
from typing import Any

import pytest
import torch

from vila_ops.model.projectors import fit_to, merge_patches


def test_merged_blocks_by_hand() -> None:
    # 4 x 4 patches of one channel, numbered in row order: the 2 x 2 blocks are corners first, then along the row
    grid = torch.arange(16.0).view(1, 16, 1)
    expected = [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    assert merge_patches(grid, 2).tolist() == [expected]


def test_channels_stay_together_inside_a_block() -> None:
    grid = torch.tensor([[[1.0, -1], [2, -2], [3, -3], [4, -4]]])
    assert merge_patches(grid, 2).tolist() == [[[1, -1, 2, -2, 3, -3, 4, -4]]]


def test_an_odd_side_is_padded_with_zeros_below_and_to_the_right() -> None:
    grid = torch.arange(1.0, 10.0).view(1, 9, 1)
    assert merge_patches(grid, 2).tolist() == [[[1, 2, 4, 5], [3, 0, 6, 0], [7, 8, 0, 0], [9, 0, 0, 0]]]


def test_patches_that_are_no_square_are_refused() -> None:
    with pytest.raises(ValueError, match="12 patches are not a square"):
        merge_patches(torch.zeros(1, 12, 2), 2)


@pytest.mark.parametrize("kind", ["linear", "mlp_gelu", "mlp_downsample"])
def test_a_fitted_projector_gives_twice_the_width_of_the_embeddings(
    kind: str, make_model: Any, build: Callable[..., Any]
) -> None:
    whole, _ = build(make_model("clip", kind))
    features = torch.randn(5, 16, 32, generator=torch.Generator().manual_seed(1)) * torch.linspace(1, 50, 32) + 7
    fit_to(whole.model.multi_modal_projector, features, 0.02)
    with torch.no_grad():
        out = whole.model.multi_modal_projector(features)
    assert float(out.std()) == pytest.approx(0.04, rel=1e-4)


def test_fitting_centres_and_scales_what_the_first_layer_sees(make_model: Any, build: Callable[..., Any]) -> None:
    whole, _ = build(make_model("clip", "mlp_gelu"))
    projector = whole.model.multi_modal_projector
    weight, bias = projector.linear_1.weight.detach().clone(), projector.linear_1.bias.detach().clone()
    features = torch.randn(5, 16, 32, generator=torch.Generator().manual_seed(1)) * 30 + 7
    flat = features.reshape(-1, 32)
    expected = ((flat - flat.mean(0)) / flat.std(0)) @ weight.T + bias
    fit_to(projector, features, 0.02)
    assert torch.allclose(projector.linear_1(flat), expected, atol=1e-4)
