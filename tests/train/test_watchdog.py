"""Hung steps end with stacks, steps with a loss that is not finite name their samples, and spikes are recorded."""

import hashlib
import json
import logging
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import zlib
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
import yaml
from mlflow import MlflowClient
from typer.testing import CliRunner

from tests.forks import Fork, ranks
from vila_ops import tracking
from vila_ops.artifacts.kinds import Checkpoint, Dataset
from vila_ops.artifacts.store import content
from vila_ops.cli import app
from vila_ops.config import NO_CONTEXT, Run, load
from vila_ops.data.loading.packing import pack
from vila_ops.data.preprocess.prepare import prepare
from vila_ops.data.shards import read_index, samples_of
from vila_ops.errors import NonFiniteLoss
from vila_ops.model.assemble import assemble
from vila_ops.model.features import SUFFIX
from vila_ops.train.bad_samples import LEAST, BadSampleFinder, is_spike, sum_by_sample
from vila_ops.train.job import HUNG, BadSampleReport, RankInfo, TrainJob
from vila_ops.train.loop import load as load_stage
from vila_ops.train.loop import train
from vila_ops.train.objective import Objective
from vila_ops.train.watchdog import StepWatchdog

ROOT = Path(__file__).parents[2]
TINY = ROOT / "configs/recipes/tiny.yaml"
TWO = {"launch": "ray", "ray_address": "127.0.0.1:1", "train.num_workers": 2, "train.zero_stage": 2}
"""Resources of two ranks, which the test starts itself, without Ray."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    root = tmp_path_factory.mktemp("watch")
    places = [f"resources.storage.{name}={root / name}" for name in ("store", "cache", "data")]
    overrides = (*places, "resources.storage.features_leave_free=0")
    return load(TINY, resources=ROOT / "configs/resources/inline.yaml", overrides=overrides)


def job_of(run: Run, name: str, *, stage: dict[str, Any] | None = None, **resources: Any) -> TrainJob:
    """Return a job for the stage `pretrain`, whose packed rows have captions and documents, in a separate store."""
    folder = Path(run.resources.storage.store).parent / name
    (folder / "attempt").mkdir(parents=True)
    chosen = run.recipe.stages["pretrain"]
    return TrainJob(
        stage=chosen.model_validate({**chosen.model_dump(), **(stage or {})}),
        data=prepare(chosen.mixture, run.recipe.text(), run.resources),
        init=assemble(run.recipe.model, run.resources),
        resources=run.resources.with_changes({"storage.store": str(folder / "store"), **resources}),
        context=NO_CONTEXT,
        attempt=str(folder / "attempt"),
        resume=str(folder / "resume"),
        run_id=None,
        fresh_projector=True,
    )


def start(job: TrainJob, *script: str) -> AbstractContextManager[list[Fork]]:
    """Start two ranks in a process group, by default of one_rank.py. Their logs are beside the attempt."""
    name, *arguments = script or ("one_rank.py",)
    folder = Path(job.attempt).parent
    (folder / "job.json").write_text(job.model_dump_json())
    return ranks(Path(__file__).parent / name, *arguments, folder / "job.json", logs=folder)


def wait_for(is_so: Any, *, seconds: float = 1200) -> None:
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.slow
def test_hung_ranks_end_with_their_stacks_and_the_next_try_walks_the_same_curve(run: Run) -> None:
    """First a rank is suspended, then a rank sleeps. After both, the step can be tried again."""
    plain = job_of(run, "plain")
    train(plain, RankInfo())
    patient = job_of(run, "hung", **TWO)
    job = patient.with_changes({"resources.train.watchdog": {"factor": 1.0, "at_least_seconds": 20.0}})
    folder = job.diagnostics()

    with start(job, "hung_rank.py", "suspended") as both:
        assert both[0].wait() == HUNG
        status = json.loads((folder / "rank-001.heartbeat.json").read_text())
        assert status["pid"] == both[1].pid
        assert not (folder / "rank-001.stacks").exists(), "it was stopped, so it did not see itself hang"
        os.kill(both[1].pid, signal.SIGCONT)
        assert both[1].wait() != 0
    first = (folder / "rank-000.stacks").read_text()
    assert re.search(r"rank 0 of 2 hangs in phase (train|save|validate) after step \d+", first)
    seconds = re.search(r"no heartbeat for (\d+) s, the limit is 20 s", first)
    assert seconds, first
    assert 20 <= int(seconds[1]) < 20 + 2 * 2, "a look a second, of which no more than two seconds count"
    assert re.search(r"line \d+ in (_sum|step|backward|_barrier|all_reduce|barrier)\n", first), first
    with start(job, "hung_rank.py", "sleeps") as both:
        assert [rank.wait() for rank in both] == [HUNG, HUNG]
    stacks = [(folder / f"rank-00{rank}.stacks").read_text() for rank in range(2)]
    assert "rank 1 of 2 hangs in phase train after step" in stacks[1]
    assert "in sleeps_for_ever" in stacks[1]
    assert "in sleeps_for_ever" not in stacks[0]
    assert stacks[0] != first, "of a step that hung before"
    keys = {row["key"] for row in read_index(content(job.data)).to_pylist()}
    for text in stacks:
        assert any(key in text.partition("Its samples: ")[2].partition("\n")[0] for key in keys)

    with start(patient) as both:
        assert [rank.wait() for rank in both] == [0, 0]
    assert not list(folder.glob("rank-*.heartbeat.json")), "nobody lives"
    one, two = (json.loads((Path(own.attempt) / "curve.json").read_text()) for own in (plain, job))
    losses = [[float.fromhex(row["loss"]) for row in curve[1:]] for curve in (one, two)]
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)


@pytest.mark.slow
def test_a_hung_process_ends_where_its_stacks_cannot_be_written(run: Run) -> None:
    job = job_of(run, "full", **{"train.watchdog": {"factor": 1.0, "at_least_seconds": 0.5}})
    (job.diagnostics() / "rank-000.stacks").mkdir(parents=True)
    script = (
        "import sys, time; from vila_ops.train import watchdog as w\n"
        "from vila_ops.train.job import TrainJob, RankInfo\n"
        "w.TICK_SECONDS = 0.1\n"
        "with w.StepWatchdog(TrainJob.model_validate_json(sys.argv[1]), RankInfo()) as watchdog:\n"
        "    watchdog.heartbeat(0, 'train')\n"
        "    end = time.monotonic() + 1.5  # as a step that compares many shards with their sha256\n"
        "    while time.monotonic() < end: watchdog.alive()\n"
        "    print('alive', flush=True); time.sleep(600)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, job.model_dump_json()], capture_output=True, text=True, timeout=1200, check=False
    )
    assert (done.returncode, done.stdout) == (HUNG, "alive\n")
    assert "hangs in phase train after step 0" in done.stderr
    assert "Is a directory" in done.stderr


@pytest.mark.slow
def test_a_process_that_was_stopped_and_a_phase_without_bound_are_not_ended(run: Run) -> None:
    """A separate process suspends itself. Both the load phase and the suspension last longer than the limit.

    It ends after two more looks of the watchdog, the first of which would have ended it.
    """
    job = job_of(run, "alone", **{"train.watchdog": {"factor": 1.0, "at_least_seconds": 3.0}})
    script = (
        "import json, os, signal, sys, time; from pathlib import Path; from vila_ops.train import watchdog as w\n"
        "from vila_ops.train.job import TrainJob, RankInfo\n"
        "w.TICK_SECONDS = 0.2\n"
        "status = lambda: json.loads(Path(sys.argv[2]).read_text())\n"
        "with w.StepWatchdog(TrainJob.model_validate_json(sys.argv[1]), RankInfo()) as watchdog:\n"
        "    time.sleep(4)\n"
        "    watchdog.heartbeat(0, 'train')\n"
        "    while status()['phase'] != 'train': time.sleep(0.02)\n"
        "    os.kill(os.getpid(), signal.SIGSTOP)\n"
        "    looks = {status()['time']}\n"
        "    while len(looks) < 3: looks.add(status()['time']); time.sleep(0.02)\n"
        "print('ended', flush=True)"
    )
    command = [sys.executable, "-c", script, job.model_dump_json(), str(job.diagnostics() / "rank-000.heartbeat.json")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        wait_for(lambda: psutil.Process(process.pid).status() in (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE))
        time.sleep(4)
        process.send_signal(signal.SIGCONT)
        assert process.communicate(timeout=1200) == ("ended\n", None)
    assert process.returncode == 0


def test_the_loss_of_each_sample_is_what_it_is_alone(run: Run) -> None:
    """Compares the losses of samples in packed rows with the model's loss on each sample alone."""
    job = job_of(run, "alone-losses")
    model, rows, batches = load_stage(job)
    objective = Objective(model)
    own, _ = rows.batch(0)
    own += rows.batch(1)[0]
    assert max(len(row.keys) for row in own) > 1
    with torch.no_grad():
        _, each = objective(batches(own))
    sums, targets = sum_by_sample(own, each)
    assert [key for row in own for key in row.keys] == [
        key for step in (0, 1) for row in rows.keys(step) for key in row
    ]
    index = {row["key"]: row for row in read_index(content(job.data)).to_pylist()}
    for number, key in enumerate(key for row in own for key in row.keys):
        (sample,) = samples_of(job.data, [index[key]])
        with torch.no_grad():
            alone, _ = objective(batches([pack([sample], capacity=len(sample.input_ids))]))
        assert targets[number] == index[key]["num_targets"]
        assert sums[number] == pytest.approx(float(alone), rel=1e-4)


