"""The shipped grids: each of the paper's tables at two scales, every cell valid, and stages shared by address."""

from pathlib import Path

import pytest

from vila_ops.ablate.cells import CellRun, runs_of, stages_of
from vila_ops.config import Resources
from vila_ops.config.grid import Grid, load_grid
from vila_ops.config.lengths import Lengths, load_lengths
from vila_ops.plan import lengths as drawn
from vila_ops.plan.plan import StagePlan, plan_run

ROOT = Path(__file__).parents[2]
TABLES = ("table1", "table3", "table4", "table7", "table8", "table9", "image-first", "fewshot", "figure3")
OTHERS = {"tiny", "pilot", "smoke"}
SHIPPED = {path.stem for path in (ROOT / "configs/grids").glob("*.yaml")}
# the paper's Tables 1, 3, 4, 7, 8 and 9 (arXiv 2312.07533v4), and 68.7 - 4.4 and 70.9 - 37.5 of its text
PAPER = {
    "table1": {"a": (13.4, 37.5), "b": (66.8, 57.6), "c": (66.8, 68.8), "d": (68.7, 70.9)},
    "table3": {
        "base": (46.0,),
        "coyo": (51.1, 50.3, 28.8),
        "mmc4-pairs": (46.4, 44.5, 32.4),
        "mmc4": (68.7, 70.9, 40.7),
        "mmc4-coyo": (69.0, 71.3, 40.2),
    },
    "table4": {
        "text": (51.2,),
        "mmc4-visual": (68.7, 70.9, 40.7),
        "mmc4-coyo-visual": (69.0, 71.3, 40.2),
        "mmc4-joint": (71.0, 72.1, 51.4),
        "mmc4-coyo-joint": (72.3, 73.6, 50.9),
    },
    "table7": {
        "linear": (224, 256, 49.9, 41.6, 116.0),
        "large": (336, 576, 49.7, 49.8, 117.7),
        "downsample": (336, 144, 49.3, 45.6, 115.7),
    },
    "table8": {"visual-expert": (1.9, 67.0, 64.8), "fine-tune": (1.0, 71.0, 72.1)},
    "table9": {"lora": (69.4, 54.3, 48.4, 50.0, 60.3, 51.2), "full": (79.9, 62.3, 57.8, 64.4, 68.9, 69.7)},
    "image-first": {"image-first": (64.3, 33.4), "interleaved": (68.7, 70.9)},
}
NAMES = {"56-linear": "linear", "224-linear": "linear", "112-linear": "large", "336-linear": "large"} | {
    "112-downsample": "downsample",
    "336-downsample": "downsample",
}
SAME = [
    (("table1", "d"), ("table3", "mmc4-coyo"), ("table4", "mmc4-coyo-visual"), ("fewshot", "mmc4-coyo")),
    (("table1", "d"), ("figure3", "trained")),
    (("table4", "mmc4-coyo-joint"), ("table7", "56-linear"), ("table8", "fine-tune"), ("table9", "full")),
    (("table3", "mmc4"), ("table4", "mmc4-visual"), ("image-first", "interleaved")),
    (("table3", "coyo"), ("fewshot", "coyo")),
    (("fewshot", "frozen"), ("figure3", "frozen")),
    (("table1", "base"), ("table3", "base"), ("fewshot", "base"), ("figure3", "base")),
]
"""Cells that are one model at the scale of the demo."""
STAGES = {"align": 4, "pretrain": 13, "sft": 17}
"""Stages of all demo grids with one seed, counted by hand: align is linear or a Transformer, and of 112 pixels with and
without merged patches; pretrain has 4 of parts and projectors, 4 of corpora, 2 of 112 pixels and 3 of tunings."""
SMOKE = {
    "transformer": ("table1", "c"),
    "text": ("table4", "text"),
    "112-linear": ("table7", "112-linear"),
    "112-downsample": ("table7", "112-downsample"),
    "visual-expert": ("table8", "visual-expert"),
    "lora": ("table9", "lora"),
}
"""Cells of the grid smoke, and those of the tables that they try."""


@pytest.fixture
def resources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Resources:
    monkeypatch.chdir(ROOT)
    where = {f"storage.{name}": str(tmp_path / name) for name in ("store", "cache", "data", "benchmarks")}
    return Resources(launch="inline").with_changes(where)


def first_seed(grid: Grid, resources: Resources) -> dict[str, CellRun]:
    return {one.cell: one for one in runs_of(grid.with_changes({"seeds": [0, 1]}), resources) if one.seed == 0}


def test_every_table_is_there_at_both_scales() -> None:
    assert {f"{table}_{scale}" for table in TABLES for scale in ("demo", "paper")} | OTHERS == SHIPPED


@pytest.mark.parametrize("name", sorted(SHIPPED))
def test_every_cell_is_a_recipe_that_measures_the_metrics(name: str, resources: Resources) -> None:
    grid = load_grid(Path(name))
    assert list(first_seed(grid, resources)) == list(grid.cells)
    assert len(grid.seeds) >= 3 or name in OTHERS
    assert grid.claims or name == "smoke"
    assert grid.proxies or not name.endswith("_demo")
    assert grid.name == {"tiny": "tiny-grid"}.get(name, name.replace("_", "-"))


@pytest.mark.parametrize("scale", ["demo", "paper"])
@pytest.mark.parametrize("table", PAPER)
def test_the_numbers_of_the_paper_are_those_of_its_tables(table: str, scale: str) -> None:
    cells = {NAMES.get(name, name): one.paper for name, one in load_grid(Path(f"{table}_{scale}")).cells.items()}
    printed = {name: tuple(numbers.values()) for name, numbers in cells.items() if numbers}
    assert printed == {name: numbers for name, numbers in PAPER[table].items() if name in printed}
    assert PAPER[table].keys() - printed.keys() <= ({"text"} if scale == "paper" else set())


