"""What a stage needs is away while it trains: MLflow, its store on S3, or free space. It ends as if undisturbed.

An outage begins before one step of the stage and ends before a later one, and the steps in it are spread over it. So
the stage trains all the time, and an outage of ten minutes takes hardly any CPU.

VILA_OUTAGE_MLFLOW and VILA_OUTAGE_S3 have the seconds of an outage (2; `make faults`: ten and five minutes). Where they
are set, the waits of our clients are those of every day; else they are shortened as the outage is.
tests/flows/full_pipeline/test_outages.py has the outage of Prefect.
"""

import contextlib
import functools
import logging
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from botocore.retries.standard import ExponentialBackoff
from mlflow import MlflowClient

from flows.tasks import DELAYS
from tests.s3_servers import Fault, Proxy
from tests.told_once import check_told_once
from tests.tracking.live import Server, kept, tracked, until
from vila_ops import tracking
from vila_ops.artifacts.attempts import unsealed
from vila_ops.artifacts.kinds import Checkpoint
from vila_ops.artifacts.leases import Pace, hold, registers
from vila_ops.artifacts.store import verify
from vila_ops.config.local import LocalServers
from vila_ops.errors import DiskFault, StoreUnreachable, VilaError, is_final
from vila_ops.local import servers
from vila_ops.tracking import outbox
from vila_ops.train import loop
from vila_ops.train import stage as task
from vila_ops.train.checkpoint.unfinished import resume_folders
from vila_ops.train.curve import curve_of
from vila_ops.train.verify_resume import ResumeTrial

MLFLOW, S3 = "VILA_OUTAGE_MLFLOW", "VILA_OUTAGE_S3"
SECONDS = {name: float(os.environ.get(name, "2")) for name in (MLFLOW, S3)}
DISK_BYTES = 50_000_000
STEPS, FIRST, LAST = 9, 3, 7
"""How many steps the stage has, and the steps done when the outage begins and when it ends."""
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800 + 3 * max(SECONDS.values()))]


@dataclass
class Outage:
    """An outage, over which some steps of a stage are spread."""

    seconds: float
    begin: Callable[[], None]
    end: Callable[[], None]
    over_at: float | None = None
    """When it has lasted that long, of time.monotonic()."""
    steps: set[int] = field(default_factory=set)
    """Those that the stage has begun; it may do one again."""

    def before(self, step: int) -> None:
        """What happens before a step of the stage, counted from 0."""
        if step not in self.steps:
            self.steps.add(step)
            if step == FIRST:
                self.begin()
                self.over_at = time.monotonic() + self.seconds
            if FIRST <= step < LAST:
                time.sleep(self.seconds / (LAST - FIRST))
            if step == LAST:
                self.end()


@pytest.fixture
def happens(monkeypatch: pytest.MonkeyPatch) -> Callable[[Outage], None]:
    """Makes an outage happen to the stages of this test."""

    def to_stages(outage: Outage) -> None:
        honest = loop.accumulate_gradients

        def accumulate_gradients(*given: Any, step: int, **more: Any) -> None:
            outage.before(step)
            honest(*given, step=step, **more)

        monkeypatch.setattr(loop, "accumulate_gradients", accumulate_gradients)

    return to_stages


