"""Leases save work; what they promise is the same on disk and on S3."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.racing import racers
from vila_ops.artifacts import attempts, leases
from vila_ops.artifacts.kinds import Dataset
from vila_ops.artifacts.leases import Holder, Pace, hold, registers
from vila_ops.artifacts.store import Address, address, backend, begin, content, find, seal
from vila_ops.errors import CorruptArtifact, LeaseLost, StoreUnreachable

FORK = multiprocessing.get_context("fork")
ZOMBIES = int(os.environ.get("VILA_ZOMBIES", "2"))
FACTS = {"num_samples": 1, "num_tokens": 2}
PACE = Pace() if "VILA_ZOMBIES" in os.environ else Pace(expiry_seconds=0.1, poll_seconds=0.01)
"""Of the lease of a writer that is stopped."""


class Clock:
    """Time that passes only when somebody sleeps."""

    def __init__(self) -> None:
        self.time = 0.0

    def now(self) -> float:
        return self.time

    def sleep(self, seconds: float) -> None:
        self.time += seconds


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Holders of this process seem to be of another host, so that nobody can see whether they live."""
    monkeypatch.setattr(Holder, "is_gone", lambda _: False)


def at(number: int = 0) -> Address:
    return address(Dataset, revision=1, recipe={"number": number}, parents=())


def register(store: str) -> str:
    return f"{store}/leases/{at().kind}/{at().key}"


def waits(_: float) -> None:
    raise TimeoutError("it waits")


def silent(*_: object, **_more: object) -> None:
    raise StoreUnreachable("the store does not answer")


def test_a_lease_is_held_once_and_fencing_grows_by_one_with_each_holder(store: str) -> None:
    for fencing in (1, 2, 3):
        with hold(at(), store=store) as lease:
            assert (lease.fencing, lease.lost) == (fencing, False)
            lease.heartbeat()
    with hold(at(1), store=store) as other:
        assert other.fencing == 1


def test_a_holder_that_gives_no_sign_expires_and_finds_its_lease_lost(store: str, elsewhere: None) -> None:
    clock = Clock()
    pace = Pace(expiry_seconds=60, poll_seconds=1, now=clock.now, sleep=clock.sleep)
    with hold(at(), store=store, pace=pace) as first:
        with hold(at(), store=store, pace=pace) as second:
            assert clock.time == pytest.approx(61)
            assert (second.fencing, second.lost) == (2, False)
            assert first.lost, "no heartbeat for as long as a lease lives"
            first.heartbeat()
            assert first.lost, "taken over"
            second.heartbeat()
            assert not second.lost
        with hold(at(), store=store, pace=pace) as third:
            assert third.fencing == 3
    assert clock.time == pytest.approx(61), "a released lease is not waited for"


@pytest.mark.slow
def test_a_holder_with_heartbeats_is_waited_for(store: str, elsewhere: None) -> None:
    clock = Clock()
    with hold(at(), store=store, pace=Pace(now=clock.now)) as first:

        def sleep(seconds: float) -> None:
            clock.sleep(seconds)
            if clock.time < 1000:
                first.heartbeat()

        pace = Pace(expiry_seconds=60, poll_seconds=10, now=clock.now, sleep=sleep)
        with hold(at(), store=store, pace=pace) as second:
            assert second.fencing == 2
    assert 1060 <= clock.time < 1100


def test_the_heartbeat_keeps_a_lease_over_many_expiries(store: str, elsewhere: None) -> None:
    clock = Clock()  # three of its steps, the most that pass while a heartbeat is under way, are less than an expiry
    with hold(at(), store=store, pace=Pace(expiry_seconds=0.3, now=clock.now)) as lease:
        for _ in range(16):
            before = backend(store).load(register(store))
            while backend(store).load(register(store)) == before:
                time.sleep(0.01)
            clock.time += 0.09
            assert not lease.lost
        assert clock.time > 4 * 0.3
    if "://" not in store:
        assert len(list(Path(register(store)).iterdir())) <= 8, "old versions are removed"


@pytest.mark.slow
def test_the_lease_of_a_process_that_was_killed_is_free_at_once(store: str) -> None:
    code = (
        "import os, sys; from vila_ops.artifacts.leases import hold; from vila_ops.artifacts.store import address; "
        "from vila_ops.artifacts.kinds import Dataset; "
        "hold(address(Dataset, revision=1, recipe={'number': 0}, parents=()), store=sys.argv[1]).__enter__(); "
        "os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", code, store], check=False).returncode == -9
    with hold(at(), store=store, pace=Pace(sleep=waits)) as lease:
        assert lease.fencing == 2


