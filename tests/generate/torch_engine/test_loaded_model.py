"""What a loaded model keeps of images in memory, and the precision of its weights."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image as Pillow
from transformers import LlavaForConditionalGeneration

from vila_ops.artifacts.store import content
from vila_ops.config import Model, Resources
from vila_ops.generate.engine import EngineOptions
from vila_ops.generate.torch_engine.image_features import RecentFeatures, SaltedImage
from vila_ops.generate.torch_engine.loaded_model import read_model
from vila_ops.model.assemble import assemble


def encoded(side: int, shade: int, kind: str = "PNG", **options: Any) -> bytes:
    """A grey square."""
    out = io.BytesIO()
    Pillow.new("RGB", (side, side), (50 * shade,) * 3).save(out, kind, **options)
    return out.getvalue()


def test_features_in_memory_are_of_the_images_used_last_by_pixels_and_salt(
    make_model: Callable[..., Model], make_resources: Callable[..., Resources], tmp_path: Path
) -> None:
    folder = content(assemble(make_model(), make_resources(tmp_path)))
    features = read_model(folder, EngineOptions(max_cached_images=3)).features
    assert isinstance(features, RecentFeatures)
    side = features.model.config.vision_side
    images = [encoded(side, shade) for shade in range(5)]
    stored = read_model(folder, EngineOptions(tmp_path / "stored")).features(images)

    def computed(image: bytes, salt: str) -> int:
        before = features.num_computed
        assert torch.allclose(features.first([SaltedImage(image, salt)])[0], stored[images.index(image)], atol=1e-5)
        return features.num_computed - before

    assert [computed(image, "a") for image in images[:3]] == [1, 1, 1]
    assert [computed(image, "a") for image in (images[0], images[2], images[1])] == [0, 0, 0]
    assert computed(images[3], "a") == 1  # images[0], used longest ago, leaves
    assert [computed(images[number], "a") for number in (1, 2, 3)] == [0, 0, 0]
    assert computed(images[0], "a") == 1
    assert computed(images[0], "b") == 1  # another key's images are no hit
    other = encoded(side, 0, "WEBP", lossless=True)
    before = features.num_computed
    features.first([SaltedImage(other, "b")])
    assert features.num_computed == before  # other bytes, same pixels


def test_a_step_computes_one_image_and_takes_those_in_memory_besides(
    make_model: Callable[..., Model], make_resources: Callable[..., Resources], tmp_path: Path
) -> None:
    folder = content(assemble(make_model(), make_resources(tmp_path)))
    features = read_model(folder, EngineOptions(max_cached_images=3)).features
    assert isinstance(features, RecentFeatures)
    images = [SaltedImage(encoded(features.model.config.vision_side, shade), "") for shade in range(3)]
    assert len(features.first(images)) == 1
    assert len(features.first(images)) == 2
    assert len(features.first([images[2], images[0], images[1]])) == 3
    assert features.num_computed == 3


def test_in_bf16_a_language_model_is_what_stock_loads_in_bf16(
    make_model: Callable[..., Model], make_resources: Callable[..., Resources], tmp_path: Path
) -> None:
    """Parameters in 16 bits, rotary frequencies in 32."""
    folder = content(assemble(make_model(), make_resources(tmp_path)))
    stock = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.bfloat16).model.language_model
    ours = read_model(folder, EngineOptions(tmp_path / "features", precision="bf16")).model.model.language_model
    for kind in ("named_parameters", "named_buffers"):
        expected, actual = dict(getattr(stock, kind)()), dict(getattr(ours, kind)())
        assert actual.keys() == expected.keys()
        assert all(actual[name].dtype == expected[name].dtype for name in expected)
        assert all(torch.equal(actual[name], expected[name]) for name in expected)
