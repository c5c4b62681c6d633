"""The image features that a loaded model keeps on disk."""

import io
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image as Pillow
from transformers import LlavaForConditionalGeneration

from vila_ops.artifacts.store import content
from vila_ops.config import Model, Resources
from vila_ops.generate.engine import EngineOptions
from vila_ops.generate.torch_engine.loaded_model import read_model
from vila_ops.model.assemble import assemble


def test_only_the_newest_images_features_stay_on_disk(
    make_model: Callable[..., Model], make_resources: Callable[..., Resources], tmp_path: Path
) -> None:
    folder, features = content(assemble(make_model(), make_resources(tmp_path))), tmp_path / "features"
    loaded = read_model(folder, EngineOptions(features, max_cached_images=3))
    side = loaded.model.config.vision_side
    images = []
    for shade in range(5):
        out = io.BytesIO()
        Pillow.new("RGB", (side, side), (50 * shade,) * 3).save(out, "PNG")
        images.append(out.getvalue())

    first = loaded.features(images)

    assert len([path for path in features.rglob("*") if path.is_file()]) == 3
    assert loaded.features(images).equal(first)  # what was removed is computed again


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
