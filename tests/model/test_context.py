"""The longest sample that a language model reads, and what asks for more before anything is computed."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, LlamaConfig, LlamaModel
from typer.testing import CliRunner

from vila_ops.artifacts.kinds import Dataset
from vila_ops.cli import app
from vila_ops.config import NO_CONTEXT, Recipe, load
from vila_ops.model.context import check_recipe, context_length
from vila_ops.pipeline.stages import TASKS, walk

ROOT = Path(__file__).parents[2]
TINY_RECIPE, INLINE = "configs/recipes/tiny.yaml", Path("configs/resources/inline.yaml")
FACTORS = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
LONGROPE = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 16, **FACTORS}


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def recipe(*overrides: str) -> Recipe:
    return load(Path(TINY_RECIPE), resources=INLINE, overrides=overrides).recipe


@pytest.mark.parametrize(
    ("stated", "length"),
    [
        ({"max_position_embeddings": 4096}, 4096),
        ({"hidden_size": 32}, None),
        ({"max_position_embeddings": 2048, "rope_scaling": {"type": "dynamic", "factor": 4.0}}, 2048),
        ({"max_position_embeddings": 2048, "rope_parameters": {"rope_type": "linear", "factor": 4.0}}, 2048),
        ({"max_position_embeddings": 131072, "rope_parameters": {**LONGROPE}}, 16),
        ({"max_position_embeddings": 131072, "original_max_position_embeddings": 4096,
          "rope_scaling": {"type": "longrope", **FACTORS}}, 4096),
        ({"max_position_embeddings": 512, "rope_parameters": {"sliding_attention": {}, "full_attention": LONGROPE}},
         16),
        ({"max_position_embeddings": 512, "rope_parameters": {"rope_type": "yarn", "factor": 4.0,
          "original_max_position_embeddings": 128}}, 512),
    ],
)  # fmt: skip
def test_a_context_ends_where_positions_end_or_frequencies_change(stated: dict[str, Any], length: int | None) -> None:
    assert context_length(stated) == length


@pytest.mark.parametrize("rope", [LONGROPE, {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}])
def test_up_to_that_length_stock_gives_a_row_the_same_states_in_any_batch(rope: dict[str, Any]) -> None:
    """And beyond it not: the length of another row of the batch changes the frequencies of all."""
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    positions = 64 if rope is LONGROPE else 16
    config = LlamaConfig(**shape, vocab_size=64, max_position_embeddings=positions, rope_parameters=dict(rope))
    torch.manual_seed(0)
    model = LlamaModel(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    limit = context_length(config.to_dict())
    assert limit == 16
    ids = torch.arange(8)[None]

    def states(together: int) -> torch.Tensor:
        place = torch.arange(together).expand(2, -1)
        rows = torch.cat([torch.cat([ids, ids.new_zeros(1, together - 8)], 1), ids.new_ones(1, together)])
        with torch.no_grad():
            out: torch.Tensor = model(input_ids=rows, position_ids=place, use_cache=False).last_hidden_state[0, :8]
        return out

    assert torch.allclose(states(limit), states(9), atol=1e-6)
    assert not torch.allclose(states(limit + 8), states(9), atol=1e-3)


def test_a_recipe_that_asks_for_more_is_refused_with_the_setting() -> None:
    check_recipe(recipe(), {"max_position_embeddings": 256})
    check_recipe(recipe(), {})
    with pytest.raises(
        ValueError, match=r"max_tokens of suite 'tiny_probe' is 256, .* has 128 positions; set it to 128"
    ):
        check_recipe(recipe(), {"max_position_embeddings": 128})
    with pytest.raises(ValueError, match=r"^max_tokens is 96, .* has 64 positions"):
        check_recipe(recipe(), {"max_position_embeddings": 64})


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_packing_is_refused_where_frequencies_depend_on_the_length(kind: str) -> None:
    stated = {"max_position_embeddings": 512, "rope_parameters": {"rope_type": kind}}
    with pytest.raises(ValueError, match=f"stage 'align' has pack: true, but .* are of type {kind}.*set pack: false"):
        check_recipe(recipe(), stated)
    apart = [f"stages.{name}.pack=false" for name in ("align", "pretrain", "sft")]
    check_recipe(recipe(*apart), stated)


def test_phi_3_with_long_context_states_its_original_one() -> None:
    longrope = {"type": "longrope", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48}
    config = CONFIG_MAPPING["phi3"](max_position_embeddings=131072, rope_scaling=longrope)
    assert context_length(config.to_dict()) == 4096


def test_plan_and_the_first_stage_refuse_a_recipe_beyond_the_context(tmp_path: Path) -> None:
    asked = ["max_tokens=4096", *(f"stages.{name}.sequence_length=4096" for name in ("align", "pretrain", "sft"))]
    places = [f"resources.storage.{name}={tmp_path / name}" for name in ("store", "data", "cache")]
    options = [word for one in (*asked, *places) for word in ("-s", one)]
    done = CliRunner().invoke(app, ["plan", TINY_RECIPE, *options])
    assert done.exit_code == 1
    assert "max_tokens is 4096, but the context of the language model has 2048 positions" in str(done.exception)
    prepared: list[Dataset] = []
    run = load(Path(TINY_RECIPE), resources=INLINE, overrides=(*asked, *places))
    with pytest.raises(ValueError, match="max_tokens is 4096"):
        prepared.extend(one.data for one in walk(run, TASKS, NO_CONTEXT) if one.data)
    assert prepared == []
