"""Resume checkpoints on disk and on S3: round trip, saving in the background, retention and damage."""

import json
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.forks import ranks
from vila_ops.artifacts import disk, s3
from vila_ops.config import Resources
from vila_ops.config.resources import Retention
from vila_ops.train.checkpoint.checkpointer import Checkpointer, to_keep
from vila_ops.train.checkpoint.rank_file import RankFile
from vila_ops.train.job import RankInfo

CURVE: list[dict[str, Any]] = [{"step": 0, "validation_loss": 1 / 3}, {"step": 1, "loss": 1e-05}]
NAMES = ("model.a.weight", "model.b/odd.weight")
Make = Callable[..., Checkpointer]


@pytest.fixture
def make(make_resources: Callable[..., Resources], tmp_path: Path) -> Make:
    """Makes the checkpointer of an attempt of one worker, in `tmp_path/resume` or elsewhere."""

    def attempt(resume: str = str(tmp_path / "resume"), *, live: bool = True, **keep: Any) -> Checkpointer:
        return Checkpointer(resume, RankInfo(), make_resources(tmp_path, **{"train.keep": keep}), live=live)

    return attempt


@pytest.fixture(params=["disk", "s3"])
def resume(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A location for checkpoints on each storage."""
    return (
        str(tmp_path / "resume") if request.param == "disk" else f"{request.getfixturevalue('s3_store')}/resume/address"
    )


def states(value: float) -> dict[str, dict[str, torch.Tensor]]:
    kinds = ("param", "exp_avg", "exp_avg_sq")
    return {name: {key: torch.full((2, 3), value + n) for n, key in enumerate(kinds)} for name in NAMES}


def save(checkpoints: Checkpointer, *steps: int, curve: list[dict[str, Any]] = CURVE) -> None:
    """Save some steps one after another, and wait for the last save."""
    for step in steps:
        checkpoints.save(step, iter(states(float(step)).items()), curve)
    checkpoints.close()


def newest_step(checkpoints: Checkpointer) -> int | None:
    """Return the step of the newest intact checkpoint, after comparing its tensors with those of that step."""
    newest = checkpoints.newest()
    if newest is None:
        return None
    tensors, manifest = newest
    expected = states(float(manifest["step"]))
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name][key], one) for name, own in expected.items() for key, one in own.items())
    return int(manifest["step"])


def names(resume: str) -> list[str]:
    """Return the names of checkpoints and drafts, without the nonces of attempts."""
    folders = {name.partition("/")[0] for name in s3.names(resume)} if "://" in resume else set(os.listdir(resume))
    return sorted("-".join(name.split("-")[:2]) for name in folders)


def test_what_was_saved_comes_back_and_stock_safetensors_reads_it(make: Make, tmp_path: Path) -> None:
    assert make().newest() is None
    save(make(), 4)
    newest = make().newest()
    assert newest is not None
    tensors, manifest = newest
    assert (manifest["step"], manifest["curve"]) == (4, CURVE)
    assert [list(row) for row in manifest["curve"]] == [list(row) for row in CURVE], "the order of a row's keys is kept"
    assert tensors.keys() == set(NAMES)
    assert all((t["exp_avg_sq"] == 6.0).all() for t in tensors.values())
    file = tmp_path / "resume/step-000004/rank-00000-of-00001.safetensors"
    assert load_file(file).keys() == {f"{kind}/{name}" for name in NAMES for kind in tensors[name]}
    assert manifest["files"][file.name] == {"size": file.stat().st_size, "sha256": disk.sha256(file)}


def test_the_bytes_of_a_share_hold_what_stock_safetensors_writes(tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(0)
    shapes = [(), (0,), (7,), (3, 5), (1100, 1000), (2, 3, 4)]
    tensors = {f"t{n}": torch.randn(shape, generator=draw) for n, shape in enumerate(shapes)}
    tensors["transposed"] = torch.randn(5, 3, generator=draw).T
    share = RankFile(tensors)
    (tmp_path / "ours").write_bytes(b"".join(share))
    assert share.facts() == {"size": (tmp_path / "ours").stat().st_size, "sha256": disk.sha256(tmp_path / "ours")}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "stock")
    ours, stock = load_file(tmp_path / "ours"), load_file(tmp_path / "stock")
    assert ours.keys() == stock.keys()
    assert all(torch.equal(ours[name], stock[name]) and ours[name].shape == stock[name].shape for name in stock)


@pytest.mark.parametrize(
    ("keep", "stay"),
    [
        ({}, {50, 60}),
        ({"last": 1}, {60}),
        ({"last": 9}, {10, 20, 30, 40, 50, 60}),
        ({"last": 1, "every": 20}, {20, 40, 60}),
        ({"last": 1, "every": 7}, {60}),
        ({"last": 1, "best": 1}, {30, 60}),
        ({"last": 2, "best": 2}, {10, 30, 50, 60}),
        ({"last": 1, "best": 9}, {10, 30, 60}),
    ],
)
def test_last_every_and_best_stay(keep: dict[str, int], stay: set[int]) -> None:
    """Checkpoints 10, 30 and 50 have a validation loss, and that of 50 is not finite."""
    losses = {10: 0.4, 25: 0.1, 30: 0.2, 50: float("inf")}
    curve = [{"step": step} | ({"validation_loss": losses[step]} if step in losses else {}) for step in range(61)]
    assert to_keep(range(10, 70, 10), curve, Retention.model_validate(keep)) == stay


def test_what_need_not_stay_is_removed_after_the_next_is_sealed(make: Make, resume: str) -> None:
    curve = [{"step": 3, "validation_loss": 0.1}, {"step": 6, "validation_loss": 0.2}]
    save(make(resume, best=1), 3, 6, 9, 12, curve=curve)
    assert names(resume) == ["step-000003", "step-000009", "step-000012"]
    assert newest_step(make(resume)) == 12


def test_one_that_was_passed_over_does_not_count_as_one_of_the_last(make: Make, tmp_path: Path) -> None:
    """Its step is the highest, so a policy that keeps the last two would keep it forever."""
    save(make(), 4, 8)
    damaged = tmp_path / "resume/step-000008/manifest.json"
    damaged.write_text(damaged.read_text().replace("8", "9", 1))
    again = make(last=1)
    assert newest_step(again) == 4
    save(again, 6)
    assert names(str(tmp_path / "resume")) == ["step-000006"]
    assert newest_step(make()) == 6


def test_an_attempt_that_was_taken_for_lost_removes_none_of_the_one_that_took_over(make: Make, resume: str) -> None:
    lost, other = make(resume), make(resume)
    save(lost, 2, 4)
    assert newest_step(other) == 4
    save(other, 6, 8)
    save(lost, 5)
    assert names(resume) == ["step-000005", "step-000006", "step-000008"]
    save(other, 10)
    assert names(resume) == ["step-000008", "step-000010"]
    assert newest_step(make(resume)) == 10


def test_a_damaged_one_is_passed_over_and_written_again(make: Make, resume: str) -> None:
    save(make(resume), 2, 4)
    if "://" in resume:
        name = next(name for name in s3.names(resume) if "step-000004" in name and name.endswith(".safetensors"))
        s3.write(f"{resume}/{name}", [memoryview(b"damaged")])
    else:
        (Path(resume) / "step-000004/rank-00000-of-00001.safetensors").write_bytes(b"damaged")
    again = make(resume)
    assert newest_step(again) == 2
    save(again, 4)
    assert newest_step(make(resume)) == 4


def test_drafts_of_killed_attempts_are_removed_and_never_taken(make: Make, resume: str, tmp_path: Path) -> None:
    save(make(resume), 2)
    if "://" in resume:
        s3.write(f"{resume}/step-000004-dead/rank-00000-of-00002.safetensors", [memoryview(b"half")])
    else:
        shutil.copytree(Path(resume) / "step-000002", Path(resume) / ".step-000004-dead")
        (Path(resume) / "step-000006").mkdir()  # has no manifest, so no draft was renamed to it
    again = make(resume)
    assert newest_step(again) == 2
    assert "step-000004" not in names(resume)
    assert not any(name.startswith(".") for name in names(resume))
    save(again, 4)
    assert newest_step(make(resume)) == 4


def test_another_machine_resumes_from_s3_and_keeps_no_copy(
    make: Make, s3_store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resume = f"{s3_store}/resume/address"
    save(make(resume), 2)
    assert not list((tmp_path / "copies").rglob("*.safetensors")), "what is saved goes to S3 without touching the disk"
    monkeypatch.setenv("VILA_CACHE", str(tmp_path / "other"))

    class Engine:
        restored: Any = None

        def restore(self, states: Any, *, step: int) -> None:
            self.restored = {name: {key: t.clone() for key, t in one.items()} for name, one in states.items()}, step

    engine = Engine()
    assert make(resume).restore(engine) == (2, CURVE)  # type: ignore[arg-type]
    tensors, step = engine.restored
    assert step == 2
    assert all(torch.equal(tensors[name][key], one) for name, own in states(2.0).items() for key, one in own.items())
    assert not list((tmp_path / "other").rglob("*.safetensors"))


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """A disk whose fsync does not return until the event is set."""
    event, fsync = threading.Event(), os.fsync

    def wait_and_sync(descriptor: int) -> None:
        assert event.wait(60)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", wait_and_sync)
    yield event
    event.set()


def test_training_goes_on_while_a_slow_disk_writes_what_was(make: Make, held: threading.Event, tmp_path: Path) -> None:
    """The tensors are large and changed in reverse order, so that an unfinished copy would have the change."""
    own = {f"w{n}": {"param": torch.full((4_000_000,), float(n))} for n in range(4)}
    checkpoints = make()
    checkpoints.save(4, iter(own.items()), CURVE)
    checkpoints.wait_for_staging()
    for tensors in reversed(own.values()):
        tensors["param"].fill_(-1.0)  # the next step
    assert not list(tmp_path.glob("resume/step-*")), "it is not sealed before its bytes are on the disk"
    held.set()
    checkpoints.close()
    newest = make().newest()
    assert newest is not None
    assert all((newest[0][f"w{n}"]["param"] == n).all() for n in range(4))


def test_a_second_save_waits_for_the_first(make: Make, held: threading.Event, tmp_path: Path) -> None:
    checkpoints, sealed = make(), []
    checkpoints.save(4, iter(states(4.0).items()), CURVE)
    checkpoints.wait_for_staging()
    before = checkpoints.stall_seconds

    def second() -> None:
        checkpoints.save(5, iter(states(5.0).items()), CURVE)
        sealed.append((tmp_path / "resume/step-000004").exists())

    waiting = threading.Thread(target=second)
    waiting.start()
    waiting.join(0.2)
    assert waiting.is_alive()
    held.set()
    waiting.join(60)
    checkpoints.close()
    assert sealed == [True]
    assert checkpoints.stall_seconds - before > 0.1, "the wait is counted"
    assert newest_step(make()) == 5


def test_what_is_gathered_is_saved_as_it_is_given(make: Make) -> None:
    checkpoints = make(live=False)
    save(checkpoints, 2, 4)
    assert newest_step(make()) == 4


def test_a_save_that_failed_is_raised_by_the_next_and_by_close(make: Make, tmp_path: Path) -> None:
    for end in ("save", "close"):
        checkpoints = make()
        save(make(), 2)
        shutil.rmtree(tmp_path / "resume")
        (tmp_path / "resume").write_text("a file where the folder was")
        checkpoints.save(4, iter(states(4.0).items()), CURVE)
        with pytest.raises(
            OSError, match=r"step-000004-\w+ was not written|/resume/\.step-000004-\w+/rank-00000"
        ) as raised:
            checkpoints.close() if end == "close" else checkpoints.save(6, iter(states(6.0).items()), CURVE)
        assert raised.value.errno is not None
        (tmp_path / "resume").unlink()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the checkpoints and results of two ranks: see `checkpoint_ranks.py`."""
    folder = tmp_path_factory.mktemp("ranks")
    with ranks(Path(__file__).parent / "checkpoint_ranks.py", folder) as both:
        assert [rank.wait() for rank in both] == [0, -signal.SIGKILL]
    return folder


@pytest.mark.slow
def test_ranks_write_shares_that_any_world_size_reads(two_ranks: Path, make: Make) -> None:
    folder = two_ranks / "whole/step-000004"
    shares = [set(load_file(path)) for path in sorted(folder.glob("*.safetensors"))]
    assert [len(share) for share in shares] == [3, 3], "each rank has its own"
    assert not shares[0] & shares[1]
    for rank in range(2):
        assert json.loads((two_ranks / f"result-{rank}.json").read_text())["newest"] == 4
    shutil.copytree(two_ranks / "whole", two_ranks / "read")
    assert newest_step(make(str(two_ranks / "read"))) == 4


@pytest.mark.slow
def test_damage_that_one_rank_sees_makes_all_go_back(two_ranks: Path) -> None:
    for rank in range(2):
        assert json.loads((two_ranks / f"result-{rank}.json").read_text())["newest with damage"] == 2


def test_where_one_rank_cannot_write_all_are_told(two_ranks: Path) -> None:
    first, second = (json.loads((two_ranks / f"result-{rank}.json").read_text())["failed"] for rank in range(2))
    assert "rank-00001-of-00002.safetensors was not written (File too large, after" in second
    assert first == f"rank 1: {second}"


def test_a_rank_that_dies_while_it_writes_leaves_the_one_before(two_ranks: Path, make: Make) -> None:
    assert "RuntimeError" in json.loads((two_ranks / "result-0.json").read_text())["died"]
    left = sorted(path.name.split("-")[1] for path in (two_ranks / "broken").iterdir())
    assert left == ["000002", "000008"]
    again = make(str(two_ranks / "broken"))
    assert newest_step(again) == 2
    assert [path.name for path in (two_ranks / "broken").iterdir()] == ["step-000002"]
