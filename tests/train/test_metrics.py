"""Metrics of steps: against hand-computed values, as MLflow has them, and from one process and two."""

import logging
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mlflow import MlflowClient

from tests.forks import ranks
from vila_ops import tracking
from vila_ops.artifacts.store import content, opened
from vila_ops.config import NO_CONTEXT, Resources, Stage
from vila_ops.data.loading.loader import RowLoader
from vila_ops.data.loading.packing import PackedRow, pack
from vila_ops.data.shards import Sample, read_index, read_sample
from vila_ops.model import folder as model_folder
from vila_ops.plan.flops import training_flops
from vila_ops.plan.shapes import shapes_of
from vila_ops.tracking import MetricLog
from vila_ops.train.batch_builder import BatchBuilder
from vila_ops.train.job import TrainJob
from vila_ops.train.metrics import LossAccumulator, MetricsLogger, StepMetrics
from vila_ops.train.optim import lr_multiplier
from vila_ops.train.stage import train_stage

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
PEAK, PRICE = 0.5, 7.2
CARD = {"name": "a small one", "memory_gib": 1, "peak_tflops": PEAK, "price_per_hour": PRICE}


@pytest.fixture(scope="module")
def stage(bench: Any, make_stage: Any) -> Stage:
    made: Stage = make_stage(bench.mixture, trainable=["projector", "language_model"], global_batch_size=4, num_steps=6)
    return made


def job_of(bench: Any, stage: Stage, root: Path, **resources: Any) -> TrainJob:
    root.mkdir(parents=True, exist_ok=True)
    return TrainJob(
        stage=stage,
        data=bench.data,
        init=bench.init,
        resources=bench.resources.with_changes({"storage.store": str(root), **resources}),
        context=NO_CONTEXT,
        attempt=str(root),
        resume=str(root / "resume"),
        run_id=None,
        fresh_projector=False,
    )


def accumulator_of(job: TrainJob) -> LossAccumulator:
    model = model_folder.load(content(job.init))
    batches = BatchBuilder(job, model, device=CPU)
    return LossAccumulator(job, model, batches, ["definitions", "documents", "pairs"])


def sample(source: str, targets: list[bool]) -> Sample:
    about = dict.fromkeys(("object", "category", "text", "licence", "provenance"), "")
    return Sample(id="1", source=source, input_ids=[7] * len(targets), is_target=targets, images=(), **about)


def test_a_sources_loss_is_the_mean_over_its_own_targets(bench: Any, stage: Stage, tmp_path: Path) -> None:
    first = pack([sample("pairs", [False, True, True]), sample("documents", [False, False, True])], capacity=8)
    second = pack([sample("definitions", [True, False]), sample("pairs", [False, True])], capacity=8)
    each = torch.tensor([1.0, 2.0, 6.0, 6.0])  # pairs, pairs, documents; pairs: first tokens are not predicted
    accumulator = accumulator_of(job_of(bench, stage, tmp_path))
    accumulator.add([first], each[:3].sum() / 4, each[:3])
    accumulator.add([second], each[3:].sum() / 4, each[3:])
    seen = accumulator.reduce()._replace(wait_seconds=0)
    assert seen == StepMetrics(15 / 4, {"documents": 6.0, "pairs": 3.0}, 4, 10, 16, 0, 0)
    accumulator.add([first], each[:3].sum(), each[:3])
    assert accumulator.reduce()._replace(wait_seconds=0) == StepMetrics(
        9.0, {"documents": 6.0, "pairs": 1.5}, 3, 6, 8, 0, 0
    )


def test_a_frozen_tower_counts_where_it_ran(bench: Any, stage: Stage, tmp_path: Path) -> None:
    job = job_of(bench, stage, tmp_path, **{"train.accelerator": CARD})
    accumulator = accumulator_of(job)
    table = read_index(content(bench.data)).to_pylist()
    chosen = [row for row in table if row["source"] == "pairs"][:3]
    samples = [read_sample(content(bench.data), **{k: row[k] for k in ("shard", "offset", "key")}) for row in chosen]
    images = [image for one in samples for image in one.images]
    assert len(set(images)) == len(images) == 3
    row = pack(samples, capacity=384)
    lengths, targets = [len(one.input_ids) for one in samples], sum(row["num_targets"] for row in chosen)
    shapes, each = shapes_of(accumulator.batch_builder.feature_cache.model.config), torch.zeros(targets)
    for cached in (False, True):
        accumulator.batch_builder([row])
        accumulator.add([row], each.sum(), each)
        expected = training_flops(shapes, stage, segments=lengths, images=3, targets=targets, features_cached=cached)
        assert accumulator.reduce().flops == pytest.approx(expected)


