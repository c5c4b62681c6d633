"""What a replica keeps on its own disk."""

import io
from pathlib import Path

import pytest
from PIL import Image as Pillow

from vila_ops.artifacts.kinds import ModelVersion
from vila_ops.generate.load import load_generator
from vila_ops.serve.app import loading


def test_only_the_last_images_features_stay_on_disk(
    versions: tuple[ModelVersion, ModelVersion], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(loading, "KEPT_IMAGES", 3)
    generator = load_generator(versions[0].checkpoint, feature_root=tmp_path, threads=1, precision="fp32")
    compute = loading._bounded(generator.features, tmp_path)
    side = generator.image_size
    images = []
    for shade in range(5):
        out = io.BytesIO()
        Pillow.new("RGB", (side, side), (50 * shade,) * 3).save(out, "PNG")
        images.append(out.getvalue())

    first = compute(images)

    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == 3
    assert compute(images).equal(first)  # what went is computed again
