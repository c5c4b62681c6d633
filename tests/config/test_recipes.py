"""The paper's recipes and ablations: whole, as their golden files say, and with the numbers of paper and scripts.

The golden file of a recipe is the whole of it; that of an ablation what it has otherwise than its base.
VILA_GOLDEN=write rewrites them.
"""

import functools
import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from vila_ops.config import Recipe
from vila_ops.config.load import load, read

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests/golden/recipes"
INLINE = ROOT / "configs/resources/inline.yaml"
RECIPES = sorted((ROOT / "configs/recipes").glob("*vila*.yaml"))
SETTINGS = ("setting", "demo_setting")  # no recipes: what base and table3-coyo share, and what the demo's grids share
ABLATIONS = sorted(path for path in (ROOT / "configs/ablations").glob("*.yaml") if path.stem not in SETTINGS)
BY_NAME = {path.stem: path for path in [*RECIPES, *ABLATIONS]}

P, L, V = "projector", "language_model", "vision_tower"
# stage: what trains, global batch, row tokens, learning rate, weight decay, clipping, scripts' save_steps
VILA = {
    "align": ((P,), 256, 4096, 1e-3, 0, None, 24000),
    "pretrain": ((P, L), 1024, 4096, 5e-5, 0, None, 50000),
    "sft": ((P, L), 128, 4096, 2e-5, 0, None, 50000),
}
VILA_1_5 = {
    "align": ((P,), 2048, 4096, 1e-3, 0, None, 24000),
    "pretrain": ((P, L), 1024, 4096, 5e-5, 0, None, 200),
    "sft": ((V, P, L), 1024, 4096, 1e-4, 0, None, 100),
}
STAGES: dict[str, dict[str, tuple[tuple[str, ...], int, int, float, float, float | None, int]]] = {
    "vila-7b": VILA,
    "vila-7b-packed": {
        "align": ((P,), 40, 4096, 1e-3, 0, None, 24000),
        "pretrain": ((P, L), 256, 4096, 5e-5, 0, None, 50000),
        "sft": ((P, L), 16, 4096, 2e-5, 0, None, 50000),
    },
    "vila-13b": VILA,
    "vila1.5-3b": VILA_1_5,
    "vila1.5-8b": VILA_1_5,
    "vila1.5-13b": VILA_1_5,
    "vila1.5-40b": {
        "align": ((P,), 2048, 4096, 1e-3, 0, None, 50),
        "pretrain": ((P, L), 512, 4096, 5e-5, 0, None, 50),
        "sft": ((V, P, L), 1024, 4096, 2e-5, 0.05, None, 50),
    },
    "nvila-8b": {
        "align": ((P,), 512, 8192, 1e-3, 0, None, 100),
        "vit_pretrain": ((V, P), 1024, 8192, 2e-5, 0, 5.0, 100),
        "pretrain": ((P, L), 1024, 8192, 2e-5, 0, None, 100),
        "sft": ((V, P, L), 1024, 8192, 1.5e-5, 0, 5.0, 20),
        "video_sft": ((V, P, L), 2048, 16384, 2e-5, 0, None, 35),
    },
    "nvila-lite-8b": {
        "align": ((P,), 2048, 4096, 1e-3, 0, None, 100),
        "vit_pretrain": ((V, P), 1024, 4096, 5e-5, 0, None, 100),
        "pretrain": ((P, L), 1024, 4096, 5e-5, 0, None, 100),
        "sft": ((V, P, L), 2048, 4096, 2e-5, 0, None, 100),
    },
}
# image size, tokens an image, feature layer, image fit, chat template, projector
MODELS: dict[str, tuple[int, int, int, str, str, str]] = {
    "vila-7b": (336, 576, -2, "pad", "vicuna_v1", "mlp_gelu"),
    "vila-13b": (336, 576, -2, "pad", "vicuna_v1", "mlp_gelu"),
    "vila1.5-3b": (384, 196, -2, "resize", "vicuna_v1", "mlp_downsample"),
    "vila1.5-8b": (384, 196, -2, "resize", "llama_3_vila", "mlp_downsample"),
    "vila1.5-13b": (384, 196, -2, "resize", "vicuna_v1", "mlp_downsample"),
    "vila1.5-40b": (448, 256, -1, "resize", "hermes_2", "mlp_downsample"),
    "nvila-8b": (448, 256, -2, "resize", "chatml", "mlp_downsample"),
    "nvila-lite-8b": (448, 121, -2, "resize", "chatml", "mlp_downsample"),
    "base": (224, 256, -2, "pad", "vicuna_v1", "linear"),
    "table7-336-linear": (336, 576, -2, "pad", "vicuna_v1", "linear"),
    "table7-336-downsample": (336, 144, -2, "pad", "vicuna_v1", "mlp_downsample"),
}
STAGE_3_OF_VILA_1_5 = """
sharegpt4v_gpt4_100k+llava_instruct+sharegpt4v_sft+dvqa_train_200k+chartqa_train_18k+ai2d_train_12k+docvqa_train_10k
+geoqa+synthdog_en+vflan+shot2story_shotonly+video_chatgpt+youcook2+vatex+sharegpt_video+scienceqa+wit_subset+math
+sherlock"""  # joined as in the scripts' --data_mixture

