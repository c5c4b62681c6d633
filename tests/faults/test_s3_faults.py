"""S3 behind a proxy that answers errors, hangs, cuts off and corrupts: sealed bytes are right.

VILA_FAULTS sets the number of faulty calls (60; `make faults`: 500), VILA_SEED which.
"""

import hashlib
import os
import random
import shutil
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest
import torch
from boto3.s3.transfer import TransferConfig
from botocore.retries.standard import ExponentialBackoff

from tests.s3_servers import READ_SECONDS, Choose, Fault, Proxy
from tests.seed import SEED
from vila_ops.artifacts import s3, s3_calls
from vila_ops.artifacts.kinds import Dataset
from vila_ops.artifacts.leases import hold
from vila_ops.artifacts.s3_calls import TRIES
from vila_ops.artifacts.store import Address, address, begin, content, find, seal, verify
from vila_ops.config import Resources
from vila_ops.errors import CorruptArtifact, StoreRefused, StoreUnreachable
from vila_ops.train.checkpoint.checkpointer import Checkpointer
from vila_ops.train.job import RankInfo

FAULTS = int(os.environ.get("VILA_FAULTS", "60"))
SHARE = 0.4
"""Share of calls that fail."""
IN_A_ROW = 3
"""Most consecutive faults of one call, fewer than its tries."""


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short waits."""
    monkeypatch.setattr(s3_calls, "READ_SECONDS", READ_SECONDS)
    monkeypatch.setattr(s3, "TRANSFER", TransferConfig(multipart_threshold=5 * 2**20, multipart_chunksize=5 * 2**20))
    monkeypatch.setattr(ExponentialBackoff, "delay_amount", lambda *_: 0.01)


def at(number: int) -> Address:
    return address(Dataset, revision=1, recipe={"number": number}, parents=())


def write(store: str, files: dict[str, bytes], *, number: int = 0) -> Dataset:
    attempt = begin(at(number), store=store)
    for name, data in files.items():
        (attempt / name).parent.mkdir(parents=True, exist_ok=True)
        (attempt / name).write_bytes(data)
    return seal(Dataset, at(number), attempt, facts={"num_samples": 1, "num_tokens": 1}, execution={})


def forget(tmp_path: Path) -> None:
    """Remove this machine's copies."""
    shutil.rmtree(tmp_path / "copies")


def at_random(draw: random.Random, injected: Counter[Fault]) -> Choose:
    """Return a chooser by which each call fails with probability SHARE, at most IN_A_ROW times in a row."""
    in_a_row: Counter[tuple[str, str]] = Counter()
    lock = threading.Lock()

    def choose(method: str, target: str) -> Fault | None:
        with lock:
            call = (method, target.partition("?")[0] if method == "GET" else target)
            if draw.random() > SHARE or in_a_row[call] >= IN_A_ROW:
                in_a_row[call] = 0
                return None
            of_body = method == "GET" and "?" not in target
            never = {"conflict", "refused"} if of_body else {"conflict", "refused", "partial", "lie"}
            kinds = [fault for fault in get_args(Fault) if fault not in never]
            fault: Fault = draw.choice(kinds)
            in_a_row[call] += 1
            injected[fault] += 1
            return fault

    return choose


@pytest.mark.slow
@pytest.mark.timeout(1200 + 4 * FAULTS)
def test_through_faults_of_every_kind_the_sealed_bytes_are_right(proxy: Proxy, s3_store: str, tmp_path: Path) -> None:
    draw = random.Random(SEED)
    injected: Counter[Fault] = Counter()
    proxy.choose = at_random(draw, injected)
    number = 0
    while injected.total() < FAULTS or number < 3:
        files = {f"sub/{n}": draw.randbytes(draw.randrange(1, 5000)) for n in range(4)}
        if number == 0:
            files["large"] = draw.randbytes(11 * 2**20)
        made = write(s3_store, files, number=number)
        forget(tmp_path)
        assert find(Dataset, at(number), store=s3_store) == made, SEED
        read = {str(p.relative_to(content(made))): p.read_bytes() for p in content(made).rglob("*") if p.is_file()}
        assert {n: hashlib.sha256(b).digest() for n, b in read.items()} == {
            n: hashlib.sha256(b).digest() for n, b in files.items()
        }, SEED
        verify(made)
        number += 1
    assert len(injected) >= 6, injected


