"""What `top` and Prometheus see of tasks: read from leases that this process, others and killed ones hold."""

import json
import os
import socket
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from vila_ops.artifacts.leases import Holder, LeaseRecord, hold
from vila_ops.artifacts.progress import ProgressRecord, Reporter
from vila_ops.artifacts.store import Address, backend, root_of
from vila_ops.cli import app
from vila_ops.cli.top import clock, page, row
from vila_ops.errors import Preempted
from vila_ops.monitoring.tasks import WatchedTask, watched
from vila_ops.processes import this_process

HERE = socket.gethostname()
TASK = ProgressRecord(
    task="train_stage", name="align", host="node-1", began=100.0, advanced=160.0, done=12.0, total=48.0
)


def at(number: int) -> Address:
    return Address("checkpoint", f"{number:032x}", None, ())


def held_by(store: str, number: int, *, host: str, started: float, progress: ProgressRecord | None = TASK) -> str:
    """A lease that a process holds; returns its register."""
    register = f"{root_of(store)}/leases/{at(number).kind}/{at(number).key}"
    holder = Holder(host=host, pid=os.getpid(), started=started, token="t")
    record = LeaseRecord(holder=holder, fencing=1, heartbeats=3, progress=progress)
    assert backend(store).swap(register, record.model_dump_json().encode(), None)
    return register


def age(folder: str, seconds: float) -> None:
    for path in (Path(folder), *Path(folder).rglob("*")):
        os.utime(path, (time.time() - seconds,) * 2)


def test_a_task_runs_while_its_lease_is_held_and_then_says_that_it_is_done(
    store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    monkeypatch.setattr("vila_ops.artifacts.progress.time", SimpleNamespace(time=lambda: now[0]))
    started = time.time()
    with hold(at(0), store=store) as lease:
        assert watched(store) == [], "a holder that does not say how far it is"
        lease.report = reporter = Reporter("evaluate", "sft: pope", unit="requests", workers=2, price_per_hour=7.2)
        now[0] = 1020.0  # after it has loaded
        reporter.begin(10, 110)
        reporter.advance(35, {"loss": 2.5})
        lease.heartbeat()
        (one,) = watched(store, now=1070.0)
        assert (one.state, one.task, one.name, one.host, one.workers) == ("running", "evaluate", "sft: pope", HERE, 2)
        assert (one.address, one.done, one.total, one.unit) == (at(0).key, 35, 110, "requests")
        assert one.seconds == 70
        assert one.seconds_left == pytest.approx(150), "25 took 50 s, 75 are left"
        assert one.cost == pytest.approx(0.14)
        assert one.metrics == {"loss": 2.5}
        reporter.advance(110)
    (one,) = watched(store)
    assert (one.state, one.done, one.seconds_left) == ("done", 110, None)
    assert started <= one.advanced <= time.time(), "its end"
    with hold(at(0), store=store):  # finds the result
        pass
    assert watched(store) == [one]


@pytest.mark.parametrize(
    ("error", "state"), [(ValueError, "failed"), (Preempted, "stopped"), (KeyboardInterrupt, "stopped")]
)
def test_a_task_that_ends_otherwise_says_how(error: type[BaseException], state: str, tmp_path: Path) -> None:
    def work() -> None:
        with hold(at(0), store=str(tmp_path)) as lease:
            lease.report = Reporter("prepare", "align")
            raise error("it ends")

    with pytest.raises(error, match="it ends"):
        work()
    assert [one.state for one in watched(str(tmp_path))] == [state]


def test_a_task_whose_process_ended_without_a_word_is_lost(tmp_path: Path) -> None:
    store = str(tmp_path)
    held_by(store, 0, host=HERE, started=this_process().started)
    held_by(store, 1, host=HERE, started=1.0)  # a pid that the kernel gave to another process
    held_by(store, 2, host="node-2", started=1.0)
    silent = held_by(store, 3, host="node-3", started=1.0)
    age(silent, 200)
    age(held_by(store, 4, host="node-4", started=1.0), 25 * 3600)
    held_by(store, 5, host=HERE, started=1.0, progress=None)
    damaged = held_by(store, 6, host="node-2", started=1.0)
    next(Path(damaged).iterdir()).write_text("{")
    shown = {int(one.address, 16): one.state for one in watched(store)}
    assert shown == {0: "running", 1: "lost", 2: "running", 3: "lost"}
    (lost,) = [one for one in watched(store) if one.address == at(1).key]
    assert (lost.seconds, lost.seconds_left, lost.cost) == (60, None, None), "until its last progress"


SHOWN = WatchedTask(
    state="running", task="train_stage", name="align", address="a" * 32, host="node-1", workers=2, began=0, advanced=1,
    seconds=3725, seconds_left=40.4, done=12, total=48, unit="steps", cost=3.2,
    metrics={"loss": 2.3104, "train/tokens_per_s": 12345.6, "train/mfu": 0.41, "grad_norm": 1.0},
)  # fmt: skip


def test_a_row_says_what_where_how_far_and_what_it_costs() -> None:
    assert row(SHOWN) == (
        "train_stage align", "running", "node-1 x2", "12/48 steps", "1:02:05", "0:00:40", "3.20",
        "loss 2.310, 12.3 k tokens/s, MFU 41 %",
    )  # fmt: skip
    bare = SHOWN.with_changes({"total": None, "seconds_left": None, "cost": None, "metrics": {}, "workers": 1})
    assert row(bare) == ("train_stage align", "running", "node-1", "-", "1:02:05", "-", "-", "-")
    assert clock(100 * 3600) == "100:00:00"


def test_a_page_says_why_its_rows_are_old() -> None:
    assert str(page([SHOWN]).title).endswith("Ctrl-C ends")
    assert str(page([SHOWN], "[s3] does not answer").title).endswith("ends; NOT RENEWED: [s3] does not answer")
    assert page([SHOWN], "no answer").row_count == 1


def test_the_command_prints_a_table_or_json(tmp_path: Path) -> None:
    resources = tmp_path / "resources.yaml"
    resources.write_text(f"launch: inline\nstorage: {{store: {tmp_path}/store}}\n")
    held_by(f"{tmp_path}/store", 0, host=HERE, started=this_process().started)
    for number in range(1, 8):
        with hold(at(number), store=f"{tmp_path}/store") as lease:
            lease.report = Reporter("prepare", f"mixture-{number}")

    def told(*options: str) -> str:
        printed = CliRunner().invoke(app, ["top", "-r", str(resources), *options], catch_exceptions=False).stdout
        return printed.partition("\n\n")[0]  # more columns follow

    head, first, *rest = told().splitlines()
    assert head.split()[:4] == ["task", "state", "node", "done"]
    assert first.split()[:5] == ["train_stage", "align", "running", "node-1", "12/48"]
    assert [line.split()[1] for line in rest] == [f"mixture-{number}" for number in (7, 6, 5, 4, 3)], "the newest"
    assert len(told("--all", "--once").splitlines()) == 1 + 8
    listed = json.loads(told("--json"))
    assert [(one["state"], one["name"], one["done"], one["total"]) for one in listed[:1]] == [
        ("running", "align", 12, 48)
    ]
    assert len(listed) == 8
