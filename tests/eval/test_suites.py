"""The committed suites keep apart what is chosen by, what is reported, and what is trained on."""

from pathlib import Path

import pytest

from vila_ops.config import Recipe, load

ROOT = Path(__file__).parents[2]
GENERATED = {"cider", "held_out_pope"}
"""Kinds that the probe leaves out, as generating takes the most time."""


@pytest.fixture(params=["demo", "demo_long"])
def recipe(request: pytest.FixtureRequest) -> Recipe:
    path = ROOT / f"configs/recipes/{request.param}.yaml"
    return load(path, resources=ROOT / "configs/resources/inline.yaml").recipe


def test_choices_are_made_on_validation_and_test_is_read_once(recipe: Recipe) -> None:
    assert (recipe.final_suite.split, recipe.stage_suite.split) == ("test", "validation")


def test_the_suite_reads_300_objects_and_more(recipe: Recipe) -> None:
    assert recipe.final_suite.max_objects >= 300


def test_the_probe_measures_what_the_suite_measures_controls_included(recipe: Recipe) -> None:
    probe, suite = recipe.stage_suite.benchmarks, recipe.final_suite.benchmarks
    assert probe.items() <= suite.items()
    assert {suite[name].kind for name in suite.keys() - probe.keys()} == GENERATED
    kinds = {benchmark.kind for benchmark in recipe.final_suite.benchmarks.values()}
    text = {"text_multiple_choice", "text_loss"}
    assert kinds == {"caption_loss", "multiple_choice", "cider", "held_out_pope", "alignment"} | text
    controls = {
        benchmark.control for benchmark in recipe.final_suite.benchmarks.values() if hasattr(benchmark, "control")
    }
    assert controls == {"shuffled"}


def test_no_stage_trains_on_the_source_of_the_text_benchmarks(recipe: Recipe) -> None:
    trained = [source for stage in recipe.stages.values() for source in stage.mixture.sources.values()]
    for suite in (recipe.final_suite, recipe.stage_suite):
        words = [source for source in suite.mixture.sources.values() if source.render == "definition"]
        assert words
        assert not {source.kind for source in words} & {source.kind for source in trained}
