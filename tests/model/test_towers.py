from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image as Pillow
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoProcessor,
    CLIPConfig,
    CLIPModel,
    Dinov2WithRegistersConfig,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    Siglip2VisionConfig,
    SiglipConfig,
    SiglipModel,
)

from vila_ops.config.model import DownsampleProjector
from vila_ops.errors import CorruptArtifact
from vila_ops.model import folder as model_folder
from vila_ops.model.towers import POSITIONS, at_image_size, build_tower, class_tokens, resize_positions

FAMILIES = ("clip", "siglip", "dinov2", "internvit")
SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
WORDS = {**SHAPE, "num_key_value_heads": 2, "vocab_size": 100, "max_position_embeddings": 20}
MakeTower = Callable[..., PreTrainedModel]


@pytest.fixture(scope="module")
def make_tower(make_model: Any, tmp_path_factory: pytest.TempPathFactory) -> MakeTower:
    """A random tower with a random position table (InternViT's starts as zeros)."""

    def make(family: str, *, size: int, patch: int = 14) -> PreTrainedModel:
        torch.manual_seed(0)
        tower = build_tower(make_model(family, image_size=size, patch_size=patch), cache=tmp_path_factory.mktemp("c"))
        with torch.no_grad():
            for name, parameter in tower.named_parameters():
                if name.endswith(POSITIONS):
                    parameter.normal_(std=0.5)
        return tower.eval()

    return make


def as_hub(make_model: Any, folder: Path, **more: Any) -> Any:
    return make_model(vision_tower={"kind": "hub", "name": str(folder), "revision": "local"}, **more)


def placed(processor: Any, config: Any, size: int) -> int:
    """Image tokens that a processor writes for one image."""
    image = Pillow.new("RGB", (size, size))
    inputs = processor(text="<image>", images=[image], return_tensors="pt")
    return int((inputs["input_ids"] == config.image_token_id).sum())


def images(size: int) -> torch.Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(size))