def poison(job: TrainJob, image: bytes, value: float) -> Path:
    """Replace the features of an image in the cache, so that no later step computes them."""
    sha256 = hashlib.sha256(image).hexdigest()
    (known, *_) = job.feature_cache().glob(f"*/*/*{SUFFIX}")
    path = known.parents[1] / sha256[:2] / f"{sha256}{SUFFIX}"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(filled(known, value))
    return path


def filled(known: Path, value: float) -> bytes:
    """Return the bytes of a feature file in which all values are `value`, with the shape of another file."""
    dtype = torch.bfloat16 if known.parents[1].name.endswith("-bf16") else torch.float32
    values = torch.full(((known.stat().st_size - 4) // dtype.itemsize,), value, dtype=dtype)
    raw = values.view(torch.uint8).numpy().tobytes()
    return raw + zlib.crc32(raw).to_bytes(4, "little")


@pytest.mark.slow
def test_a_broken_sample_is_named_and_the_command_of_the_message_trains_without_it(
    tmp_path: Path, empty_database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    shutil.copyfile(empty_database, tmp_path / "mlflow.db")
    recipe, resources = tmp_path / "own.yaml", tmp_path / "resources.yaml"
    recipe.write_text(TINY.read_text().replace("../services/default.yaml", str(ROOT / "configs/services/default.yaml")))
    storage = {name: str(tmp_path / name) for name in ("store", "cache", "data")} | {"features_leave_free": 0}
    database = f"sqlite:///{tmp_path}/mlflow.db"
    resources.write_text(yaml.safe_dump({"launch": "inline", "tracking": {"uri": database}, "storage": storage}))
    small = ("-s", "stages.align.pack=false", "-s", "stages.align.global_batch_size=3")
    command = ["train", str(recipe), "--stage", "align", "-r", str(resources), *small]
    run = load(recipe, resources=resources, overrides=small[1::2])
    stage = run.recipe.stages["align"]
    assert CliRunner().invoke(app, [*command, "-s", "stages.align.num_steps=1"]).exit_code == 0
    data = prepare(stage.mixture, run.recipe.text("align"), run.resources)
    job = job_of(
        load(recipe, resources=resources, overrides=(f"resources.storage.store={tmp_path}/other/store",)), "none"
    )
    step = 4
    rows = load_stage(TrainJob.model_validate({**job.model_dump(), "stage": stage, "data": data}))[1]
    keys = [key for row in rows.keys(step) for key in row]
    before = {key for other in range(step) for row in rows.keys(other) for key in row}
    assert keys[1] not in before
    row = next(row for row in read_index(content(data)).to_pylist() if row["key"] == keys[1])
    (sample,) = samples_of(data, [row])
    inline = TrainJob.model_validate({**job.model_dump(), "resources": run.resources})
    poison(inline, sample.images[0], float("nan"))

    failed = CliRunner().invoke(app, command)
    assert isinstance(failed.exception, NonFiniteLoss)
    message = str(failed.exception)
    assert f"align: loss nan at step {step + 1}; nothing was updated" in message
    assert f"1 of the 3 samples of the step have such a loss: pairs {row['id']!r} ({row['key']});" in message
    paste = shlex.split(message.partition("To train without their records: ")[2])
    stopped = BadSampleReport.model_validate_json(Path(paste[-1]).read_text())
    assert [(one.source, one.id, one.key) for one in stopped.samples] == [("pairs", row["id"], row["key"])]
    assert stopped.data == data.digest
    client = MlflowClient(database)
    (experiment,) = (one for one in client.search_experiments() if one.name == tracking.EXPERIMENT)
    runs = client.search_runs([experiment.experiment_id], "attributes.status = 'FAILED'")
    assert Path(paste[-1]).name in [file.path for one in runs for file in client.list_artifacts(one.info.run_id)]

    assert paste[0] == "vila-ops"
    pasted = CliRunner().invoke(app, [*paste[1:], "--json"])
    assert pasted.exit_code == 0, pasted.exception
    made = Dataset.model_validate_json(pasted.stdout)
    assert made.num_samples == data.num_samples - 1
    fixed = CliRunner().invoke(app, [*command, "--json"])
    assert fixed.exit_code == 0, fixed.exception
    assert Checkpoint.model_validate_json(fixed.stdout).parents[0] == made.digest


@pytest.mark.slow
def test_two_ranks_name_the_samples_of_both(run: Run) -> None:
    """The features of one image are broken. Both ranks stop, and name its sample among those of the global batch."""
    job = job_of(run, "broken", **TWO)
    job = TrainJob.model_validate({**job.model_dump(), "fresh_projector": False})
    _, rows, batches = load_stage(job)
    steps = [rows.batch(step)[0] for step in range(rows.num_steps())]
    known = {image for row in steps[0] for image in row.images}
    step, row, image = next(
        (n, row, image)
        for n, own in enumerate(steps)
        for row in own
        for image in row.images
        if image not in known and sum(image in other.images for other in own) == 1
    )
    batches.feature_cache(list(known))
    poison(job, image, float("inf"))
    with start(job) as both:
        assert all(rank.wait() != 0 for rank in both)
    errors = [(Path(job.attempt).parent / rank).read_text() for rank in "01"]
    size = sum(len(other.keys) for other in steps[step])
    broken = [key for key, other in zip(row.keys_of_images(), row.images, strict=True) if other == image]
    assert len(broken) == 1
    assert len(row.keys) > 1
    for text in errors:
        assert f"pretrain: loss nan at step {step + 1}; nothing was updated. 1 of the {size} samples" in text
    named = BadSampleReport.model_validate_json(
        (job.diagnostics() / f"bad-samples-step-{step + 1:06d}.json").read_text()
    ).samples
    index = {row["key"]: row for row in read_index(content(job.data)).to_pylist()}
    assert [one.key for one in named] == broken
    assert [(one.source, one.id) for one in named] == [(index[key]["source"], index[key]["id"]) for key in broken]
    assert all(int(path.name.removeprefix("step-")) <= step for path in Path(job.resume).glob("step-*"))


def trained_on_text(steps: int, *, seed: int, noise: set[int], size: int = 64) -> list[float]:
    """Return the losses of a small model on the committed texts. The targets of the steps in `noise` are random."""
    text = b"".join(sorted(path.read_bytes() for path in (ROOT / "tests/tiny").glob("*/records.jsonl")))
    data = torch.tensor(list(text))
    torch.manual_seed(seed)
    model = torch.nn.Sequential(
        torch.nn.Embedding(256, 16), torch.nn.Flatten(), torch.nn.Linear(64, 64), torch.nn.ReLU(),
        torch.nn.Linear(64, 256),
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 100))
    curve = []
    for step in range(steps):
        at = torch.randint(0, len(data) - 5, (size,))
        labels = torch.randint(0, 256, (size,)) if step in noise else data[at + 4]
        loss = torch.nn.functional.cross_entropy(model(torch.stack([data[at + k] for k in range(4)], 1)), labels)
        curve.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    return curve


def spikes(curve: list[float]) -> list[int]:
    return [step for step in range(len(curve)) if is_spike(curve[step], curve[max(0, step - 128) : step])]


@pytest.mark.slow
@pytest.mark.parametrize("size", [16, 256])
def test_planted_spikes_are_found_in_a_real_curve_and_nothing_else_is(size: int) -> None:
    """With a noisy and with a smooth curve, from the first step of the warm-up on."""
    planted = {300, 400, 401, 600}
    assert spikes(trained_on_text(700, seed=2, noise=planted, size=size)) == sorted(planted)


def test_what_counts_as_a_spike_by_hand() -> None:
    """Median 2, MAD 0.1: seven deviations are 7 * 1.4826 * 0.1."""
    before = [1.9, 2.0, 2.1, 2.0] * 8 + [1.9, 2.1] * 16
    assert not is_spike(2 + 7 * 0.14825, before)
    assert is_spike(2 + 7 * 0.14827, before)
    assert not is_spike(0.1, before)
    assert not is_spike(100.0, before[: LEAST - 1])
    assert not is_spike(2.13, [2.0] * 64), "a loss that hardly moves"
    assert is_spike(2.15, [2.0] * 64)


@pytest.mark.slow
def test_a_spike_is_written_down_once_with_its_worst_samples_and_training_goes_on(
    run: Run, tmp_path: Path, empty_database: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copyfile(empty_database, tmp_path / "mlflow.db")
    database = f"sqlite:///{tmp_path}/mlflow.db"
    job = job_of(run, "spike", **{"tracking.uri": database})
    run_id = tracking.start_run(job.resources, "spike", parent=None, params={}, tags={})
    job = TrainJob.model_validate({**job.model_dump(), "run_id": run_id})
    model, rows, batches = load_stage(job)
    objective = Objective(model)
    curve = [{"step": step, "loss": 1.0 + step % 5 / 100} for step in range(1, 41)]
    metrics = tracking.MetricLog(job.resources, job.run_id)
    with StepWatchdog(job, RankInfo()) as watchdog, metrics, caplog.at_level(logging.WARNING), torch.no_grad():
        bad_samples = BadSampleFinder(job, watchdog, rows, curve, metrics)
        for step, loss in ((1, 1.02), (2, 5.0), (3, 5.1), (4, 1.01), (5, 6.0)):
            own, _ = rows.batch(step - 1)
            bad_samples.begin_step()
            for row in own:
                bad_samples.add([row], objective(batches([row]))[1])
            bad_samples.check_spike(step, loss)
        own, _ = rows.batch(1)
        sums, targets = sum_by_sample(own, objective(batches(own))[1])
    records = [json.loads(line) for line in (job.diagnostics() / "loss-spikes.jsonl").read_text().splitlines()]
    assert [(one["step"], one["loss"]) for one in records] == [(2, 5.0), (5, 6.0)], "5.1 is of the spike before it"
    first = records[0]
    assert first["median"] == pytest.approx(1.02)
    keys = [key for row in own for key in row.keys]
    worst = sorted(zip((sums / targets).tolist(), keys, strict=True), reverse=True)[:10]  # a sample may be there twice
    assert sorted(one["key"] for one in first["samples"]) == sorted(key for _, key in worst)
    assert [one["loss"] for one in first["samples"]] == pytest.approx([loss for loss, _ in worst], rel=1e-4)
    assert all(one["source"] and one["id"] for one in first["samples"])
    lines = [one for one in caplog.messages if "loss spike" in one]
    assert len(lines) == 2
    assert (
        f"loss spike: 5.000 at step 2, the median before it is 1.020; its sample with the highest loss, "
        f"{first['samples'][0]['loss']:.3f}, is {first['samples'][0]['source']}" in lines[0]
    )
    client = MlflowClient(database)
    assert [one.step for one in client.get_metric_history(run_id, "loss_spike")] == [2, 5]
    assert [file.path for file in client.list_artifacts(run_id)] == ["loss-spikes.jsonl"]


def on_ray(folder: Path, address: str, *more: str) -> subprocess.Popen[str]:
    """Start `vila-ops train` for the first stage of the tiny recipe with two workers, in a separate folder."""
    resources = folder / "resources.yaml"
    storage = {name: str(folder / name) for name in ("store", "cache", "data")} | {"features_leave_free": 0}
    train = {"num_workers": 2, "zero_stage": 2, "max_failures": 50}
    settings = {"launch": "ray", "ray_address": address, "storage": storage, "train": train}
    resources.write_text(yaml.safe_dump(settings))
    command = [str(Path(sys.executable).parent / "vila-ops"), "train", str(TINY), "--stage", "align", "--json"]
    command += ["-r", str(resources), *more]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.skipif("VILA_KILLS_RAY" not in os.environ, reason="minutes: VILA_KILLS_RAY asks for it")
def test_ray_tries_a_hung_step_again_and_a_loss_that_is_no_number_not(ray_cluster: str, tmp_path: Path) -> None:
    """One of two workers is suspended and the stage still ends. Then all features are broken, and it fails at once.

    Fifty restarts are allowed, so a retried failure would exceed the timeout of this test.
    """
    bound = ("-s", "resources.train.watchdog.at_least_seconds=8", "-s", "resources.train.watchdog.factor=1")
    with on_ray(tmp_path, ray_cluster, *bound, "-s", "stages.align.num_steps=40") as training:
        wait_for(lambda: list(tmp_path.glob("store/resume/*/step-000004")))
        (heartbeat,) = tmp_path.glob("store/diagnostics/*/rank-001.heartbeat.json")
        os.kill(json.loads(heartbeat.read_text())["pid"], signal.SIGSTOP)
        errors = training.communicate(timeout=400)[1]
    assert training.returncode == 0, errors
    assert "rank 0 of 2 hangs" in errors
    assert list(tmp_path.glob("store/diagnostics/*/rank-000.stacks"))
    assert not list(tmp_path.glob("store/diagnostics/*/rank-*.heartbeat.json"))

    for path in tmp_path.glob(f"store/features/*/*/*{SUFFIX}"):
        path.write_bytes(filled(path, np.inf))
    with on_ray(tmp_path, ray_cluster, "-s", "stages.align.seed=1") as training:
        errors = training.communicate(timeout=400)[1]
    assert training.returncode == 1
    (error,) = re.findall(r"^error: (.*)$", errors, re.MULTILINE)
    assert re.match(r"align: loss nan at step 1; nothing was updated\. All \d+ samples of the step have such", error)
    assert "vila-ops data quarantine" in error
    assert not list(tmp_path.glob("store/checkpoint/*/attempt-*-failed*"))
