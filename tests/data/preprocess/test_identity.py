"""Squares in shards are what the stock image processors make; their address says how they were made."""

import io
import json
import shutil
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from PIL import Image as Pillow
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from vila_ops.artifacts.store import content
from vila_ops.config import Mixture, TextFormat
from vila_ops.config.model import ImageFit
from vila_ops.data.preprocess.identity import text_recipe
from vila_ops.data.preprocess.prepare import prepare
from vila_ops.data.shards import read_index, read_sample

MEAN = (0.25, 0.5, 0.75)
SIDE = 56
BOTH = {"height": SIDE, "width": SIDE}


def text_with(text: TextFormat, folder: Path, fit: ImageFit, mean: tuple[float, ...] = MEAN) -> TextFormat:
    """A text format whose tower is a folder that states a mean."""
    folder.mkdir(exist_ok=True)
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": mean, "image_std": [0.5] * 3}))
    tower = {"kind": "hub", "name": str(folder), "revision": "here"}
    return TextFormat.model_validate({**text.model_dump(), "vision_tower": tower, "image_aspect_ratio": fit})


def stock(fit: ImageFit, image: Pillow.Image) -> Any:
    kept: Any = {"do_normalize": False, "do_rescale": False}
    match fit:
        case "pad":
            made = LlavaImageProcessorPil(do_pad=True, do_center_crop=False, size=BOTH, image_mean=MEAN, **kept)
        case "resize":
            made = CLIPImageProcessorPil(do_center_crop=False, size=BOTH, **kept)
        case "crop":
            made = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=BOTH, **kept)
    return np.asarray(made(image)["pixel_values"][0]).transpose(1, 2, 0)


@pytest.mark.parametrize("fit", get_args(ImageFit))
def test_a_prepared_image_is_that_of_the_stock_processor(
    fit: ImageFit, make_resources: Any, make_text: Any, tmp_path: Path
) -> None:
    draw = np.random.default_rng(0)
    image = Pillow.fromarray(draw.integers(0, 256, (90, 160, 3), dtype=np.uint8))
    raw = tmp_path / "raw"
    raw.mkdir()
    image.save(raw / "0.png")
    turns = [{"role": "document", "parts": [{"image": "0.png"}, {"text": "Noise."}]}]
    record = {"id": "0", "object": "noise", "category": "", "licence": "CC0-1.0", "provenance": "here", "turns": turns}
    (raw / "records.jsonl").write_text(json.dumps(record))
    source = {"kind": "jsonl", "path": str(raw), "render": "caption"}
    mixture = Mixture.model_validate({"name": "own", "sources": {"own": source}})
    text = text_with(make_text(), tmp_path / "tower", fit)
    made = prepare(mixture, text, make_resources(tmp_path))
    (row,) = read_index(content(made)).to_pylist()
    sample = read_sample(content(made), shard=row["shard"], offset=row["offset"], key=row["key"])
    with Pillow.open(io.BytesIO(sample.images[0])) as kept:
        assert (np.asarray(kept) == stock(fit, image)).all()


def test_an_address_holds_the_fit_and_the_colour_that_pads_but_not_the_tower(make_text: Any, tmp_path: Path) -> None:
    text, one, other = make_text(), tmp_path / "one", tmp_path / "other"
    recipes = {
        (fit, mean): text_recipe(text_with(text, one, fit, mean))
        for fit in get_args(ImageFit)
        for mean in (MEAN, (0.5, 0.5, 0.5))
    }
    assert recipes["pad", MEAN] != recipes["pad", (0.5, 0.5, 0.5)]
    assert recipes["resize", MEAN] == recipes["resize", (0.5, 0.5, 0.5)]
    assert recipes["crop", MEAN] == recipes["crop", (0.5, 0.5, 0.5)]
    assert len({json.dumps(recipes[fit, MEAN]) for fit in get_args(ImageFit)}) == 3
    for fit in get_args(ImageFit):
        assert text_recipe(text_with(text, other, fit)) == recipes[fit, MEAN]


def test_a_language_model_in_a_folder_counts_by_its_tokenizer_not_by_its_place_or_shape(
    make_text: Any, tiny: Path, tmp_path: Path
) -> None:
    def recipe(folder: Path, **more: Any) -> Any:
        language_model = {"kind": "hub", "name": str(folder), "revision": "imported", **more}
        return text_recipe(TextFormat.model_validate({**make_text().model_dump(), "language_model": language_model}))

    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        shutil.copytree(tiny / "tokenizer", folder)
    (two / "model.safetensors").write_bytes(b"weights make no token")
    assert recipe(one) == recipe(two) == recipe(one, shape={"model_type": "llama"})
    path = two / "tokenizer.json"
    path.write_text(path.read_text().replace("<image>", "<photo>"))
    assert recipe(one) != recipe(two)