@pytest.fixture(scope="module")
def resources(bench: Any, tmp_path_factory: pytest.TempPathFactory, empty_database: Path) -> Resources:
    root = tmp_path_factory.mktemp("metered")
    shutil.copyfile(empty_database, root / "mlflow.db")
    places = {"storage.store": f"{root}/store", "tracking.uri": f"sqlite:///{root}/mlflow.db"}
    return bench.resources.with_changes({**places, "train.accelerator": CARD, "train.micro_batch_size": 2})


Histories = dict[str, dict[int, float]]


def histories(resources: Resources, run_id: str) -> Histories:
    """Return every metric of a run by name and step."""
    client = MlflowClient(resources.tracking.uri)
    names = client.get_run(run_id).data.metrics
    return {name: {one.step: one.value for one in client.get_metric_history(run_id, name)} for name in names}


@pytest.fixture(scope="module")
def metered(bench: Any, stage: Stage, resources: Resources) -> tuple[Histories, Any, float]:
    """The metrics of a stage in MLflow, its run, and the seconds that the stage took."""
    began = time.monotonic()
    train_stage(stage, bench.model, bench.data, bench.init, resources)
    seconds = time.monotonic() - began
    client = MlflowClient(resources.tracking.uri)
    (run,) = client.search_runs([client.get_experiment_by_name("vila").experiment_id])
    return histories(resources, run.info.run_id), run, seconds


@pytest.fixture(scope="module")
def row_loader(bench: Any, stage: Stage, resources: Resources) -> RowLoader:
    cache = resources.storage.scratch() / "plans"
    return RowLoader(opened(bench.data).file, digest=bench.data.digest, stage=stage, cache=cache)


@pytest.fixture(scope="module")
def steps(stage: Stage, row_loader: RowLoader) -> list[list[PackedRow]]:
    """The rows of each step."""
    return [row_loader.batch(step)[0] for step in range(stage.num_steps or 0)]


def images_of(rows: list[PackedRow]) -> set[bytes]:
    return {image for row in rows for image in row.images}


@pytest.mark.slow
def test_the_sources_losses_weighted_by_their_targets_are_the_loss_of_the_step(
    bench: Any, metered: tuple[Histories, Any, float], steps: list[list[PackedRow]]
) -> None:
    metrics, *_ = metered
    source_of = {row["key"]: row["source"] for row in read_index(content(bench.data)).to_pylist()}
    source_losses = 0
    for step, rows in enumerate(steps, start=1):
        targets: dict[str, int] = {}
        for row in rows:
            for segment, key in enumerate(row.keys, start=1):
                number = int((row.labels[row.segment_ids == segment] >= 0).sum())
                targets[source_of[key]] = targets.get(source_of[key], 0) + number
        own = {name: metrics[f"loss/{name}"][step] for name in source_of.values() if step in metrics[f"loss/{name}"]}
        assert own.keys() == targets.keys()
        source_losses += len(own)
        mean = sum(own[name] * number for name, number in targets.items()) / sum(targets.values())
        assert mean == pytest.approx(metrics["loss"][step], rel=1e-6)
    assert source_losses > len(steps), "no step has two sources"
    assert metrics["validation_loss"].keys() == {4, 6}
    validated = [name for name in metrics if name.startswith("validation_loss/")]
    assert all(
        low <= metrics["validation_loss"][step] * (1 + 1e-6) and metrics["validation_loss"][step] <= high * (1 + 1e-6)
        for step in (4, 6)
        for low, high in [
            (min(metrics[name][step] for name in validated), max(metrics[name][step] for name in validated))
        ]
    )


def test_speed_padding_mfu_rates_and_cost_are_those_of_the_rows_and_the_clock(
    bench: Any,
    stage: Stage,
    metered: tuple[Histories, Any, float],
    row_loader: RowLoader,
    steps: list[list[PackedRow]],
) -> None:
    metrics, _, seconds = metered
    shapes = shapes_of(model_folder.load(content(bench.init)).config)
    on_image = {"segments": [], "images": 1, "targets": 0}
    tower = training_flops(shapes, stage, **on_image, features_cached=False) - training_flops(
        shapes, stage, **on_image, features_cached=True
    )
    through_the_tower = 0
    for step, rows in enumerate(steps, start=1):
        tokens = sum(int(np.count_nonzero(row.segment_ids)) for row in rows)
        targets = sum(int((row.labels >= 0).sum()) for row in rows)
        took = metrics["seconds_per_step"][step]
        assert metrics["train/tokens_per_s"][step] * took == pytest.approx(tokens)
        assert metrics["train/target_tokens_per_s"][step] * took == pytest.approx(targets)
        assert metrics["train/padding_fraction"][step] == pytest.approx(1 - tokens / (4 * 128))
        without_tower = sum(
            training_flops(
                shapes, stage, segments=np.bincount(row.segment_ids)[1:].tolist(), images=len(row.images),
                targets=int((row.labels >= 0).sum()), features_cached=True,
            )
            for row in rows
        )  # fmt: skip
        images = (metrics["train/mfu"][step] * took * PEAK * 1e12 - without_tower) / tower
        assert images == pytest.approx(round(images), abs=1e-3)
        through_the_tower += round(images)
        for part in stage.trainable:
            rate = stage.peak_rate(part) * lr_multiplier(step - 1, stage, num_steps=6)
            assert metrics[f"learning_rate/{part}"][step] == pytest.approx(rate)
        assert 0 < metrics["data/wait_fraction"][step] < 1
        assert metrics["memory/peak_rss_gib"][step] > 0.1
    # Those of the first step are computed before it, to fit the fresh projector, and then those of the validation.
    before = images_of(steps[0]) | images_of(row_loader.read(row_loader.held_out().rows))
    assert through_the_tower == len(set().union(*map(images_of, steps)) - before), "once each"
    assert sum(metrics["seconds_per_step"].values()) <= metrics["train/cost"][6] * 3600 / PRICE <= seconds
    stalls = [metrics["ckpt/stall_s"][step] for step in range(1, 7)]
    assert [stall > 0 for stall in stalls] == [False, False, True, False, True, False]  # saved after 2 and 4


