import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as Pillow
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor

from vila_ops.config.images import Webp
from vila_ops.data.images import Fit, square
from vila_ops.errors import CorruptArtifact
from vila_ops.model import folder as model_folder
from vila_ops.model.modify import Modifications
from vila_ops.model.pixels import Pixels
from vila_ops.model.vila import VilaForConditionalGeneration
from vila_ops.packages.normalisation import HALVES

TOWERS = ("clip", "siglip", "dinov2")
PROJECTORS = ("linear", "mlp_gelu", "mlp_downsample")
TEXTS = {"one": ["<image>\nA dog."], "many": ["A dog <image> and <image>, <image>"], "none": ["No image here."]}
IMAGES = {"one": ["dog"], "many": ["cat", "dog", "cat"], "none": []}

STOCK = """
import json, sys
import numpy as np, torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration
torch.set_num_threads(1)
for folder, cases in json.loads(sys.argv[1]).items():
    processor = AutoProcessor.from_pretrained(folder)
    model, info = LlavaForConditionalGeneration.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    actual = {}
    for name, (text, paths) in cases.items():
        inputs = processor(text=text, images=[Image.open(p) for p in paths] or None, return_tensors="pt")
        with torch.no_grad():
            actual[name + ".logits"] = model(**inputs).logits.numpy()
        actual[name + ".ids"] = inputs["input_ids"].numpy()
    np.savez(folder + ".npz", **actual)
assert "vila_ops" not in sys.modules
"""


def logits(model: VilaForConditionalGeneration, ids: torch.Tensor, values: torch.Tensor | None) -> torch.Tensor:
    """Logits as training computes them: tower, projector, language model, head."""
    with torch.no_grad():
        features = None if values is None else model.tower_features(values)
        hidden = model.hidden(model.embed(ids, features), use_cache=False).last_hidden_state
        actual: torch.Tensor = model.lm_head(hidden)
    return actual


