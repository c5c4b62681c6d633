"""The plan from prepared data and from declared lengths, and its refusals."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from typer.testing import CliRunner

from vila_ops.artifacts.store import content, opened
from vila_ops.cli import app
from vila_ops.config import load
from vila_ops.config.lengths import Lengths
from vila_ops.data.loading.loader import RowLoader
from vila_ops.pipeline import stages as pipeline
from vila_ops.plan.lengths import EpochLengths, declared, rows_of
from vila_ops.plan.plan import plan_run

ROOT = Path(__file__).parents[2]
VILA = (
    "configs/recipes/vila-7b.yaml",
    "-r",
    "configs/resources/vila_128.yaml",
    "--lengths",
    "configs/lengths/vila.yaml",
)
Json = dict[str, Any]


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.fixture
def planned() -> Any:
    """Runs the plan of VILA 7B with some overrides. Returns the plan, the exit code and stderr."""

    def run(*overrides: str) -> tuple[Json, int, str]:
        options = [part for override in overrides for part in ("-s", override)]
        done = CliRunner().invoke(app, ["plan", *VILA, *options, "--json"])
        return json.loads(done.stdout), done.exit_code, done.stderr

    return run


@pytest.mark.slow
def test_the_plan_of_prepared_data_is_what_training_will_read(tmp_path: Path) -> None:
    places = {name: str(tmp_path / name) for name in ("store", "cache", "data")}
    (tmp_path / "resources.yaml").write_text(yaml.safe_dump({"launch": "inline", "storage": places}))
    run = load(Path("configs/recipes/tiny.yaml"), resources=tmp_path / "resources.yaml", overrides=(
        "stages.sft.num_steps=null", "stages.sft.epochs=3",
    ))  # fmt: skip
    with pytest.raises(ValueError, match=r"tiny_align' are not known: it is not prepared.*--lengths"):
        plan_run(run)
    datasets = {stage.name: pipeline.prepare_named(run, stage.mixture.name) for stage in run.recipe.stages.values()}
    made = {one.stage: one for one in plan_run(run).stages}
    assert made["align"].steps == 6
    data, stage = datasets["align"], run.recipe.stages["align"]
    index = pq.read_table(content(data) / "index.parquet", filters=[("split", "=", "train")])
    rows = RowLoader(opened(data).file, digest=data.digest, stage=stage, cache=tmp_path / "plans")
    read = [row for step in range(6) for row in rows.batch(step)[0]]
    ours = made["align"]
    assert ours.tokens == pytest.approx(sum(int((row.segment_ids > 0).sum()) for row in read), rel=0.1)
    assert ours.targets / ours.tokens == pytest.approx(
        sum(index["num_targets"].to_pylist()) / sum(index["num_tokens"].to_pylist())
    )
    assert ours.images / ours.samples == 1
    sft = RowLoader(
        opened(datasets["sft"]).file,
        digest=datasets["sft"].digest,
        stage=run.recipe.stages["sft"],
        cache=tmp_path / "p",
    )
    assert made["sft"].steps == sft.num_steps()
    assert made["sft"].hours is None
    assert made["sft"].fits is None


def test_rows_without_packing_are_padded_to_the_longest_of_their_micro_batch(
    make_stage: Any, make_mixture: Any
) -> None:
    epoch = EpochLengths(np.array([10, 30]), np.array([3, 4]), np.array([1, 0]), times=2.0, distinct=1.0)
    stage = make_stage(make_mixture("pairs"), pack=False, sequence_length=64)
    rows = rows_of(epoch, stage, micro_batch_size=2, most_images=9)
    assert (rows.rows, rows.longest, rows.most_images) == (4, 30, 1)
    assert [(one.tokens, one.pairs, one.images, one.targets) for one in rows.useful] == [
        (20, 110, 2, 6),
        (60, 930, 0, 8),
    ]
    assert [one.tokens for one in rows.padded] == [60, 60]


def test_packed_rows_are_those_of_the_planner(make_stage: Any, make_mixture: Any) -> None:
    epoch = EpochLengths(np.array([40, 24, 30, 34]), np.ones(4, int), np.zeros(4, int), times=1.0, distinct=1.0)
    rows = rows_of(epoch, make_stage(make_mixture("pairs"), sequence_length=64), micro_batch_size=1, most_images=4)
    assert rows.rows == 2
    assert rows.useful == rows.padded


def test_declared_lengths_keep_their_means(make_mixture: Any) -> None:
    mixture = make_mixture("pairs")
    group = {"samples": 500_000, "images": 1.25, "text_tokens": 100, "spread": 0.5, "target_share": 0.5}
    epoch = declared(Lengths.model_validate({"sources": {"pairs": [group]}}), mixture, image_tokens=16, max_tokens=4096)
    assert len(epoch.tokens) * epoch.times == pytest.approx(500_000)
    assert epoch.tokens.mean() == pytest.approx(100 + 1.25 * 16, rel=0.01)
    assert epoch.images.mean() == pytest.approx(1.25, rel=0.01)
    assert epoch.targets.mean() == pytest.approx(50, rel=0.02)
    with pytest.raises(ValueError, match=r"do not have sources \['documents'\]"):
        declared(
            Lengths.model_validate({"sources": {"pairs": [group]}}),
            make_mixture("documents"),
            image_tokens=4,
            max_tokens=99,
        )


@pytest.mark.slow
def test_a_stage_that_does_not_fit_is_refused_and_fits_with_the_settings_that_are_named(planned: Any) -> None:
    plan, code, errors = planned("resources.train.stages.sft.gradient_checkpointing=false")
    stages = {one["stage"]: one for one in plan["stages"]}
    assert code == 1
    assert "stage 'sft' needs" in errors
    assert {name: one["fits"] for name, one in stages.items()} == {"align": True, "pretrain": True, "sft": False}
    nearest = stages["sft"]["nearest"]
    assert nearest
    again, code, errors = planned(*(f"resources.train.stages.sft.{key}={value}" for key, value in nearest.items()))
    assert (code, errors) == (0, "")
    assert all(one["fits"] for one in again["stages"])


def test_hours_money_and_storage_are_arithmetic(planned: Any) -> None:
    plan, _, _ = planned(
        "resources.train.accelerator.price_per_hour=2", "stages.sft.save_every=1000", "resources.train.mfu=0.5"
    )
    align, pretrain, sft = plan["stages"]
    assert pretrain["hours"] == pytest.approx(pretrain["machine_flops"] / (128 * 312e12 * 0.5) / 3600)
    assert plan["gpu_hours"] == pytest.approx(8 * align["hours"] + 128 * pretrain["hours"] + 8 * sft["hours"])
    assert plan["cost"] == pytest.approx(2 * plan["gpu_hours"])
    assert sft["model_bytes"] == pytest.approx(4 * (6_738_415_616 + 303_507_456 + 20_979_712), rel=0.001)  # fp32
    assert sft["resume_bytes"] == pytest.approx(3 * 12 * (6_738_415_616 + 20_979_712), rel=0.001)
    assert align["feature_bytes"] == pytest.approx(align["images"] * 576 * 1024 * 2, rel=0.001)
    assert align["resume_bytes"] == 0  # save_every is 24,000, more than its steps


@pytest.mark.slow
def test_the_commands_of_the_page_print_what_it_shows() -> None:
    page = (ROOT / "docs/plan.md").read_text()
    shown = re.findall(r"```sh\nvila-ops (plan [^\n]*)\n```\n\n```text\n(.*?)```", page, re.DOTALL)
    assert len(shown) == 2
    for command, output in shown:
        assert CliRunner().invoke(app, command.split()).output == output