def test_a_process_does_not_wait_for_a_lease_that_it_could_not_release(
    store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch, hold(at(), store=store) as first:
        with pytest.raises(TimeoutError), hold(at(), store=store, pace=Pace(sleep=waits)):
            pass
        patch.setattr(first, "heartbeat", silent)
    with monkeypatch.context() as patch:
        patch.setattr(leases, "_ended", set())
        assert registers(store) == {f"{at().kind}/{at().key}": True}, "another process waits for it"
    with hold(at(), store=store, pace=Pace(sleep=waits)) as second:
        assert (second.fencing, second.lost) == (2, False)
        with pytest.raises(LeaseLost):
            first.renew()


def test_a_process_does_not_wait_for_a_lease_that_it_has_without_knowing(
    store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def swap(*given: Any) -> None:
        backend(store).swap(*given)
        silent()

    with monkeypatch.context() as patch:
        patch.setattr(leases, "backend", lambda _: SimpleNamespace(load=backend(store).load, swap=swap))
        with pytest.raises(StoreUnreachable), hold(at(), store=store):
            pass
    with hold(at(), store=store, pace=Pace(sleep=waits)) as lease:
        assert lease.fencing == 2


def work(store: str) -> tuple[str, int, str]:
    """Make what is not there yet, slowly."""
    with hold(at(), store=store, pace=Pace(expiry_seconds=30, poll_seconds=0.05)) as lease:
        found = find(Dataset, at(), store=store)
        if found is None:
            attempt = begin(at(), store=store)
            time.sleep(0.5)
            (attempt / "a").write_text("made")
            found = seal(Dataset, at(), attempt, facts=FACTS, execution={})
            return "made", lease.fencing, found.digest
        return "found", lease.fencing, found.digest


@pytest.mark.slow
def test_of_processes_that_want_the_same_one_works_and_the_others_find_it(store: str) -> None:
    with racers(4) as pool:
        said = list(pool.map(work, [store] * 4))
    assert sorted(kind for kind, _, _ in said) == ["found", "found", "found", "made"]
    assert sorted(fencing for _, fencing, _ in said) == [1, 2, 3, 4]
    assert len({digest for _, _, digest in said}) == 1


def zombie(store: str, number: int, asks: bool, told: Connection) -> None:
    """Hold, work, be stopped through the expiry, and publish; with `asks` as tasks do, by renewing the lease first."""
    with hold(at(number), store=store, pace=PACE) as lease:
        try:
            with attempts.attempt(at(number), store=store, lease=lease if asks else None) as folder:
                (folder / "a").write_text("from before")
                os.kill(os.getpid(), signal.SIGSTOP)
            said = seal(Dataset, at(number), folder, facts=FACTS, execution={}).digest
        except LeaseLost:
            said = "refused"
    told.send((lease.lost, lease.fencing, said))


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("asks", [True, False])
def test_a_writer_that_was_stopped_past_its_lease_and_woken_cannot_publish(store: str, asks: bool) -> None:
    """One that asks is refused while its successor still works; one that does not ask finds the successor's result.

    VILA_ZOMBIES has the number of writers, which are stopped for the time of a real lease (`make faults`: 50). Without
    it there are two, for a tenth of a second.
    """
    ends = [FORK.Pipe() for _ in range(ZOMBIES)]
    processes = [FORK.Process(target=zombie, args=(store, number, asks, end)) for number, (_, end) in enumerate(ends)]

    def succeed(number: int) -> None:
        """Take the lease over, work and publish."""
        (mine, _), process = ends[number], processes[number]
        assert process.pid is not None
        with hold(at(number), store=store, pace=PACE) as lease:
            with attempts.attempt(at(number), store=store, lease=lease) as folder:
                (folder / "a").write_text("from after")
                if asks:
                    os.kill(process.pid, signal.SIGCONT)
                    assert mine.poll(600)
            made = seal(Dataset, at(number), folder, facts=FACTS, execution={})
            os.kill(process.pid, signal.SIGCONT)
            assert mine.poll(600)
            assert mine.recv() == (True, lease.fencing - 1, "refused" if asks else made.digest)
        assert find(Dataset, at(number), store=store) == made
        assert (content(made) / "a").read_text() == "from after"

    try:
        for process in processes:
            process.start()
        for process in processes:
            assert process.pid is not None
            assert os.WIFSTOPPED(os.waitpid(process.pid, os.WUNTRACED)[1])
        with ThreadPoolExecutor(ZOMBIES) as pool:
            assert len(list(pool.map(succeed, range(ZOMBIES)))) == ZOMBIES
        for process in processes:
            process.join(30)
            assert process.exitcode == 0
    finally:
        for process in processes:
            process.kill()


def test_a_register_that_is_no_lease_is_named(store: str) -> None:
    backend(store).swap(register(store), b"{}", None)
    with pytest.raises(CorruptArtifact, match=f"{register(store)} is not a lease; remove it"), hold(at(), store=store):
        pass


def test_a_register_changes_only_from_the_version_that_is_there(store: str) -> None:
    place = f"{store}/register"
    store_of = backend(store)
    assert store_of.load(place) is None
    first = store_of.swap(place, b"1", None)
    assert first is not None
    assert store_of.swap(place, b"other", None) is None
    tags = [first]
    for number in range(2, 30):
        tag = store_of.swap(place, str(number).encode(), tags[-1])
        assert tag is not None
        tags.append(tag)
    for stale in (tags[0], tags[10], tags[-2]):
        assert store_of.swap(place, b"stale", stale) is None
    found = store_of.load(place)
    assert found is not None
    assert (found.data, found.tag) == (b"29", tags[-1])