# each ablation's base, and the settings (leaves or named subtrees) in which it differs from it
PRETRAIN, SFT = "stages.pretrain.mixture", "stages.sft.mixture"
TOWER = {"model.image_size", "model.vision_tower.name", "model.vision_tower.shape.image_size"}
DIFFERENCES: dict[str, tuple[str, set[str]]] = {
    "table1-a": ("table1-b", {"stages.sft.trainable"}),
    "table1-b": ("table1-c", {"stages.pretrain.trainable"}),
    "table1-c": ("base", {"model.projector"}),
    "table1-d": ("base", set()),
    "table3-coyo": ("base", {PRETRAIN}),
    "table3-mmc4": ("base", set()),
    "table3-mmc4-pairs": ("base", {f"{PRETRAIN}.sources.mmc4.order"}),
    "table3-mmc4-coyo": ("base", {PRETRAIN}),
    "table4-mmc4-visual": ("base", set()),
    "table4-mmc4-coyo-visual": ("table3-mmc4-coyo", set()),
    "table4-mmc4-joint": ("base", {SFT}),
    "table4-mmc4-coyo-joint": ("table3-mmc4-coyo", {SFT}),
    "table7-224-linear": ("table4-mmc4-joint", set()),
    "table7-336-linear": ("table7-224-linear", TOWER),
    "table7-336-downsample": ("table7-336-linear", {"model.projector"}),
    "table8-fine-tune": ("table4-mmc4-joint", set()),
    "table8-visual-expert": ("table8-fine-tune", {"stages.pretrain.tuning", "stages.sft.tuning"}),
    "table9-full": ("final", set()),
    "table9-lora": ("table9-full", {"stages.pretrain.tuning", "stages.sft.tuning"}),
    "table11-vicuna": ("base", {"model.language_model.name"}),
    "table11-vicuna-frozen": ("table11-vicuna", {"stages.pretrain.trainable"}),
    "table11-final-vicuna": ("final", {"model.language_model.name"}),
    "image-first": ("base", {f"{PRETRAIN}.sources.mmc4.order"}),
    "final": ("vila-7b", {"gate.model_name"}),
}


@functools.cache
def recipe(name: str) -> Recipe:
    return load(BY_NAME[name], resources=INLINE).recipe


def leaves(value: Any, path: str = "") -> dict[str, Any]:
    """Every value that is no mapping, by its dotted path."""
    if not isinstance(value, dict) or not value:
        return {path: value}
    return {k: v for key, child in value.items() for k, v in leaves(child, f"{path}.{key}".lstrip(".")).items()}


def resolved_leaves(name: str) -> dict[str, Any]:
    return leaves(recipe(name).model_dump(mode="json"))