@pytest.fixture(scope="module")
def undisturbed(make_trial: Callable[..., ResumeTrial], tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return make_trial(tmp_path_factory.mktemp("undisturbed"), num_steps=STEPS).train()


def trained(trial: ResumeTrial, *, pauses: tuple[float, ...], over: Callable[[], None]) -> tuple[Checkpoint, VilaError]:
    """The model of the first try that succeeds, and the error of the first. `over` is called before each other try."""
    errors: list[VilaError] = []
    for pause in (*pauses, None):
        try:
            return trial.train(), errors[0]
        except VilaError as error:
            if pause is None or is_final(error):
                raise
            errors.append(error)
            time.sleep(pause)
            over()
    raise AssertionError


def check(checkpoint: Checkpoint, undisturbed: Checkpoint, store: str) -> None:
    """Check that the store has what an undisturbed stage makes, whole, and that nobody holds it."""
    assert checkpoint.digest == undisturbed.digest
    assert curve_of(checkpoint) == curve_of(undisturbed)
    verify(checkpoint)
    assert resume_folders(store) == []
    assert not any(registers(store, kind="checkpoint").values())


def first_steps(trial: ResumeTrial) -> list[int]:
    """The steps with which tries began to train."""
    first: dict[str, int] = {}
    for read in trial.samples():
        first[read.attempt] = min(read.step, first.get(read.attempt, read.step))
    return sorted(first.values())


@pytest.fixture(scope="module")
def one_server(
    tmp_path_factory: pytest.TempPathFactory, free_servers: Callable[[Path], LocalServers], empty_database: Path
) -> Iterator[Server]:
    root = tmp_path_factory.mktemp("servers")
    shutil.copyfile(empty_database, root / "mlflow.db")
    one = Server(servers.servers_of(free_servers(root))["mlflow"])
    one.start()
    yield one
    one.kill()


@pytest.fixture
def mlflow(one_server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A server that has no run."""
    if MLFLOW not in os.environ:
        for name, seconds in {"SEND_SECONDS": 0.1, "RETRY_SECONDS": 0.1, "CLOSE_SECONDS": 1200}.items():
            monkeypatch.setattr(outbox, name, seconds)
    yield one_server
    one_server.started[-1].send_signal(signal.SIGCONT)
    client = MlflowClient(one_server.told.url)
    for run in client.search_runs([one.experiment_id for one in client.search_experiments()]):
        client.delete_run(run.info.run_id)  # or the same stage of another test would go on in it


@pytest.mark.parametrize("how", ["hangs", "is killed"])
def test_mlflow_is_away_while_a_stage_trains_and_then_has_every_step_once(
    how: str,
    mlflow: Server,
    happens: Callable[[Outage], None],
    make_trial: Callable[..., ResumeTrial],
    undisturbed: Checkpoint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    trial, uri = make_trial(tmp_path, num_steps=STEPS), mlflow.told.url
    trial = trial.with_changes({"resources": trial.resources.with_changes({"tracking.uri": uri})})

    calls: list[None] = []
    honest = outbox.deliver

    def deliver(*given: Any) -> None:
        try:
            honest(*given)
        finally:
            calls.append(None)

    monkeypatch.setattr(outbox, "deliver", deliver)

    def begin() -> None:
        if MLFLOW not in os.environ:
            monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
            monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
            before = len(calls)
            until(lambda: len(calls) >= before + 2)  # a call that has begun before waits for two minutes
        if how == "hangs":
            mlflow.started[-1].send_signal(signal.SIGSTOP)
        else:
            mlflow.kill()

    def end() -> None:
        until(lambda: "does not answer" in caplog.text)
        monkeypatch.delenv("MLFLOW_HTTP_REQUEST_TIMEOUT", raising=False)
        if how == "hangs":
            mlflow.started[-1].send_signal(signal.SIGCONT)
        else:
            mlflow.start()

    happens(Outage(SECONDS[MLFLOW], begin, end))
    checkpoint = trial.train()
    check(checkpoint, undisturbed, str(tmp_path))
    assert "answers again" in caplog.text
    check_told_once(uri, Path(checkpoint.uri).name, curve_of(checkpoint))
    assert kept(trial.resources) == []


@pytest.mark.parametrize("lost", [2, 3])
def test_the_runs_that_mlflow_makes_of_requests_whose_answers_are_lost_end(
    lost: int, mlflow: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLflow's client sends a request three times, as it does to a server that hangs."""
    for name, value in {"MAX_RETRIES": "2", "BACKOFF_FACTOR": "0", "BACKOFF_JITTER": "0"}.items():
        monkeypatch.setenv(f"MLFLOW_HTTP_REQUEST_{name}", value)
    faults: list[Fault] = ["lost"] * lost
    begin: dict[str, Any] = {"key": ("address", "a"), "parent": None, "params": {"rate": 1}, "tags": {}}
    with Proxy(mlflow.told.url) as front:
        front.choose = lambda _, target: faults.pop() if target.endswith("/runs/create") and faults else None
        threading.Thread(target=front.serve_forever, args=(0.05,), daemon=True).start()
        resources = tracked(tmp_path, front.endpoint)
        if lost == 3:
            with pytest.raises(ConnectionError), tracking.open_run(resources, "align", **begin):
                raise AssertionError
        with tracking.open_run(resources, "align", **begin) as run_id:
            pass
        front.shutdown()
    client = MlflowClient(mlflow.told.url)
    experiment = client.get_experiment_by_name(tracking.EXPERIMENT).experiment_id
    statuses = {run.info.run_id: run.info.status for run in client.search_runs([experiment])}
    assert statuses.pop(run_id) == "FINISHED"
    assert list(statuses.values()) == ["KILLED"] * 2


@pytest.fixture
def mlflow_file(empty_database: Path, tmp_path: Path) -> str:
    """The tracking URI of a file that has no run."""
    return f"sqlite:///{shutil.copy(empty_database, tmp_path / 'mlflow.db')}"


@pytest.fixture
def in_s3(proxy: Proxy, s3_store: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """An empty store behind the proxy."""
    if S3 not in os.environ:  # heartbeats tell of a short outage too
        monkeypatch.setattr(task, "hold", functools.partial(hold, pace=Pace(expiry_seconds=0.5, poll_seconds=0.05)))
        monkeypatch.setattr(ExponentialBackoff, "delay_amount", lambda *_: 0.01)
    return s3_store


@pytest.mark.parametrize("save_every", [pytest.param(STEPS, id="trains on"), pytest.param(2, id="fails to save")])
def test_a_store_answers_503_while_a_stage_trains_and_loses_nothing(
    save_every: int,
    in_s3: str,
    proxy: Proxy,
    happens: Callable[[Outage], None],
    make_trial: Callable[..., ResumeTrial],
    undisturbed: Checkpoint,
    mlflow_file: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A stage that has to save ends with an error, and is tried again after the pauses of our flows."""
    trial = make_trial(Path(), num_steps=STEPS, save_every=save_every)
    places = {"storage.store": in_s3, "storage.cache": str(tmp_path / "cache"), "tracking.uri": mlflow_file}
    trial = trial.with_changes({"resources": trial.resources.with_changes(places)})

    def begin() -> None:
        if save_every < STEPS:
            until(lambda: [one.step for one in resume_folders(in_s3)] == [save_every])
        proxy.choose = lambda *_: "slow_down"

    def end() -> None:
        until(lambda: "a heartbeat was not stored" in caplog.text)
        proxy.choose = lambda *_: None

    outage = Outage(SECONDS[S3], begin, end)
    happens(outage)
    if save_every == STEPS:
        checkpoint = trial.train()
        assert first_steps(trial) == [0]
    else:

        def over() -> None:
            if outage.over_at is not None and time.monotonic() > outage.over_at:
                proxy.choose = lambda *_: None

        scale = 1.0 if S3 in os.environ else outage.seconds / 300
        checkpoint, error = trained(trial, pauses=tuple(scale * one for one in DELAYS), over=over)
        assert isinstance(error, StoreUnreachable)
        assert f"{in_s3}/resume/{Path(checkpoint.uri).name}/step-{2 * save_every:06d}-" in str(error)
        assert "S3 still answers SlowDown (503)" in str(error)
        assert first_steps(trial) == [0, save_every]
    check(checkpoint, undisturbed, in_s3)
    assert unsealed(in_s3) == []
    check_told_once(mlflow_file, Path(checkpoint.uri).name, curve_of(checkpoint))


@pytest.mark.parametrize(
    ("fault", "told"),
    [("is full", "No space left on device"), ("turns read-only", "Read-only file system")],
    ids=["is full", "turns read-only"],
)
def test_a_disk_fails_while_a_stage_trains_and_the_next_try_goes_on(
    fault: str,
    told: str,
    make_disk: Callable[[int], Path],
    happens: Callable[[Outage], None],
    make_trial: Callable[..., ResumeTrial],
    undisturbed: Checkpoint,
    mlflow_file: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A disk with a file that is open for writing, such as that of metrics, cannot be made read-only."""
    disk = make_disk(DISK_BYTES)
    store, ballast = disk / "store", disk / "ballast"
    uri = mlflow_file if fault == "is full" else None
    trial = make_trial(store, num_steps=STEPS, save_every=2)
    changes = {"tracking.uri": uri, "train.record_samples": False}
    trial = trial.with_changes({"resources": trial.resources.with_changes(changes)})

    def begin() -> None:
        until(lambda: [one.step for one in resume_folders(str(store))] == [2])
        if fault == "is full":
            fill(ballast)
        else:
            until(lambda: remount(disk, "ro"))

    def over() -> None:
        if fault == "is full":
            ballast.unlink()
        else:
            assert remount(disk, "rw")

    happens(Outage(0.0, begin, lambda: None))
    with caplog.at_level(logging.INFO, "vila_ops"):
        checkpoint, error = trained(trial, pauses=(0.0,), over=over)
    assert isinstance(error, DiskFault)
    assert f"{checkpoint.uri}/" in str(error)
    assert told in str(error)
    assert f"{store}/resume/{Path(checkpoint.uri).name}/.step-000004-" in str(error.__cause__)
    assert fault == "is full" or "was not released" in caplog.text
    assert "locked by" not in caplog.text, "its own lease"
    assert "resuming after step 2" in caplog.text
    check(checkpoint, undisturbed, str(store))
    if uri is not None:
        check_told_once(uri, Path(checkpoint.uri).name, curve_of(checkpoint))


def fill(path: Path) -> None:
    """Write to a file until its disk is full."""
    with path.open("wb", buffering=0) as file:
        for size in (2**20, 2**12, 1):
            with contextlib.suppress(OSError):
                while file.write(bytes(size)) == size:
                    pass


def remount(disk: Path, how: str) -> bool:
    done = subprocess.run(["mount", "-o", f"remount,{how}", disk], capture_output=True, check=False)
    return done.returncode == 0
