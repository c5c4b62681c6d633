"""docs/paper-scale.md: its inputs are those of the configs, and the rows of its last recipe those of the planner."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

PAGE = (Path(__file__).parents[2] / "docs/paper-scale.md").read_text()


@pytest.fixture
def script(docs_script: Callable[[str], ModuleType]) -> ModuleType:
    return docs_script("paper_scale")


def test_the_tables_are_of_the_present_recipes_resources_and_lengths(script: ModuleType) -> None:
    assert f"Inputs: `{script.inputs()}`" in PAGE, "make paper-scale"


def test_the_planner_gives_the_rows_of_the_scripts(script: ModuleType) -> None:
    case = script.CASES[-1]
    section = PAGE.partition(f"## {case.title}\n")[2]
    scripts = script.as_scripts(case)
    for number, plan in enumerate(scripts.plans):
        workers = script.run_of(case).resources.train.for_stage(plan.stage).num_workers
        assert script.row(scripts, number, workers, "") in section, "make paper-scale"


def test_the_page_tells_its_assumptions(script: ModuleType) -> None:
    assert f"**{100 * script.UTILISATION:.0f} % of the peak**" in PAGE
    assert f"A GPU-hour costs {script.PRICE:g}," in PAGE