def test_there_are_the_paper_s_recipes() -> None:
    assert sorted(path.stem for path in RECIPES) == sorted(STAGES)
    assert {path.stem for path in ABLATIONS} == {*DIFFERENCES, "base"}


def golden(name: str, resolved: dict[str, Any]) -> Any:
    """What the golden file says; it is written first where that is asked for."""
    path = GOLDEN / f"{name}.yaml"
    if os.environ.get("VILA_GOLDEN") == "write":
        path.write_text(yaml.safe_dump(resolved, sort_keys=False, default_flow_style=None, width=120))
    return yaml.safe_load(path.read_text())


@pytest.mark.parametrize("name", [*STAGES, "base"])
def test_a_recipe_resolves_to_its_golden_file(name: str) -> None:
    resolved = recipe(name).model_dump(mode="json")
    found = golden(name, resolved)
    assert found == resolved
    assert list(found["stages"]) == list(resolved["stages"])


@pytest.mark.parametrize("name", DIFFERENCES)
def test_an_ablation_resolves_to_its_base_with_what_its_golden_file_says(name: str) -> None:
    base = DIFFERENCES[name][0]
    ours, theirs = resolved_leaves(name), resolved_leaves(base)
    difference = {
        "base": base,
        "has": {path: value for path, value in ours.items() if path not in theirs or theirs[path] != value},
        "instead_of": {path: value for path, value in theirs.items() if path not in ours or ours[path] != value},
    }
    assert golden(name, difference) == difference


@pytest.mark.parametrize("name", STAGES)
def test_stages_have_the_numbers_of_the_scripts(name: str) -> None:
    told = {}
    for key, stage in recipe(name).stages.items():
        told[key] = (stage.trainable, stage.global_batch_size, stage.sequence_length, stage.learning_rate)
        told[key] += (stage.weight_decay, stage.max_grad_norm, stage.save_every)
    assert told == STAGES[name]
    assert list(told) == list(STAGES[name])


@pytest.mark.parametrize("name", BY_NAME)
def test_every_stage_is_one_epoch_of_single_samples_in_bf16_under_a_cosine(name: str) -> None:
    """Of packed sequences in the one recipe that says so in its name."""
    for stage in recipe(name).stages.values():
        assert (stage.epochs, stage.num_steps, stage.precision) == (1, None, "bf16")
        assert stage.pack is (name == "vila-7b-packed")
        assert (stage.warmup_ratio, stage.final_ratio, stage.learning_rates) == (0.03, 0, {})
        assert stage.betas == (0.9, 0.999)


@pytest.mark.parametrize("name", MODELS)
def test_models_see_images_as_the_paper_says(name: str) -> None:
    model = recipe(name).model
    seen = (model.image_size, model.image_tokens(), model.feature_layer, model.image_aspect_ratio, model.chat_template)
    assert (*seen, model.projector.kind) == MODELS[name]


def test_projectors_merge_patches_in_the_order_of_their_release() -> None:
    dumped = {name: recipe(name).model.projector.model_dump() for name in ("vila1.5-40b", "nvila-8b", "nvila-lite-8b")}
    assert [tuple(one.values())[1:] for one in dumped.values()] == [(2, 2, "columns"), (2, 2, "rows"), (3, 3, "rows")]


def test_pretraining_is_balanced_as_in_the_paper() -> None:
    """25M images of each; a slot of the loader is a document of MMC4 or 4 samples of COYO."""
    mixture = recipe("vila-7b").stages["pretrain"].mixture.model_dump()
    assert mixture["blend"] == {"kind": "weight", "unit": "samples"}
    assert {name: source["weight"] or 1 for name, source in mixture["sources"].items()} == {"mmc4": 1, "coyo": 4}
    mmc4, coyo = mixture["sources"]["mmc4"], mixture["sources"]["coyo"]
    assert (mmc4["order"], mmc4["max_images"], mmc4["missing_images"]) == ("interleaved", 6, "drop_document")
    columns = ("clip_similarity_vitb32", "clip_similarity_vitl14")
    assert coyo["clean"]["top_share"] == {"columns": columns, "share": 0.2, "above": 0.6}


