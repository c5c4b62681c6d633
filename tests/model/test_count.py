"""Counts of parameters: published numbers, hand calculations, and the model as it is built."""

from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, CLIPVisionConfig, CLIPVisionModel, LlamaConfig

from vila_ops.config import Model, Stage
from vila_ops.config.load import load, read
from vila_ops.config.model import HubLanguageModel, HubTower
from vila_ops.model.build import build_model
from vila_ops.model.count import Counts, count
from vila_ops.model.shapes import config_of
from vila_ops.model.trainable import component_of
from vila_ops.packages.tokenizer import IMAGE_TOKEN, build_tokenizer

CONFIGS = Path(__file__).parents[2] / "configs"
INLINE = CONFIGS / "resources/inline.yaml"

LANGUAGE_MODELS = {  # from their model cards or safetensors indices
    "vila-7b": 6_738_415_616,
    "vila-13b": 13_015_864_320,
    "vila1.5-3b": 2_701_560_320,
    "vila1.5-8b": 8_030_261_248,
    "vila1.5-13b": 13_015_864_320,
    "vila1.5-40b": 34_388_917_248,
    "nvila-8b": 7_615_616_512,
    "nvila-lite-8b": 7_615_616_512,
}
TOWERS = {
    "vila-7b": 303_507_456,
    "vila1.5-3b": 428_225_600,
    "vila1.5-40b": 5_536_496_000,
    # PaliGemma's at 224 pixels is 412,442,352 without a pooling head; 448 pixels are 768 positions more
    "nvila-8b": 412_442_352 + 768 * 1152,
}
PROJECTORS = {
    "vila-7b": (1024 * 4096 + 4096) + (4096 * 4096 + 4096),  # 20,979,712
    "vila-13b": (1024 * 5120 + 5120) + (5120 * 5120 + 5120),
    "vila1.5-3b": 2 * 4608 + (4608 * 2560 + 2560) + (2560 * 2560 + 2560),
    "vila1.5-8b": 2 * 4608 + (4608 * 4096 + 4096) + (4096 * 4096 + 4096),
    "vila1.5-40b": 2 * 12800 + (12800 * 7168 + 7168) + (7168 * 7168 + 7168),
    "nvila-8b": 2 * 4608 + (4608 * 3584 + 3584) + (3584 * 3584 + 3584),
}


def of(recipe: str) -> Counts:
    return count(model_of(f"recipes/{recipe}"), cache=Path("nowhere"))


def model_of(file: str) -> Model:
    return load(CONFIGS / f"{file}.yaml", resources=INLINE).recipe.model


def stages_of(file: str) -> tuple[Stage, ...]:
    return tuple(load(CONFIGS / f"{file}.yaml", resources=INLINE).recipe.stages.values())


@pytest.mark.slow
@pytest.mark.parametrize("recipe", LANGUAGE_MODELS)
def test_language_models_have_their_published_parameters(recipe: str) -> None:
    assert of(recipe).language_model == LANGUAGE_MODELS[recipe]


@pytest.mark.parametrize("recipe", TOWERS)
def test_towers_have_their_published_parameters(recipe: str) -> None:
    assert of(recipe).vision_tower == TOWERS[recipe]


@pytest.mark.parametrize("recipe", PROJECTORS)
def test_projectors_have_what_a_hand_counts(recipe: str) -> None:
    assert of(recipe).projector == PROJECTORS[recipe]


def test_projectors_of_the_ablations_have_what_a_hand_counts() -> None:
    linear = 1024 * 4096 + 4096
    block = 4 * (1024 * 1024 + 1024) + (1024 * 4096 + 4096) + (4096 * 1024 + 1024) + 2 * 2 * 1024
    files = ("base", "table1-c", "table7-336-linear", "table7-336-downsample")
    actual = [count(model_of(f"ablations/{name}"), cache=Path("nowhere")).projector for name in files]
    assert actual == [linear, block + 2 * 1024 + linear, linear, 4096 * 4096 + 4096]


def test_every_part_of_a_built_model_is_counted() -> None:
    model = model_of("recipes/tiny")
    tokenizer = build_tokenizer(model.language_model, chat_template=model.chat_template, cache=Path("nowhere"))
    image_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    built = build_model(model, vocabulary=len(tokenizer), image_id=image_id, eos_id=0, cache=Path("nowhere"))
    actual: Counter[str] = Counter()
    for name, parameter in built.named_parameters():
        actual[component_of(name)] += parameter.numel()
    counts = count(model, cache=Path("nowhere"))
    counted = {part: getattr(counts, part) for part in ("vision_tower", "projector", "language_model")}
    assert counted == dict(actual)
    assert counts.total() == built.num_parameters()


def test_lora_of_rank_64_adds_160_million_to_llama_2_7b() -> None:
    """QLoRA's number for rank 64 on all linear layers: 159,907,840."""
    counts, stages = of("vila-7b"), stages_of("ablations/table9-lora")
    assert counts.trained(stages[:2]) == 159_907_840 + PROJECTORS["vila-7b"]
    assert counts.total(stages[:2]) == 6_738_415_616 + 303_507_456 + PROJECTORS["vila-7b"] + 159_907_840
    assert counts.total(stages[:1]) == counts.total()


