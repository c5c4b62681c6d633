import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from PIL import Image as Pillow
from transformers import AutoProcessor, LlavaForConditionalGeneration

from vila_ops.config.model import ImageFit
from vila_ops.model import folder as model_folder
from vila_ops.model.modify import Modifications, modified
from vila_ops.model.processing import read_fit
from vila_ops.model.towers import POSITIONS

FAMILIES = ("clip", "siglip", "dinov2", "internvit")
Build = Callable[..., Any]


def test_where_nothing_is_to_be_otherwise_the_very_objects_come_back(make_model: Any, build: Build) -> None:
    whole, _ = build(make_model())
    state = whole.state_dict()
    for modifications in (Modifications(), Modifications(image_size=56)):
        config, weights = modified(whole.config, state, modifications)
        assert config is whole.config
        assert weights is state


@pytest.mark.parametrize("projector", ["linear", "mlp_downsample"])
@pytest.mark.parametrize("family", FAMILIES)
def test_another_image_size_changes_the_position_table_and_what_the_config_says_of_images(
    family: str, projector: str, make_model: Any, build: Build
) -> None:
    whole, _ = build(make_model(family, projector))
    state = dict(whole.state_dict())
    before, names = whole.config.to_dict(), list(state)
    config, weights = modified(whole.config, state, Modifications(image_size=84))
    assert list(weights) == list(state) == names
    (other,) = [name for name in weights if weights[name] is not state[name]]
    assert other.endswith(POSITIONS)
    assert weights[other].shape[-2] == 36 + (family != "siglip")
    after = config.to_dict()
    assert {key for key in after if after[key] != before[key]} == {"vision_config", "vision_side", "image_seq_length"}
    vision = {key for key, value in after["vision_config"].items() if value != before["vision_config"][key]}
    assert vision == {"image_size"}
    assert (config.vision_side, config.grid()) == (84, 6)
    assert config.image_seq_length == make_model(family, projector, image_size=84).image_tokens()
    assert whole.config.to_dict() == before, "the config that was given is as it was"


def test_less_than_one_patch_is_refused(make_model: Any, build: Build) -> None:
    whole, _ = build(make_model())
    with pytest.raises(ValueError, match="image_size 13 is less than one patch"):
        modified(whole.config, whole.state_dict(), Modifications(image_size=13))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_at_another_image_size_is_a_whole_folder_again(
    family: str, make_model: Any, build: Build, tmp_path: Path
) -> None:
    """Stock transformers reads 36 patches in place of 16 and gives our model's logits."""
    whole, processor = build(make_model(family))
    init, out = tmp_path / "init", tmp_path / "out"
    model_folder.save(whole, init, processor=processor)
    out.mkdir()
    modifications = Modifications(image_size=84)
    model_folder.save_trained({}, out, init=init, modifications=modifications)
    assert {path.name for path in out.iterdir()} == {path.name for path in init.iterdir()}
    differ = {path.name for path in init.iterdir() if path.read_bytes() != (out / path.name).read_bytes()}
    assert differ == {"config.json", "processor_config.json", "model.safetensors"}
    stock = LlavaForConditionalGeneration.from_pretrained(out, dtype=torch.float32).eval()
    noise = np.random.default_rng(0).integers(0, 256, (90, 90, 3), dtype=np.uint8)
    text = processor.tokenizer.decode([1]) + "<image> dog"
    inputs = AutoProcessor.from_pretrained(out)(text=text, images=[Pillow.fromarray(noise)], return_tensors="pt")
    assert inputs["pixel_values"].shape == (1, 3, 84, 84)
    assert int((inputs["input_ids"] == stock.config.image_token_id).sum()) == 36
    for ours in (model_folder.load(out), model_folder.load(init, modifications=modifications)):
        with torch.no_grad():
            embeddings = ours.embed(inputs["input_ids"], ours.tower_features(inputs["pixel_values"]))
            actual = ours.lm_head(ours.hidden(embeddings, use_cache=False).last_hidden_state)
            expected = stock(**inputs).logits
        assert torch.allclose(actual, expected, atol=1e-5)


@pytest.mark.parametrize("fit", get_args(ImageFit))
def test_changing_the_size_and_back_restores_the_settings(
    fit: str, make_model: Any, build: Build, tmp_path: Path
) -> None:
    """Everything but the position table, which is interpolated twice, has the same bytes."""
    whole, processor = build(make_model("clip", "mlp_downsample", image_aspect_ratio=fit))
    folders = [tmp_path / name for name in ("init", "there", "back")]
    model_folder.save(whole, folders[0], processor=processor)
    for before, after, size in zip(folders, folders[1:], (84, 56), strict=False):
        after.mkdir()
        model_folder.save_trained({}, after, init=before, modifications=Modifications(image_size=size))
    for path in folders[0].iterdir():
        if path.suffix != ".safetensors":
            assert (folders[2] / path.name).read_bytes() == path.read_bytes(), path.name
    assert json.loads((folders[1] / "config.json").read_text())["vision_side"] == 84
    images = json.loads((folders[1] / "processor_config.json").read_text())["image_processor"]
    assert read_fit(images) == (fit, 84)