def test_sft_names_its_data_sets() -> None:
    assert list(recipe("vila1.5-8b").stages["sft"].mixture.sources) == [
        *"".join(STAGE_3_OF_VILA_1_5.split()).split("+"),
        "flan",
    ]
    visual = list(recipe("base").stages["sft"].mixture.sources)
    assert len(visual) == 18
    final = recipe("vila-7b").stages["sft"].mixture.sources
    assert list(final) == [*visual, "flan", "llava_1_5_mix"]
    assert final["flan"].limit == 1_000_000


@pytest.mark.parametrize("name", DIFFERENCES)
def test_an_ablation_differs_from_its_base_in_one_setting(name: str) -> None:
    base, allowed = DIFFERENCES[name]
    one, other = resolved_leaves(name), resolved_leaves(base)
    missing = object()
    differing = {path for path in one | other if one.get(path, missing) != other.get(path, missing)} - {"name"}
    for setting in allowed:
        assert any(path == setting or path.startswith(f"{setting}.") for path in differing), setting
    assert not [p for p in differing if not any(p == a or p.startswith(f"{a}.") for a in allowed)]


@pytest.mark.parametrize("path", ABLATIONS, ids=lambda path: path.stem)
def test_an_ablation_is_one_line_beside_its_base_and_name(path: Path) -> None:
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    assert lines[0].startswith("extends: [")
    assert lines[1] == f"name: {path.stem}"
    assert len(lines) <= 3
    assert len(lines) == 2 or yaml.safe_load(lines[2])
    assert path.read_text().startswith("# ")


def test_the_documentation_names_every_recipe_and_ablation() -> None:
    text = (ROOT / "docs/recipes.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    for name in BY_NAME:
        assert any(f"`{name}`" in row.split("|")[1] for row in rows), name


@pytest.mark.parametrize(
    ("resources", "recipes", "rows"),
    [
        ("vila_128", ["vila-7b", "base", "table9-lora"], {"align": 32, "pretrain": 8, "sft": 16}),
        ("vila-13b_128", ["vila-13b"], {"align": 32, "pretrain": 8, "sft": 16}),
        ("vila1.5_128", ["vila1.5-3b", "vila1.5-8b", "vila1.5-13b"], {"align": 16, "pretrain": 8, "sft": 4}),
        ("vila1.5-40b_128", ["vila1.5-40b"], {"align": 32, "pretrain": 4, "sft": 8}),
        ("nvila_128", ["nvila-8b"], {"align": 4, "vit_pretrain": 4, "pretrain": 4, "sft": 2, "video_sft": 2}),
        ("nvila_lite_128", ["nvila-lite-8b"], {"align": 16, "vit_pretrain": 8, "pretrain": 8, "sft": 8}),
    ],
)
def test_recipes_divide_over_their_gpus(resources: str, recipes: list[str], rows: dict[str, int]) -> None:
    for name in recipes:
        run = load(BY_NAME[name], resources=ROOT / f"configs/resources/{resources}.yaml")
        assert {stage: own.micro_batch_size for stage, own in run.resources.train.stages.items()} == rows
        for stage in run.recipe.stages.values():
            own = run.resources.train.stages[stage.name]
            assert (
                stage.global_batch_size % (rows[stage.name] * (own.num_workers or run.resources.train.num_workers)) == 0
            )


def test_the_first_stage_shards_its_optimizer_and_the_others_everything() -> None:
    """ZeRO-2, then ZeRO-3; the 40B and NVILA are ZeRO-3 from the beginning."""
    tree = {
        name: read(ROOT / f"configs/resources/{name}.yaml")["train"]
        for name in ("vila_128", "vila1.5-40b_128", "nvila_128")
    }
    stages = {
        name: {key: own.get("zero_stage", one["zero_stage"]) for key, own in one["stages"].items()}
        for name, one in tree.items()
    }
    assert stages["vila_128"] == {"align": 2, "pretrain": 3, "sft": 3}
    assert {*stages["vila1.5-40b_128"].values(), *stages["nvila_128"].values()} == {3}