@pytest.mark.parametrize(
    ("patch", "made_for", "size"),
    [(14, 224, 336), (14, 336, 224), (14, 224, 384), (14, 384, 448), (14, 518, 224), (16, 224, 384), (16, 384, 336)],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_tower_of_another_size_gives_what_transformers_interpolates_in_its_forward_pass(
    family: str, patch: int, made_for: int, size: int, make_tower: MakeTower, make_model: Any, tmp_path: Path
) -> None:
    tower = make_tower(family, size=made_for, patch=patch)
    tower.save_pretrained(tmp_path)
    ours = build_tower(as_hub(make_model, tmp_path, image_size=size, patch_size=patch), cache=tmp_path)
    flag = {"interpolate_pos_encoding": True} if family in ("clip", "siglip") else {}  # the others always do
    with torch.no_grad():
        theirs = tower(images(size), output_hidden_states=True, **flag).hidden_states
        actual = ours(images(size), output_hidden_states=True).hidden_states
    assert actual[0].shape == (2, (size // patch) ** 2 + (family != "siglip"), 32)
    for one, two in zip(theirs, actual, strict=True):
        assert torch.equal(one, two)
    changed = {name for name, tensor in ours.state_dict().items() if tensor.shape != tower.state_dict()[name].shape}
    assert len(changed) == 1, "only the position table is another"


def test_a_small_table_of_known_values() -> None:
    # 2 x 2 to 4 x 4, Keys' cubic with a = -0.75, edges repeated. Of columns 0, 1 the new one at -1/4 gets w(5/4), the
    # one at 1/4 gets w(3/4) + w(7/4), where w(5/4) = -0.10546875, w(3/4) = 0.26171875 and w(7/4) = -0.03515625
    ramp = torch.tensor([9.0, 0, 1, 0, 1]).view(5, 1)
    row = [-0.10546875, 0.2265625, 0.7734375, 1.10546875]
    actual = resize_positions(ramp, 4, class_tokens=1)
    assert actual[0].item() == 9
    assert torch.allclose(actual[1:].view(4, 4), torch.tensor([row] * 4), atol=1e-6)


def test_positions_of_no_square_are_refused() -> None:
    with pytest.raises(ValueError, match="7 positions are not a square grid"):
        resize_positions(torch.zeros(8, 2), 4, class_tokens=1)


def test_weights_without_a_position_table_are_refused(make_tower: MakeTower) -> None:
    tower = make_tower("dinov2", size=56)
    state = {name: tensor for name, tensor in tower.state_dict().items() if not name.endswith(POSITIONS)}
    with pytest.raises(ValueError, match=r"one position table is needed .* has \[\]"):
        at_image_size(state, tower.config, 84)


def test_a_tower_of_images_that_are_no_squares_is_refused(make_model: Any, tmp_path: Path) -> None:
    """InternViT's config allows them; LLaVA's processor and the merging of patches do not."""
    AutoModel.from_config(InternVLVisionConfig(**SHAPE, image_size=(56, 84), patch_size=14)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"height and width \(56, 84\) are not a square"):
        build_tower(as_hub(make_model, tmp_path), cache=tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
def test_stock_llava_reads_the_same_patches_of_every_family(
    family: str, make_model: Any, build: Callable[..., Any], make_tower: MakeTower, tmp_path: Path
) -> None:
    """A tower made for 84 pixels in a model for 58, of which the last two are in no patch."""
    make_tower(family, size=84).save_pretrained(tmp_path / "tower")
    (tmp_path / "tower/preprocessor_config.json").write_text('{"image_mean": [0, 0, 0], "image_std": [1, 1, 1]}')
    whole, processor = build(as_hub(make_model, tmp_path / "tower", image_size=58))
    model_folder.save(whole, tmp_path / "whole", processor=processor)
    stock = LlavaForConditionalGeneration.from_pretrained(tmp_path / "whole", dtype=torch.float32).eval()
    values = images(58)
    with torch.no_grad():
        features = whole.tower_features(values)
        theirs = stock.get_image_features(
            values,
            vision_feature_layer=stock.config.vision_feature_layer,
            vision_feature_select_strategy=stock.config.vision_feature_select_strategy,
        )
        ours = whole.model.multi_modal_projector(features)
    assert features.shape == (2, 16, 32)
    assert torch.equal(torch.stack(list(theirs.pooler_output)), ours)
    assert stock.config.image_seq_length == 16
    assert placed(AutoProcessor.from_pretrained(tmp_path / "whole"), stock.config, 58) == 16


def test_the_tower_is_found_in_the_folder_of_a_whole_model(make_model: Any, tmp_path: Path) -> None:
    vision = {**SHAPE, "image_size": 56, "patch_size": 14}
    wholes = {
        "clip": CLIPModel(CLIPConfig(vision_config=vision, text_config=WORDS)),
        "siglip": SiglipModel(SiglipConfig(vision_config=vision, text_config=WORDS)),
        "internvl": InternVLForConditionalGeneration(
            InternVLConfig(vision_config=vision, text_config=WORDS, image_token_id=5)
        ),
    }
    for name, whole in wholes.items():
        whole.save_pretrained(tmp_path / name)
        inside = whole.model.vision_tower if name == "internvl" else whole.vision_model
        actual = build_tower(as_hub(make_model, tmp_path / name), cache=tmp_path).state_dict()
        assert actual.keys() == inside.state_dict().keys()
        assert all(torch.equal(tensor, actual[key]) for key, tensor in inside.state_dict().items())


def test_a_folder_without_all_weights_of_its_tower_is_refused(
    make_tower: MakeTower, make_model: Any, tmp_path: Path
) -> None:
    make_tower("clip", size=56).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    state = load_file(path)
    del state["encoder.layers.0.mlp.fc1.bias"]
    save_file(state, path, metadata={"format": "pt"})
    with pytest.raises(CorruptArtifact, match=r"describes \d+ parameters, but its files hold \d+ numbers"):
        build_tower(as_hub(make_model, tmp_path), cache=tmp_path)


def test_a_tower_of_another_patch_size_is_refused(make_tower: MakeTower, make_model: Any, tmp_path: Path) -> None:
    make_tower("internvit", size=64, patch=16).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="patch_size 14 is not that of the tower; set it to 16"):
        build_tower(as_hub(make_model, tmp_path), cache=tmp_path)


def test_a_feature_layer_that_the_tower_has_not_is_refused(make_model: Any, tmp_path: Path) -> None:
    """Two layers have three states: what enters the first, and what leaves each."""
    assert build_tower(make_model("clip", feature_layer=-3), cache=tmp_path)
    with pytest.raises(ValueError, match="feature_layer -4 of a tower with 3 hidden states; use -1 to -3"):
        build_tower(make_model("clip", feature_layer=-4), cache=tmp_path)


@pytest.mark.parametrize("config", [Siglip2VisionConfig(), Dinov2WithRegistersConfig()])
def test_a_tower_that_llavas_format_cannot_hold_is_refused(config: Any) -> None:
    """SigLIP 2 of any resolution takes patches, not images; registers stand between class token and patches."""
    with pytest.raises(ValueError, match=r"is not supported; use one of .* at most a class token"):
        class_tokens(config)


@pytest.mark.parametrize(
    ("size", "patch", "tokens"),
    [
        (224, 14, {1: 256, 2: 64, 3: 36}),
        (336, 14, {1: 576, 2: 144, 3: 64}),
        (384, 14, {1: 729, 2: 196, 3: 81}),
        (448, 14, {1: 1024, 2: 256, 3: 121}),
        (384, 16, {1: 576, 2: 144, 3: 64}),
    ],
)
def test_tokens_of_an_image(
    size: int, patch: int, tokens: dict[int, int], make_model: Any, build: Callable[..., Any]
) -> None:
    """Config, projector and processor agree; pixels beyond the last whole patch are not read."""
    kinds = {1: {"kind": "linear"}, **{f: {"kind": "mlp_downsample", "factor": f} for f in (2, 3)}}
    for factor, expected in tokens.items():
        plain = make_model("siglip", image_size=size, patch_size=patch)
        model = plain.model_validate({**plain.model_dump(), "projector": kinds[factor]})
        whole, processor = build(model)
        with torch.no_grad():
            made = whole.model.multi_modal_projector(whole.tower_features(images(size)[:1]))
        assert model.image_tokens() == whole.config.image_seq_length == made.shape[1] == expected
        assert placed(processor, whole.config, size) == expected
    assert DownsampleProjector(factor=3).tokens(1) == 1