def test_a_visual_expert_makes_the_language_model_1_9_times_as_large() -> None:
    """The paper's Table 8: 1.9 x. A second QKV (3 D D) and FFN (3 D F) for each of 32 layers."""
    counts = of("vila-7b")
    assert counts.expert == 32 * (3 * 4096 * 4096 + 3 * 4096 * 11008)
    assert round((6_738_415_616 + counts.expert) / 6_738_415_616, 1) == 1.9
    stages = stages_of("ablations/table8-visual-expert")
    assert counts.trained(stages) == counts.expert + PROJECTORS["vila-7b"]
    whole = counts.total()
    assert whole is not None
    assert counts.total(stages) == whole + counts.expert


def test_an_expert_stays_when_the_whole_model_trains_later() -> None:
    counts = Counts(vision_tower=1, projector=10, language_model=100, expert=90, adapted_width=3)
    expert = stages_of("ablations/table8-visual-expert")[1]
    full = stages_of("recipes/vila-7b")[2]
    assert counts.trained((expert, full)) == 200
    assert counts.total((expert, full)) == 201


def test_a_stage_trains_what_it_names() -> None:
    counts, stages = of("nvila-8b"), stages_of("recipes/nvila-8b")
    tower, projector, language_model = counts.vision_tower, counts.projector, counts.language_model
    assert tower is not None
    assert projector is not None
    assert language_model is not None
    trained = [counts.trained(stages[: number + 1]) for number in range(5)]
    whole = tower + projector + language_model
    assert trained == [projector, tower + projector, projector + language_model, whole, whole]


def test_a_part_that_was_not_fetched_is_unknown_and_the_others_are_not(tmp_path: Path) -> None:
    tree = read(CONFIGS / "recipes/vila-7b.yaml")["model"]
    packaged = read(CONFIGS / "models/smollm2_dinov2.yaml")["language_model"]
    for unknown in ({**packaged, "shape": None}, {**tree["language_model"], "shape": None}):
        counts = count(Model.model_validate({**tree, "language_model": unknown}), cache=tmp_path)
        assert (counts.vision_tower, counts.language_model, counts.projector) == (303_507_456, None, None)
        assert counts.total() is None


def test_a_local_folder_is_counted_from_its_config(tmp_path: Path) -> None:
    small = {"hidden_size": 8, "intermediate_size": 6, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=10, **small, tie_word_embeddings=False)
    config.save_pretrained(tmp_path)
    tree = read(CONFIGS / "recipes/vila-7b.yaml")["model"]
    part = {"kind": "hub", "name": str(tmp_path), "revision": "local"}
    counts = count(Model.model_validate({**tree, "language_model": part}), cache=tmp_path)
    assert counts.language_model == 2 * 10 * 8 + 4 * 8 * 8 + 3 * 8 * 6 + 3 * 8


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"model_type": "lama"}, "model_type 'lama', which transformers does not know"),
        ({"hidden_size": 8}, "model_type None, which transformers does not know"),
        (
            {"model_type": "llama", "hidden_size": 10, "num_attention_heads": 3},
            "not a valid llama config.*not a multiple",
        ),
        ({"model_type": "llama", "hiden_size": 8}, r"shape has \['hiden_size'\], which llama configs do not have"),
    ],
)
def test_a_shape_that_means_nothing_is_refused(shape: dict[str, int | float | bool | str], message: str) -> None:
    with pytest.raises(ValueError, match=f"(?s){message}"):
        config_of(shape)


SMALL_TOWER = CLIPVisionConfig(
    hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
)


def small(tmp_path: Path, *, tower: int, language_model: int) -> Model:
    """A model of two local folders with hidden size 16, for which the recipe states these hidden sizes."""
    CLIPVisionModel(SMALL_TOWER).save_pretrained(tmp_path / "tower")
    llama = LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    AutoModelForCausalLM.from_config(llama, dtype=torch.float32).save_pretrained(tmp_path / "language_model")
    tree = read(CONFIGS / "recipes/tiny.yaml")["model"]
    shape = {"model_type": "clip_vision_model", "hidden_size": tower, "num_attention_heads": 2, "patch_size": 14}
    return Model.model_validate(
        {
            **tree,
            "vision_tower": HubTower(name=str(tmp_path / "tower"), revision="local", shape=shape),
            "language_model": HubLanguageModel(
                name=str(tmp_path / "language_model"),
                revision="local",
                shape={"model_type": "llama", "hidden_size": language_model, "num_attention_heads": 2},
            ),
        }
    )


@pytest.mark.parametrize(("tower", "language_model", "part"), [(24, 16, "tower"), (16, 24, "language_model")])
def test_weights_of_another_shape_than_the_recipe_says_are_refused(
    tmp_path: Path, tower: int, language_model: int, part: str
) -> None:
    model = small(tmp_path, tower=tower, language_model=language_model)
    with pytest.raises(ValueError, match=f"{part} at 'local' differs from .*hidden_size is 16 .* says 24"):
        build_model(model, vocabulary=64, image_id=1, eos_id=0, cache=tmp_path)


def test_weights_of_the_shape_that_the_recipe_says_are_taken(tmp_path: Path) -> None:
    model = small(tmp_path, tower=16, language_model=16)
    built = build_model(model, vocabulary=64, image_id=1, eos_id=0, cache=tmp_path)
    assert built.config.vision_config.hidden_size == built.config.text_config.hidden_size == 16
