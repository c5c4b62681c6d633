import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from tests.model.test_language_models import hub
from tests.model.test_language_models import write as write_language_model
from vila_ops.artifacts.store import content
from vila_ops.config import Model, Resources
from vila_ops.errors import CorruptArtifact
from vila_ops.model import folder as model_folder
from vila_ops.model.assemble import assemble


@pytest.fixture(scope="module")
def whole(make_model: Any, build: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a model, with one file that does not belong to the model."""
    out: Path = tmp_path_factory.mktemp("whole")
    model, processor = build(make_model("clip", "mlp_downsample", after_image="\n"))
    model_folder.save(model, out, processor=processor)
    (out / "loss.csv").write_bytes(b"step,loss")
    return out


@pytest.fixture
def start(make_model: Any) -> Callable[..., Model]:
    """A recipe's model that starts from a folder."""

    def make(path: Path, tower: str = "clip", projector: str = "mlp_downsample", **more: Any) -> Model:
        weights = {"kind": "folder", "path": str(path)}
        model: Model = make_model(tower, projector, **{"after_image": "\n", "weights": weights, "seed": 5, **more})
        return model

    return make


def test_a_recipe_starts_from_the_very_bytes_of_the_folder(
    whole: Path, start: Callable[..., Model], make_resources: Callable[..., Resources], tmp_path: Path
) -> None:
    made = content(assemble(start(whole), make_resources(tmp_path)))
    names = {path.name for path in whole.iterdir()} - {"loss.csv"}
    assert {path.name for path in made.iterdir()} == names
    assert all((made / name).read_bytes() == (whole / name).read_bytes() for name in names)


def test_the_content_of_the_folder_is_what_counts_not_its_place(
    whole: Path, start: Callable[..., Model], make_resources: Callable[..., Resources], tmp_path: Path
) -> None:
    resources = make_resources(tmp_path)
    first = assemble(start(whole), resources)
    moved = tmp_path / "moved"
    shutil.copytree(whole, moved)
    assert assemble(start(moved), resources).uri == first.uri
    path = moved / "model.safetensors"
    state = load_file(path)
    state["model.multi_modal_projector.linear_1.bias"][0] += 1
    save_file(state, path)
    other = assemble(start(moved), resources)
    assert other.uri != first.uri
    assert other.digest != first.digest


def test_new_weights_of_a_part_in_the_same_folder_at_the_same_revision_are_another_model(
    make_model: Any, make_resources: Callable[..., Resources], tmp_path: Path
) -> None:
    write_language_model(tmp_path / "words", "qwen2")
    model = make_model(language_model=hub(tmp_path / "words"))
    resources = make_resources(tmp_path)
    first = assemble(model, resources)
    path = tmp_path / "words/model.safetensors"
    state = load_file(path)
    state["model.norm.weight"][0] += 1
    save_file(state, path, metadata={"format": "pt"})
    second = assemble(model, resources)
    assert second.digest != first.digest
    assert (
        load_file(content(second) / path.name)["model.language_model.norm.weight"][0] == state["model.norm.weight"][0]
    )
    assert assemble(model.with_changes({"language_model.revision": "another label"}), resources) == second


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"projector": "linear"}, r"its projector is .*'mlp_downsample'.*, the recipe's .*'linear'"),
        ({"factor": 3}, r"its projector is .*'factor': 2.*, the recipe's .*'factor': 3"),
        ({"image_size": 70}, "its image_size is 56, the recipe's 70"),
        ({"patch_size": 28}, "its patch_size is 14, the recipe's 28"),
        ({"image_aspect_ratio": "crop"}, "its image_aspect_ratio is 'pad', the recipe's 'crop'"),
        ({"feature_layer": -1}, "its feature_layer is -2, the recipe's -1"),
        ({"after_image": ""}, r"its after_image is '\\n', the recipe's ''"),
        ({"chat_template": "plain"}, "its chat template is not the recipe's 'plain'"),
        (
            {"vision_tower": {"kind": "random", "hidden_size": 64}},
            "its vision_tower hidden_size is 32, the recipe's 64",
        ),
        (
            {"vision_tower": {"kind": "hub", "name": "WHOLE", "revision": "y", "shape": {"model_type": "dinov2"}}},
            "its vision_tower model_type is 'clip_vision_model', the recipe's 'dinov2'",
        ),
    ],
)
def test_each_difference_from_the_recipe_is_reported_with_both_values(
    more: dict[str, Any],
    why: str,
    whole: Path,
    start: Callable[..., Model],
    make_resources: Callable[..., Resources],
    tmp_path: Path,
) -> None:
    if more.get("vision_tower", {}).get("name") == "WHOLE":
        more = {"vision_tower": {**more["vision_tower"], "name": str(whole)}}
    with pytest.raises(ValueError, match=why):
        assemble(start(whole, **more), make_resources(tmp_path))


def test_a_tower_that_wants_other_pixels_is_refused(
    whole: Path, start: Callable[..., Model], make_resources: Callable[..., Resources], tmp_path: Path
) -> None:
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.5, 0.5]}')
    tower = {"kind": "hub", "name": str(tmp_path), "revision": "y"}
    with pytest.raises(ValueError, match=r"its mean and deviation is .*0\.5.*, the recipe's .*0\.1, 0\.2, 0\.3"):
        assemble(start(whole, vision_tower=tower), make_resources(tmp_path / "more"))


def test_all_differences_are_reported_at_once(
    whole: Path, start: Callable[..., Model], make_resources: Callable[..., Resources], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"image_size is 56.*; its feature_layer is -2.*chat template"):
        assemble(start(whole, image_size=70, feature_layer=-1, chat_template="plain"), make_resources(tmp_path))


def test_a_language_model_of_another_shape_or_tokenizer_is_refused(
    whole: Path,
    start: Callable[..., Model],
    make_resources: Callable[..., Resources],
    tiny: Path,
    tmp_path: Path,
) -> None:
    random = {"kind": "random", "tokenizer": str(tiny / "tokenizer"), "num_layers": 3}
    with pytest.raises(ValueError, match="its language_model num_hidden_layers is 2, the recipe's 3"):
        assemble(start(whole, language_model=random), make_resources(tmp_path))
    shutil.copytree(tiny / "tokenizer", tmp_path / "other")
    path = tmp_path / "other/tokenizer.json"
    path.write_text(path.read_text().replace("<image>", "<photo>"))
    random = {"kind": "random", "tokenizer": str(tmp_path / "other")}
    with pytest.raises(
        ValueError, match=r"its tokenizer has 512 tokens, the recipe's 513; .*its image token is 3, .*512"
    ):
        assemble(start(whole, language_model=random), make_resources(tmp_path))


def test_a_folder_without_the_weights_that_its_config_names_is_refused(
    whole: Path, start: Callable[..., Model], make_resources: Callable[..., Resources], tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(whole, broken)
    state = load_file(broken / "model.safetensors")
    del state["model.multi_modal_projector.linear_2.weight"]
    save_file(state, broken / "model.safetensors")
    with pytest.raises(CorruptArtifact, match="linear_2"):
        assemble(start(broken), make_resources(tmp_path))