@pytest.mark.parametrize("projector", PROJECTORS)
@pytest.mark.parametrize("tower", TOWERS)
def test_save_and_load_are_exact(
    tower: str, projector: str, make_model: Any, build: Callable[..., Any], tmp_path: Path
) -> None:
    whole, processor = build(make_model(tower, projector, feature_layer=-1 if tower == "siglip" else -2))
    model_folder.save(whole, tmp_path, processor=processor)
    again = model_folder.load(tmp_path)
    before, after = whole.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not again.training
    ids = torch.tensor([[1, 40, *[3] * whole.config.image_seq_length, 41, 2]])
    values = torch.rand(1, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    assert torch.equal(logits(whole, ids, values), logits(again, ids, values))
    with torch.no_grad():
        assert torch.allclose(again(input_ids=ids, pixel_values=values).logits, logits(whole, ids, values), atol=1e-5)


@pytest.mark.slow
def test_plain_folders_load_in_stock_transformers_and_give_our_logits(
    make_model: Any, build: Callable[..., Any], tiny: Path, tmp_path: Path
) -> None:
    pad = Fit("pad", HALVES[0])
    squares = {
        name: square((tiny / f"pairs/{name}.png").read_bytes(), size=56, fit=pad, encoding=Webp())
        for name in ("dog", "cat")
    }
    for name, data in squares.items():
        (tmp_path / f"{name}.png").write_bytes(data)
    paths = {case: [str(tmp_path / f"{name}.png") for name in names] for case, names in IMAGES.items()}
    folders: list[Path] = []
    for tower in TOWERS:
        for projector in ("linear", "mlp_gelu"):
            folders.append(tmp_path / f"{tower}-{projector}")
            whole, processor = build(make_model(tower, projector))
            model_folder.save(whole, folders[-1], processor=processor)
            config = json.loads((folders[-1] / "config.json").read_text())
            assert config["model_type"] == "llava"
            assert config["architectures"] == ["LlavaForConditionalGeneration"]
    requests = {str(folder): {case: (TEXTS[case], paths[case]) for case in TEXTS} for folder in folders}
    subprocess.run([sys.executable, "-c", STOCK, json.dumps(requests)], check=True, cwd=tmp_path)
    for folder in folders:
        stock = np.load(f"{folder}.npz")
        ours = model_folder.load(folder)
        mean, std = model_folder.normalisation(folder)
        for case, names in IMAGES.items():
            ids = torch.from_numpy(stock[f"{case}.ids"])
            assert int((ids == 3).sum()) == 16 * len(names)
            chosen = [squares[name] for name in names]
            values = Pixels(mean, std)(chosen) if chosen else None
            expected = torch.from_numpy(stock[f"{case}.logits"])
            assert torch.allclose(logits(ours, ids, values), expected, atol=1e-5, rtol=0)


def test_our_processor_comes_back_and_places_as_many_tokens_as_the_projector_gives(
    make_model: Any, build: Callable[..., Any], tiny: Path, tmp_path: Path
) -> None:
    whole, processor = build(make_model("clip", "mlp_downsample", factor=3))  # a grid of 4 x 4: padded to 6 x 6
    model_folder.save(whole, tmp_path, processor=processor)
    again = AutoProcessor.from_pretrained(tmp_path)
    image = Pillow.open(tiny / "pairs/dog.png").convert("RGB")
    inputs = again(text=["A dog <image>"], images=[image], return_tensors="pt")
    assert int((inputs["input_ids"] == 3).sum()) == 4
    with torch.no_grad():
        assert model_folder.load(tmp_path)(**inputs).logits.shape[1] == inputs["input_ids"].shape[1]


def test_a_checkpoint_replaces_what_trained_and_keeps_the_rest_to_the_bit(
    make_model: Any, build: Callable[..., Any], tmp_path: Path
) -> None:
    whole, processor = build(make_model("clip", "linear"))
    init, out = tmp_path / "init", tmp_path / "out"
    init.mkdir()
    out.mkdir()
    model_folder.save(whole, init, processor=processor)
    name = "model.multi_modal_projector.linear.weight"
    model_folder.save_trained(
        {name: torch.full_like(whole.state_dict()[name], 0.25)}, out, init=init, modifications=Modifications()
    )
    before, after = model_folder.load(init).state_dict(), model_folder.load(out).state_dict()
    assert (after[name] == 0.25).all()
    assert all(torch.equal(before[key], after[key]) for key in before if key != name)
    names = {path.name for path in init.iterdir()}
    assert {path.name for path in out.iterdir()} == names
    assert all((init / n).read_bytes() == (out / n).read_bytes() for n in names - {"model.safetensors"})
    with pytest.raises(ValueError, match="no parameters"):
        model_folder.save_trained({"model.nothing": torch.zeros(1)}, tmp_path, init=init, modifications=Modifications())


@pytest.mark.parametrize("projector", ["linear", "mlp_gelu", "mlp_downsample"])
@pytest.mark.parametrize("change", ["missing", "extra", "shape", "garbage"])
def test_a_wrong_set_of_weights_is_refused(
    projector: str, change: str, make_model: Any, build: Callable[..., Any], tmp_path: Path
) -> None:
    whole, processor = build(make_model("clip", projector))
    model_folder.save(whole, tmp_path, processor=processor)
    path = tmp_path / "model.safetensors"
    state = load_file(path)
    match change:
        case "missing":
            del state["model.multi_modal_projector.linear_2.weight"]
        case "extra":
            state["model.language_model.layers.9.mlp.up_proj.weight"] = torch.zeros(2, 2)
        case "shape":
            state["model.multi_modal_projector.linear_1.weight"] = torch.zeros(3, 3)
    save_file(state, path)
    if change == "garbage":
        path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CorruptArtifact, match=r"model|weights"):
        model_folder.load(tmp_path)


def test_a_trained_second_layer_is_no_linear_projector(
    make_model: Any, build: Callable[..., Any], tmp_path: Path
) -> None:
    whole, processor = build(make_model("clip", "linear"))
    model_folder.save(whole, tmp_path, processor=processor)
    state = load_file(tmp_path / "model.safetensors")
    state["model.multi_modal_projector.linear_2.bias"][0] = 1e-3
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="not the identity"):
        model_folder.load(tmp_path)
