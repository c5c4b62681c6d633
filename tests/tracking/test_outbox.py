"""What MLflow is told arrives once and in order, whatever becomes of the server or of who tells it."""

import errno
import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from mlflow import MlflowClient

from tests.forks import Fork, output_of
from tests.tracking.live import Server, begin, history, kept, tracked, until
from vila_ops import tracking
from vila_ops.config import Resources
from vila_ops.config.local import LocalServers
from vila_ops.local import servers
from vila_ops.tracking import MetricLog, outbox
from vila_ops.tracking.outbox import Spool
from vila_ops.tracking.system import SystemMetrics

KILLED = """
import os, signal, sys
from vila_ops.config import Resources
from vila_ops.tracking import MetricLog
metrics = MetricLog(Resources.model_validate_json(sys.argv[1]), sys.argv[2])
for step in range(100):
    metrics.log({"loss": step / 8}, step=step)
os.kill(os.getpid(), signal.SIGKILL)
"""

FULL = """
import resource, signal, sys
from vila_ops.config import Resources
from vila_ops.tracking import MetricLog
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
with MetricLog(Resources.model_validate_json(sys.argv[1]), sys.argv[2]) as metrics:
    for step in range(100):
        metrics.log({"loss": step / 8}, step=step)
"""


@pytest.fixture
def server(tmp_path: Path, free_servers: Callable[[Path], LocalServers], empty_database: Path) -> Iterator[Server]:
    root = tmp_path / "servers"
    root.mkdir()
    shutil.copyfile(empty_database, root / "mlflow.db")
    one = Server(servers.servers_of(free_servers(root))["mlflow"])
    yield one
    one.kill()