def test_the_pilot_measures_models_of_the_tables_on_validation(resources: Resources) -> None:
    """So that choices by it cost no further training, and are not made on what is reported."""
    pilot, tables = (first_seed(load_grid(Path(name)), resources) for name in ("pilot", "figure3_demo"))
    assert {one.run.recipe.final_suite.split for one in pilot.values()} == {"validation"}
    assert {one.run.recipe.final_suite.split for one in tables.values()} == {"test"}
    for cell, one in tables.items():
        assert [part.at.key for part in stages_of(pilot[cell])] == [part.at.key for part in stages_of(one)]


def test_cells_of_the_demo_share_their_stages(resources: Resources) -> None:
    found: dict[tuple[str, str], list[str]] = {}
    of_stage: dict[str, set[str]] = {name: set() for name in STAGES}
    for table in TABLES:
        for cell, one in first_seed(load_grid(Path(f"{table}_demo")), resources).items():
            stages = list(stages_of(one))
            found[table, cell] = [part.at.key for part in stages]
            for part in stages:
                of_stage[part.stage.name].add(part.at.key)
    for cells in SAME:
        assert len({tuple(found[cell]) for cell in cells}) == 1, cells
    assert found["table3", "base"] == []
    assert {name: len(keys) for name, keys in of_stage.items()} == STAGES


def test_cells_of_the_paper_share_stages_without_their_raw_data(resources: Resources) -> None:
    cells = first_seed(load_grid(Path("table4_paper")), resources)
    keys = {cell: [part.at.key for part in stages_of(one)] for cell, one in cells.items()}
    assert keys["mmc4-visual"][:2] == keys["mmc4-joint"][:2]
    assert keys["mmc4-visual"][2] != keys["mmc4-joint"][2]
    assert keys["mmc4-visual"][1] != keys["mmc4-coyo-visual"][1]
    assert len({own[0] for own in keys.values()}) == 1


def test_two_steps_of_every_kind_of_cell_are_tried_on_validation(resources: Resources) -> None:
    """The grid smoke has the settings of the tables' cells but for the number of steps."""
    smoke = first_seed(load_grid(Path("smoke")), resources)
    tables = {table: first_seed(load_grid(Path(f"{table}_demo")), resources) for table, _ in SMOKE.values()}
    assert smoke.keys() == SMOKE.keys()
    for cell, (table, of) in SMOKE.items():
        tried, whole = smoke[cell].run.recipe, tables[table][of].run.recipe
        steps = {f"stages.{name}.num_steps": stage.num_steps for name, stage in whole.stages.items()}
        assert tried.with_changes(steps).stages == whole.stages, cell
        assert (tried.model, tried.max_tokens) == (whole.model, whole.max_tokens)
        assert {stage.num_steps for stage in tried.stages.values()} == {2}
        assert (tried.final_suite.split, tried.final_suite.benchmarks) == ("validation", whole.final_suite.benchmarks)


def test_adapters_have_ten_times_the_rate_of_full_tuning(resources: Resources) -> None:
    cells = {cell: one.run.recipe.stages for cell, one in first_seed(load_grid(Path("table9_demo")), resources).items()}
    for name in ("pretrain", "sft"):
        lora, same, full = (cells[cell][name] for cell in ("lora", "lora-same-rate", "full"))
        assert lora.peak_rate("language_model") == pytest.approx(10 * full.peak_rate("language_model"))
        assert same.peak_rate("language_model") == full.peak_rate("language_model")
        assert lora.peak_rate("projector") == same.peak_rate("projector") == full.peak_rate("projector")


CAPTIONS = {"tux_paint": (338, 8.8), "fluent_emoji": (873, 7.1)}
"""Samples and text tokens of the sources as captions; configs/lengths has them as questions, as in sft."""


def test_cells_of_one_table_see_as_many_images(resources: Resources, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever they read beside them: text-only instructions in Table 4, longer images in Table 7."""
    monkeypatch.setattr(drawn, "MOST_SAMPLES", 2**12)
    questions = load_lengths(Path("demo"))
    captions = [
        {"samples": samples, "images": 1, "text_tokens": tokens, "spread": 0.2} for samples, tokens in CAPTIONS.values()
    ]
    sources = {**questions.sources, **{name: (one,) for name, one in zip(CAPTIONS, captions, strict=True)}}
    of_captions = Lengths.model_validate({"sources": sources})

    def planned(table: str, cell: str) -> dict[str, StagePlan]:
        one = first_seed(load_grid(Path(f"{table}_demo")), resources)[cell]
        *before, _ = plan_run(one.run, of_captions).stages
        return {plan.stage: plan for plan in (*before, plan_run(one.run, questions).stages[-1])}

    small, large = (planned("table7", cell) for cell in ("56-linear", "112-linear"))
    for name in small:
        assert large[name].images == pytest.approx(small[name].images, rel=0.1), name  # declared lengths are coarse
        assert large[name].steps == small[name].steps
    visual, joint, text = (planned("table4", cell)["sft"] for cell in ("mmc4-visual", "mmc4-joint", "text"))
    assert joint.images == pytest.approx(visual.images, rel=0.05)
    assert text.samples == pytest.approx(joint.samples - joint.images, rel=0.05)  # one image in each visual sample