@pytest.mark.slow
@pytest.mark.timeout(1200 + 4 * FAULTS)
def test_through_faults_of_every_kind_resume_checkpoints_come_back_whole(
    proxy: Proxy, s3_store: str, make_resources: Callable[..., Resources], tmp_path: Path
) -> None:
    draw, resume = random.Random(SEED), f"{s3_store}/resume/address"
    injected: Counter[Fault] = Counter()
    proxy.choose = at_random(draw, injected)
    step = 0
    while injected.total() < FAULTS or step < 3:
        step += 1
        states = {name: {"param": torch.randn(1_500_000 if name == "large" else 50)} for name in ("large", "small")}
        saving = Checkpointer(resume, RankInfo(), make_resources(tmp_path), live=True)
        saving.save(step, iter(states.items()), [{"step": step, "loss": 1 / step}])
        saving.close()
        loading = Checkpointer(resume, RankInfo(), make_resources(tmp_path), live=True)
        newest = loading.newest()
        assert newest is not None
        tensors, manifest = newest
        assert manifest["curve"] == [{"step": step, "loss": 1 / step}], SEED
        assert all(torch.equal(tensors[name]["param"], one["param"]) for name, one in states.items()), SEED
        forget(tmp_path)
    assert len(injected) >= 6, injected
    proxy.choose = lambda *_: None
    left = {name.partition("/")[0].rpartition("-")[0] for name in s3.names(resume)}
    assert left == {f"step-{step - 1:06d}", f"step-{step:06d}"}, "others were removed, and no draft is left"


def test_a_store_that_stays_down_fails_the_save_and_never_counts_as_damage(
    proxy: Proxy, s3_store: str, make_resources: Callable[..., Resources], tmp_path: Path
) -> None:
    def attempt() -> Checkpointer:
        return Checkpointer(f"{s3_store}/resume/address", RankInfo(), make_resources(tmp_path), live=True)

    def save(step: int) -> None:
        checkpoints = attempt()
        checkpoints.save(step, iter([("w", {"param": torch.ones(5)})]), [])
        checkpoints.close()

    save(2)
    for down in (".safetensors", "manifest.json"):
        proxy.choose = lambda method, target, down=down: "error" if down in target else None  # type: ignore[misc]
        with pytest.raises(StoreUnreachable, match=f"resume/address/step-000004-.*{down}.*500"):
            save(4)
        with pytest.raises(StoreUnreachable, match=f"resume/address/step-000002-.*{down}.*500"):
            attempt().newest()
        proxy.choose = lambda *_: None
        newest = attempt().newest()
        assert newest is not None
        assert newest[1]["step"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["lost", "conflict", "error", "reset"])
def test_a_seal_whose_first_answer_failed_has_won(fault: Fault, proxy: Proxy, s3_store: str) -> None:
    failed: list[str] = []

    def once(method: str, target: str) -> Fault | None:
        if method == "PUT" and target.endswith("manifest.json") and not failed:
            failed.append(target)
            return fault
        return None

    proxy.choose = once
    made = write(s3_store, {"a": b"mine"})
    assert len(failed) == 1
    assert (content(made) / "a").read_bytes() == b"mine"
    assert write(s3_store, {"a": b"later"}).digest == made.digest
    verify(made)


def test_a_lease_whose_beat_was_not_answered_is_still_held(proxy: Proxy, s3_store: str) -> None:
    with hold(at(0), store=s3_store) as lease:
        left = ["lost", "lost"]
        proxy.choose = lambda method, _: left.pop() if method == "PUT" and left else None  # type: ignore[return-value]
        lease.heartbeat()
        assert (lease.lost, left) == (False, [])
    with hold(at(0), store=s3_store) as second:
        assert second.fencing == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "message"), [("slow_down", r"still answers SlowDown \(503\)"), ("hang", "did not answer")]
)
def test_a_store_that_stays_down_is_given_up_after_a_bound_and_told(
    fault: Fault, message: str, proxy: Proxy, s3_store: str
) -> None:
    proxy.choose = lambda *_: fault
    with pytest.raises(StoreUnreachable, match=message) as raised:
        find(Dataset, at(0), store=s3_store)
    assert s3_store in str(raised.value)
    assert len(proxy.calls) == TRIES


def test_bytes_that_stay_wrong_are_never_handed_out(proxy: Proxy, s3_store: str, tmp_path: Path) -> None:
    made = write(s3_store, {"a": b"right"})
    forget(tmp_path)
    proxy.choose = lambda method, target: "lie" if method == "GET" and target.endswith("/a") else None
    with pytest.raises(CorruptArtifact, match="/a holds other bytes than were sealed"):
        content(made)
    assert not any(path.is_file() for path in (tmp_path / "copies/s3").rglob("*"))
    with pytest.raises(CorruptArtifact, match="sealed as"):
        verify(made)
    proxy.choose = lambda *_: None
    assert (content(made) / "a").read_bytes() == b"right"


def test_no_server_and_no_bucket_are_told_apart(proxy: Proxy, aws: Callable[..., None]) -> None:
    with pytest.raises(StoreRefused, match=r"has no bucket 'vila-none'; create it, or change resources.storage.store"):
        begin(at(0), store="s3://vila-none/x")
    aws("http://127.0.0.1:9")
    with pytest.raises(StoreUnreachable, match=r"http://127.0.0.1:9 is up and reachable"):
        begin(at(0), store="s3://vila-none/y")
