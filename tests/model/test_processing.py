"""Stock transformers with a model's processor gives the pixels on which the model was trained."""

import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from PIL import Image as Pillow

from vila_ops.config.engine import TorchEngine
from vila_ops.config.images import Webp
from vila_ops.config.model import ImageFit, RandomTower
from vila_ops.data.images import Fit, square
from vila_ops.generate.engine import EngineOptions
from vila_ops.generate.load import load_engine
from vila_ops.model import folder as model_folder
from vila_ops.model.assemble import assemble
from vila_ops.model.pixels import Pixels
from vila_ops.model.processing import build_processor, image_processor, read_fit
from vila_ops.packages import normalisation
from vila_ops.packages.tokenizer import build_tokenizer

CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
ASPECTS = {"wide": (90, 41), "tall": (57, 200), "even": (64, 64), "strip": (60, 1), "small": (3, 5)}
FITS = get_args(ImageFit)
STOCK = """
import json, sys
import numpy as np
from PIL import Image
from transformers import AutoImageProcessor, AutoProcessor
for folder, kind in json.loads(sys.argv[1]).items():
    images = AutoImageProcessor.from_pretrained(folder)
    if kind == "stock":
        processor = AutoProcessor.from_pretrained(folder)
        images = lambda image, **more: processor(text="<image>", images=[image], **more)
    actual = {name: images(Image.open(name + ".png"), return_tensors="np")["pixel_values"] for name in sys.argv[2:]}
    np.savez(folder + ".npz", **actual)
assert "vila_ops" not in sys.modules
"""


@pytest.fixture
def images(tmp_path: Path) -> dict[str, bytes]:
    """Opaque noise of several aspects, also as files; one with transparent parts."""
    draw = np.random.default_rng(0)
    shapes = {name: (height, width, 3) for name, (width, height) in ASPECTS.items()} | {"clear": (30, 50, 4)}
    made = {}
    for name, shape in shapes.items():
        out = io.BytesIO()
        Pillow.fromarray(draw.integers(0, 256, shape, dtype=np.uint8)).save(out, "PNG")
        made[name] = out.getvalue()
        (tmp_path / f"{name}.png").write_bytes(made[name])
    return made


@pytest.mark.slow
def test_stock_transformers_makes_the_pixels_that_the_model_trained_on(
    make_model: Any, build: Callable[..., Any], images: dict[str, bytes], tmp_path: Path
) -> None:
    requests = {}
    for fit in FITS:
        for projector in ("mlp_gelu", "mlp_downsample"):
            model = make_model("clip", projector, image_aspect_ratio=fit)
            whole, _ = build(model)
            fast = build_tokenizer(model.language_model, chat_template=model.chat_template, cache=tmp_path)
            folder = tmp_path / f"{fit}-{projector}"
            model_folder.save(whole, folder, processor=build_processor(whole.config, fast, mean_std=CLIP))
            requests[str(folder)] = "stock" if projector == "mlp_gelu" else "ours"
    subprocess.run([sys.executable, "-c", STOCK, json.dumps(requests), *images], check=True, cwd=tmp_path)
    for name in requests:
        config = model_folder.load(Path(name)).config
        assert config.image_aspect_ratio == Path(name).name.split("-")[0]
        mean, std = model_folder.normalisation(Path(name))
        assert (mean, std) == CLIP
        actual = np.load(f"{name}.npz")
        for image, data in images.items():
            seen = square(data, size=config.vision_side, fit=Fit(config.image_aspect_ratio, mean), encoding=Webp())
            expected = Pixels(mean, std)([seen]).numpy()
            assert actual[image].shape == expected.shape == (1, 3, 56, 56)
            assert np.abs(actual[image] - expected).max() <= 1e-6, (name, image)


def test_an_engine_squares_as_its_model_was_trained(make_model: Any, make_resources: Any, tmp_path: Path) -> None:
    for fit in FITS:
        sealed = assemble(make_model(image_aspect_ratio=fit), make_resources(tmp_path))
        engine = load_engine(sealed, TorchEngine(), EngineOptions(tmp_path / "features"))
        assert engine.image_aspect_ratio == Fit(fit, normalisation.mean_std(RandomTower())[0])
        assert engine.image_aspect_ratio.colour == (127, 127, 127)


@pytest.mark.parametrize("fit", FITS)
def test_what_a_saved_image_processor_does_is_read_back(fit: ImageFit) -> None:
    saved = image_processor(fit, side=56, mean_std=CLIP).to_dict()
    assert read_fit(saved) == (fit, 56)


BOTH = {"height": 336, "width": 336}
"""Image processors as known checkpoints state them; absent settings are the class's defaults."""
STATED: dict[str, tuple[dict[str, Any], tuple[ImageFit, int]]] = {
    "llava-hf/llava-1.5-7b-hf": (
        {
            "image_processor_type": "CLIPImageProcessor", "do_center_crop": True, "do_resize": True, "resample": 3,
            "crop_size": BOTH, "size": {"shortest_edge": 336},
        },
        ("crop", 336),
    ),
    "openai/clip-vit-large-patch14-336, of before sizes were mappings": (
        {"feature_extractor_type": "CLIPFeatureExtractor", "do_center_crop": True, "crop_size": 336, "size": 336},
        ("crop", 336),
    ),
    "google/siglip-so400m-patch14-384": (
        {
            "image_processor_type": "SiglipImageProcessor", "do_resize": True, "resample": 3,
            "size": {"height": 384, "width": 384},
        },
        ("resize", 384),
    ),
    "LLaVA's own padding": (
        {
            "image_processor_type": "LlavaImageProcessor", "do_pad": True, "crop_size": BOTH,
            "size": {"shortest_edge": 336},
        },
        ("pad", 336),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", STATED)
def test_image_processors_of_known_checkpoints_are_understood(name: str) -> None:
    stated, expected = STATED[name]
    assert read_fit(stated) == expected


@pytest.mark.parametrize(
    "stated",
    [
        {"size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}},  # crops the margins
        {"size": {"shortest_edge": 224}, "do_center_crop": False},  # not square
        {"size": {"height": 224, "width": 448}, "do_center_crop": False},
        {"image_processor_type": "LlavaImageProcessor", "do_pad": True, "do_center_crop": False,
         "size": {"height": 224, "width": 448}},
        {"size": {"shortest_edge": 224, "longest_edge": 300}},
        {"size": {"height": 224, "width": 224}, "do_center_crop": False, "resample": 2},  # bilinear
        {"size": {"longest_edge": 224}, "do_center_crop": False},
    ],
)  # fmt: skip
def test_an_image_processor_that_does_anything_else_is_refused(stated: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="is not supported; supported are pad, resize and crop"):
        read_fit({"image_processor_type": "CLIPImageProcessor", **stated})
