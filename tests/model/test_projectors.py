from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import gelu, layer_norm, linear
from transformers import CLIPVisionConfig, LlamaConfig

from vila_ops.model.configuration import PROJECTOR, VilaConfig
from vila_ops.model.projectors import build_projector
from vila_ops.model.projectors.downsample import merge_patches
from vila_ops.model.projectors.initialise import fit_to

KINDS: list[dict[str, Any]] = [
    {"kind": "linear"},
    {"kind": "mlp_gelu"},
    {"kind": "mlp_gelu", "depth": 3},
    {"kind": "transformer", "num_layers": 2, "num_heads": 4},
    *({"kind": "mlp_downsample", "depth": depth} for depth in (1, 2, 3)),
    {"kind": "mlp_downsample", "factor": 3, "depth": 3, "token_order": "columns"},
]
CHANNELS, DIM = 32, 48


def projector(choice: dict[str, Any], *, channels: int = CHANNELS) -> torch.nn.Module:
    """A projector between a tower and a language model of small widths, with weights that are not small."""
    torch.manual_seed(0)
    vision = CLIPVisionConfig(hidden_size=channels, num_attention_heads=2, intermediate_size=64)
    text = LlamaConfig(hidden_size=DIM, num_attention_heads=2, intermediate_size=64)
    built = build_projector(VilaConfig(vision_config=vision, text_config=text, projector=choice)).eval()
    for parameter in built.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return built


def features(patches: int, *, channels: int = CHANNELS) -> torch.Tensor:
    return torch.randn(2, patches, channels, generator=torch.Generator().manual_seed(patches))


def test_merged_blocks_of_a_known_grid() -> None:
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


def test_blocks_of_three_by_three_of_a_known_grid() -> None:
    # 4 x 4 numbered from 1: padded to 6 x 6, so the four blocks hold 9, 3, 3 and 1 of the patches
    grid = torch.arange(1.0, 17.0).view(1, 16, 1)
    expected = [
        [1, 2, 3, 5, 6, 7, 9, 10, 11],
        [4, 0, 0, 8, 0, 0, 12, 0, 0],
        [13, 14, 15, 0, 0, 0, 0, 0, 0],
        [16, 0, 0, 0, 0, 0, 0, 0, 0],
    ]
    assert merge_patches(grid, 3).tolist() == [expected]


def test_the_order_by_columns_is_that_of_vila_1_5() -> None:
    """Its code returned the grid transposed: blocks go down the image first, and inside a block nothing changes."""
    even = torch.arange(16.0).view(1, 16, 1)
    expected = [[0, 1, 4, 5], [8, 9, 12, 13], [2, 3, 6, 7], [10, 11, 14, 15]]
    assert merge_patches(even, 2, token_order="columns").tolist() == [expected]
    odd = torch.arange(1.0, 10.0).view(1, 9, 1)
    expected = [[1, 2, 4, 5], [7, 8, 0, 0], [3, 0, 6, 0], [9, 0, 0, 0]]
    assert merge_patches(odd, 2, token_order="columns").tolist() == [expected]


@pytest.mark.parametrize("choice", KINDS, ids=str)
def test_shapes_of_the_papers_resolutions(choice: dict[str, Any]) -> None:
    built = projector(choice)
    factor = PROJECTOR.validate_python(choice).model_dump().get("factor", 1)
    expected = {
        1: {256: 256, 576: 576, 729: 729, 1024: 1024},
        2: {256: 64, 576: 144, 729: 196, 1024: 256},
        3: {256: 36, 576: 64, 729: 81, 1024: 121},
    }[factor]
    with torch.no_grad():
        assert {patches: built(features(patches)).shape[1] for patches in expected} == expected
        assert built(features(256)).shape == (2, expected[256], DIM)


@torch.no_grad()
def test_downsampling_by_its_formula() -> None:
    """As NVlabs/VILA writes its layers: no norm at depth 1, one at 2, two and a narrow middle at 3."""
    read = features(9, channels=4)
    for factor, depth in ((2, 1), (2, 2), (3, 3), (2, 3)):
        built = projector({"kind": "mlp_downsample", "factor": factor, "depth": depth}, channels=4)
        w = dict(built.named_parameters())
        merged = merge_patches(read, factor)
        wide, narrow = 4 * factor**2, 4 * factor
        if depth == 1:
            expected = linear(merged, w["linear_1.weight"], w["linear_1.bias"])
        else:
            normed = layer_norm(merged, (wide,), w["norm.weight"], w["norm.bias"])
            expected = gelu(linear(normed, w["linear_1.weight"], w["linear_1.bias"]))
        if depth == 3:
            assert w["linear_1.weight"].shape == (narrow, wide)
            expected = layer_norm(expected, (narrow,), w["norm_2.weight"], w["norm_2.bias"])
            expected = gelu(linear(expected, w["linear_2.weight"], w["linear_2.bias"]))
        if depth > 1:
            expected = linear(expected, w[f"linear_{depth}.weight"], w[f"linear_{depth}.bias"])
        assert torch.allclose(built(read), expected, atol=1e-6)
        assert (
            sum(p.numel() for p in built.parameters())
            == {
                1: wide * DIM + DIM,
                2: 2 * wide + (wide + 1) * DIM + (DIM + 1) * DIM,
                3: 2 * wide + (wide + 1) * narrow + 2 * narrow + (narrow + 1) * DIM + (DIM + 1) * DIM,
            }[depth]
        )