@pytest.mark.slow
def test_a_server_that_is_killed_and_comes_back_has_everything_once(
    server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    resources = tracked(tmp_path, server.told.url)
    server.start()
    run_id = begin(resources)
    with MetricLog(resources, run_id) as metrics:
        for step in range(10):
            metrics.log({"loss": step / 8, "norm": float("inf")}, step=step)
        until(lambda: len(history(resources, run_id)) == 10)
        server.kill()
        for step in range(10, 30):
            metrics.log({"loss": step / 8}, step=step)
        until(lambda: "does not answer" in caplog.text)
        (file,) = kept(resources)
        waiting = [json.loads(line)["metrics"][0][3] for line in file.read_text().splitlines()]
        assert waiting[-20:] == list(range(10, 30))
        metrics.end("FINISHED")
        metrics.log({"loss": 30 / 8}, step=30)
        server.start()
        until(lambda: "answers again" in caplog.text)
        metrics.log({"loss": 31 / 8}, step=31)
    found = history(resources, run_id)
    assert [(metric.step, metric.value) for metric in found] == [(step, step / 8) for step in range(32)]
    assert [metric.timestamp for metric in found] == sorted(metric.timestamp for metric in found)
    assert len(history(resources, run_id, "norm")) == 10
    assert MlflowClient(resources.tracking.uri).get_run(run_id).info.status == "FINISHED"
    assert kept(resources) == []


@pytest.mark.slow
def test_what_a_killed_writer_left_is_sent_by_the_next_and_never_twice(resources: Resources) -> None:
    run_id = begin(resources)
    with Fork("-c", KILLED, resources.model_dump_json(), run_id) as process:
        assert process.wait() == -signal.SIGKILL
    (file,) = kept(resources)
    whole = file.read_bytes()
    assert len(history(resources, run_id)) == 0
    file.write_bytes(whole + b'{"metrics": [["loss", 1')
    with MetricLog(resources, run_id) as metrics:
        metrics.log({"loss": 100 / 8}, step=100)
    assert [(one.step, one.value) for one in history(resources, run_id)] == [(n, n / 8) for n in range(101)]
    assert kept(resources) == []
    file.write_bytes(whole)  # as if its writer was killed when all was sent and the file not emptied yet
    tracking.end_run(resources, run_id, "FAILED")
    assert len(history(resources, run_id)) == 101
    assert kept(resources) == []


def test_a_run_that_ends_while_the_server_is_away_is_closed_by_the_next(
    resources: Resources, away: Resources, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    run_id = begin(resources)
    (tmp_path / "report.json").write_text("{}")
    with MetricLog(away, run_id) as metrics:
        metrics.log({"loss": 2.5}, step=1)
        metrics.attach(tmp_path / "report.json")
    before = int(time.time() * 1000)
    tracking.end_run(away, run_id, "FINISHED")
    after = int(time.time() * 1000)
    assert "has not taken all of run" in caplog.text
    assert "secret" not in caplog.text
    assert len(kept(resources)) == 2
    client = MlflowClient(resources.tracking.uri)
    assert client.get_run(run_id).info.status == "RUNNING"
    other = begin(resources)
    tracking.end_run(resources, other, "FAILED")
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED"
    assert before <= run.info.end_time <= after
    assert run.data.metrics == {"loss": 2.5}
    assert [file.path for file in client.list_artifacts(run_id)] == ["report.json"]
    assert client.get_run(other).info.status == "FAILED"
    assert kept(resources) == []


def leave(resources: Resources, run_id: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Log a metric and end, while MLflow does not answer."""

    def silent(*_: object) -> None:
        raise OSError("no answer")

    with monkeypatch.context() as patch, MetricLog(resources, run_id) as metrics:
        patch.setattr(outbox, "deliver", silent)
        metrics.log({"loss": 2.5}, step=1)
        metrics.close()
    assert len(kept(resources)) == 1


def test_another_mlflow_on_the_same_store_leaves_what_it_has_no_run_for(
    resources: Resources, tmp_path: Path, empty_database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_id = begin(resources)
    leave(resources, run_id, monkeypatch)
    database = shutil.copy(empty_database, tmp_path / "other.db")
    other = resources.with_changes({"tracking.uri": f"sqlite:///{database}"})
    tracking.end_run(other, begin(other), "FINISHED")
    assert [path.suffix for path in kept(resources)] == [".jsonl"]
    tracking.end_run(resources, begin(resources), "FINISHED")
    assert kept(resources) == []
    assert [metric.value for metric in history(resources, run_id)] == [2.5]


def test_while_mlflow_is_away_what_is_left_for_others_costs_one_question(
    resources: Resources, away: Resources, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave(resources, begin(resources), monkeypatch)
    (left,) = kept(resources)
    run_id, tracker, *_ = left.name.split(".")
    for number in range(2):
        shutil.copyfile(left, left.with_name(f"{run_id}.{tracker}.0000000{number}.jsonl"))
    asked = []

    class Silent:
        def get_run(self, run_id: str) -> None:
            asked.append(run_id)
            raise OSError("no answer")

    monkeypatch.setattr(outbox, "connect", lambda _: (Silent(), None))
    monkeypatch.setattr(outbox, "SEND_SECONDS", 600)
    with MetricLog(away, "1" * 32):
        pass
    assert asked == [run_id]
    assert len(kept(resources)) == 3


@pytest.mark.parametrize("how", ["deleted", "never there"])
def test_what_is_left_of_a_run_that_is_no_more_is_put_aside(
    how: str, resources: Resources, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run_id = begin(resources)
    if how == "deleted":
        MlflowClient(resources.tracking.uri).delete_run(run_id)
    else:
        run_id = "0" * 32
    leave(resources, run_id, monkeypatch)
    other = begin(resources)
    tracking.end_run(resources, other, "FINISHED")
    assert [path.suffix for path in kept(resources)] == [".refused"]
    assert caplog.text.count(f"no longer has run {run_id}") == 1
    again = begin(resources)
    with MetricLog(resources, again) as metrics:
        metrics.log({"loss": 1.5}, step=1)
    assert caplog.text.count("no longer has run") == 1
    assert [metric.value for metric in history(resources, again)] == [1.5]


def test_nothing_is_taken_from_a_writer_that_lives(resources: Resources, away: Resources) -> None:
    run_id = begin(resources)
    with MetricLog(away, run_id) as alive:
        alive.log({"loss": 1.0}, step=1)
        (file,) = kept(resources)
        assert Spool.left(file) is None
        tracking.end_run(resources, run_id, "FINISHED")
        assert kept(resources) == [file]
    assert history(resources, run_id) == []


def test_a_damaged_line_is_left_out_and_the_others_are_sent(
    resources: Resources, away: Resources, caplog: pytest.LogCaptureFixture
) -> None:
    run_id = begin(resources)
    with MetricLog(away, run_id) as metrics:
        for step in range(5):
            metrics.log({"loss": step / 8}, step=step)
    (file,) = kept(resources)
    lines = file.read_bytes().splitlines(keepends=True)
    lines[1] = lines[1].replace(b"0.125", b"0.925")  # still JSON
    lines[3] = lines[3].replace(b"{", b"\xfb", 1)
    file.write_bytes(b"".join(lines)[:-9])  # and the last one was cut off by a kill
    tracking.end_run(resources, begin(resources), "FINISHED")
    assert [(metric.step, metric.value) for metric in history(resources, run_id)] == [(0, 0.0), (2, 0.25)]
    assert caplog.text.count(f"a line of {file} is not whole") == 3
    assert kept(resources) == []


@pytest.mark.slow
def test_a_full_disk_loses_metrics_and_nothing_else(resources: Resources, away: Resources) -> None:
    lines_told = output_of("-c", FULL, away.model_dump_json(), "0" * 32)
    assert len([line for line in lines_told if "cannot be kept" in line]) == 1
    (file,) = kept(resources)
    lines = file.read_bytes().splitlines(keepends=True)
    assert all(line.endswith(b"}\n") and json.loads(line) for line in lines)
    assert 900 < file.stat().st_size <= 1000


class FullDisk:
    """Makes writes of files of entries fail halfway, while it is `full`."""

    def __init__(self) -> None:
        self.full = False
        self._honest = os.pwrite

    def pwrite(self, file: int, text: bytes, at: int) -> int:
        if not self.full:
            return self._honest(file, text[:50], at)  # which may write less than it was asked to
        self._honest(file, text[: len(text) // 2], at)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> FullDisk:
    disk = FullDisk()
    monkeypatch.setattr(os, "pwrite", disk.pwrite)
    return disk


def test_what_a_full_disk_does_not_take_is_kept_behind_the_rest_and_sent_from_memory(
    resources: Resources, disk: FullDisk, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(outbox, "SEND_SECONDS", 600)
    run_id = begin(resources)
    with MetricLog(resources, run_id) as metrics:
        for step in range(12):
            disk.full = step in (3, 4, 9, 10, 11)
            metrics.log_once({"loss": step / 8}, step=step)
            (file,) = kept(resources)
            steps = [json.loads(line)["once"][0][3] for line in file.read_text().splitlines()]
            assert steps == list(range({3: 3, 4: 3, 9: 9, 10: 9, 11: 9}.get(step, step + 1)))
    assert [(one.step, one.value) for one in history(resources, run_id)] == [(n, n / 8) for n in range(12)]
    assert kept(resources) == []
    assert caplog.text.count("only in memory: [Errno 28]") == 1
    assert "are lost" not in caplog.text


def test_a_run_ends_also_where_no_file_can_be_made(resources: Resources, caplog: pytest.LogCaptureFixture) -> None:
    run_id, folder = begin(resources), resources.storage.scratch() / "metrics"
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.write_text("as a disk that has turned read-only, it takes no file")
    with MetricLog(resources, run_id) as metrics:
        metrics.log({"loss": 2.5}, step=1)
    tracking.end_run(resources, run_id, "FAILED")
    run = MlflowClient(resources.tracking.uri).get_run(run_id)
    assert (run.info.status, run.data.metrics) == ("FAILED", {"loss": 2.5})
    assert caplog.text.count("only in memory: [Errno") == 2


def test_entries_that_no_disk_takes_and_no_server_are_told_as_lost(
    resources: Resources, away: Resources, disk: FullDisk, caplog: pytest.LogCaptureFixture
) -> None:
    disk.full = True
    with MetricLog(away, begin(resources)) as metrics:
        for step in range(5):
            metrics.log({"loss": 2.5}, step=step)
    assert "the last 5 entries of " in caplog.text


def test_the_machines_load_is_logged_while_a_run_is_open(resources: Resources) -> None:
    run_id = begin(resources)
    with MetricLog(resources, run_id, system=SystemMetrics()) as metrics:
        metrics.log({"loss": 1.0}, step=7)
    metrics_of = MlflowClient(resources.tracking.uri).get_run(run_id).data.metrics
    assert 0 <= metrics_of["system/cpu_utilization_percentage"] <= 100
    assert 0 < metrics_of["system/system_memory_usage_percentage"] < 100
    assert {metric.step for metric in history(resources, run_id, "system/disk_usage_percentage")} <= {0, 7}


def test_a_load_that_cannot_be_read_stops_nothing_else(
    resources: Resources, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken() -> None:
        raise AttributeError("no counters of a network that is not there")

    monkeypatch.setattr(psutil, "net_io_counters", broken)
    run_id = begin(resources)
    with MetricLog(resources, run_id, system=SystemMetrics()) as metrics:
        metrics.log({"loss": 1.0}, step=7)
    assert [metric.value for metric in history(resources, run_id)] == [1.0]
    assert caplog.text.count("load is no longer logged") == 1