def test_the_stages_run_names_its_data_and_its_machine(bench: Any, metered: tuple[Histories, Any, float]) -> None:
    metrics, run, _ = metered
    (dataset_input,) = run.inputs.dataset_inputs
    assert (dataset_input.dataset.name, dataset_input.dataset.digest) == (bench.mixture.name, bench.data.digest[:36])
    assert run.data.tags["data"] == bench.data.digest
    assert run.info.status == "FINISHED"
    assert all(0 <= value <= 100 for value in metrics["system/cpu_utilization_percentage"].values())


@pytest.mark.slow
def test_two_ranks_tell_what_one_process_tells(
    bench: Any, stage: Stage, resources: Resources, metered: tuple[Histories, Any, float], tmp_path: Path
) -> None:
    train = {"num_workers": 2, "micro_batch_size": 1, "zero_stage": 1, "accelerator": CARD, "profile_steps": 2}
    own = {"launch": "ray", "ray_address": "127.0.0.1:1", **{f"train.{key}": value for key, value in train.items()}}
    job = job_of(bench, stage, tmp_path / "store", **own, **{"tracking.uri": resources.tracking.uri})
    run_id = tracking.start_run(job.resources, "two", parent=None, params={}, tags={})
    job = TrainJob.model_validate({**job.model_dump(), "run_id": run_id, "fresh_projector": True})
    (tmp_path / "job.json").write_text(job.model_dump_json())
    with ranks(ROOT / "tests/train/one_rank.py", tmp_path / "job.json") as both:
        assert [rank.wait() for rank in both] == [0, 0]
    assert run_id is not None
    alone, together = metered[0], histories(resources, run_id)
    same = [name for name in alone if name.partition("/")[0] in ("loss", "validation_loss", "learning_rate")]
    assert {"loss", "loss/documents", "validation_loss", "learning_rate/projector"} < set(same)
    for name in [*same, "train/padding_fraction"]:
        assert together[name] == pytest.approx(alone[name], abs=1e-5), name
    for step, took in together["seconds_per_step"].items():
        for name in ("train/tokens_per_s", "train/target_tokens_per_s"):
            assert together[name][step] * took == pytest.approx(alone[name][step] * alone["seconds_per_step"][step])
        counted = [of["train/mfu"][step] * of["seconds_per_step"][step] for of in (together, alone)]
        assert counted[0] * 2 == pytest.approx(counted[1], rel=0.05)  # two accelerators; each has its own tower
    (profile,) = job.diagnostics().glob("profile-*.txt")
    assert float(profile.read_text().partition("communication")[2].split()[0]) > 0
    assert profile.name in [file.path for file in MlflowClient(resources.tracking.uri).list_artifacts(run_id)]


def count_all(metrics_logger: MetricsLogger, num_steps: int) -> None:
    for step in range(1, num_steps + 1):
        metrics_logger.log_step(
            step, StepMetrics(2.5, {}, 10, 30, 40, 1e9, 0.0, 1.0), lr_multiplier=1.0, stall_seconds=0.0
        )


def test_a_log_says_how_far_a_stage_is(
    bench: Any, stage: Stage, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    job = job_of(bench, stage, tmp_path, **{"train.accelerator": CARD})
    caplog.set_level(logging.INFO)
    count_all(MetricsLogger(job, MetricLog(job.resources, None), CPU, step=0, num_steps=39), 39)
    lines = [record.message for record in caplog.records if record.name == "vila_ops.progress"]
    assert lines[0].startswith("align step 1/39  loss 2.500  ")
    assert "tokens/s  75 % useful  MFU " in lines[0]
    assert lines[-1].endswith("0:00 left")