@pytest.mark.parametrize("depth", [2, 3, 8])
@torch.no_grad()
def test_an_mlp_of_any_depth_by_its_formula(depth: int) -> None:
    built = projector({"kind": "mlp_gelu", "depth": depth})
    weights = list(built.parameters())
    assert len(weights) == 2 * depth
    expected = features(9)
    for number in range(depth):
        expected = linear(gelu(expected) if number else expected, weights[2 * number], weights[2 * number + 1])
    assert torch.allclose(built(features(9)), expected, atol=1e-6)


@torch.no_grad()
def test_the_transformer_is_torchs_pre_norm_encoder() -> None:
    built = projector({"kind": "transformer", "num_layers": 2, "num_heads": 4})
    state = built.state_dict()
    hidden = features(16)
    for number in range(2):
        torchs = nn.TransformerEncoderLayer(
            CHANNELS, 4, 4 * CHANNELS, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        own = {key.removeprefix(f"blocks.{number}."): value for key, value in state.items()}
        renamed = {}
        for kind in ("weight", "bias"):
            renamed[f"self_attn.in_proj_{kind}"] = torch.cat([own[f"self_attn.{n}_proj.{kind}"] for n in "qkv"])
            renamed[f"self_attn.out_proj.{kind}"] = own[f"self_attn.out_proj.{kind}"]
            renamed |= {f"linear{n}.{kind}": own[f"mlp.fc{n}.{kind}"] for n in (1, 2)}
            renamed |= {f"norm{n}.{kind}": own[f"layer_norm{n}.{kind}"] for n in (1, 2)}
        torchs.load_state_dict(renamed)
        hidden = torchs.train()(hidden)  # training, so that it takes no fused path
    expected = linear(
        layer_norm(hidden, (CHANNELS,), state["norm.weight"], state["norm.bias"]),
        state["out.weight"],
        state["out.bias"],
    )
    assert torch.allclose(built(features(16)), expected, atol=2e-5)


@torch.no_grad()
def test_the_transformer_sees_all_patches_of_an_image_and_of_no_other() -> None:
    built = projector({"kind": "transformer", "num_heads": 4})
    read = features(16)
    changed = read.clone()
    changed[0, -1] *= -1
    before, after = built(read), built(changed)
    assert (before[0] != after[0]).any(dim=-1).all(), "the first patch sees the last one"
    assert torch.equal(before[1], after[1])


def test_heads_that_do_not_divide_the_tower_are_refused() -> None:
    with pytest.raises(ValueError, match="32 channels do not divide into 5 heads"):
        projector({"kind": "transformer", "num_heads": 5})


@pytest.mark.parametrize("choice", KINDS, ids=str)
def test_a_fitted_projector_gives_twice_the_width_of_the_embeddings(choice: dict[str, Any]) -> None:
    built = projector(choice)
    seen = torch.randn(5, 16, 32, generator=torch.Generator().manual_seed(1)) * torch.linspace(1, 50, 32) + 7
    fit_to(built, seen, 0.02)
    with torch.no_grad():
        out = built(seen)
    assert float(out.std()) == pytest.approx(0.04, rel=1e-4)


@pytest.mark.parametrize("choice", KINDS, ids=str)
def test_fitting_changes_no_layer_behind_a_norm_but_the_last(choice: dict[str, Any]) -> None:
    built = projector(choice)
    before = {name: parameter.detach().clone() for name, parameter in built.named_parameters()}
    fit_to(built, features(16) * 30 + 7, 0.02)
    changed = {
        name.rpartition(".")[0] for name, parameter in built.named_parameters() if (parameter != before[name]).any()
    }
    last = list(before)[-1].rpartition(".")[0]
    assert changed == ({last, next(iter(before)).rpartition(".")[0]} if choice["kind"] == "mlp_gelu" else {last})


def test_fitting_centres_and_scales_what_the_first_layer_sees(make_model: Any, build: Callable[..., Any]) -> None:
    whole, _ = build(make_model("clip", "mlp_gelu"))
    projector = whole.model.multi_modal_projector
    weight, bias = projector.linear_1.weight.detach().clone(), projector.linear_1.bias.detach().clone()
    features = torch.randn(5, 16, 32, generator=torch.Generator().manual_seed(1)) * 30 + 7
    flat = features.reshape(-1, 32)
    expected = ((flat - flat.mean(0)) / flat.std(0)) @ weight.T + bias
    fit_to(projector, features, 0.02)
    assert torch.allclose(projector.linear_1(flat), expected, atol=1e-4)
