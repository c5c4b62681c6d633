"""`vila-ops gc` lists what killed processes left, and removes what nothing needs, and nothing else."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from vila_ops import leftovers
from vila_ops.artifacts.attempts import attempt
from vila_ops.artifacts.kinds import Checkpoint
from vila_ops.artifacts.leases import Holder, hold
from vila_ops.artifacts.store import Address, address, begin, seal
from vila_ops.cli import app
from vila_ops.config import Resources
from vila_ops.pipeline.sweeper import lease_of
from vila_ops.train.checkpoint.unfinished import resume_folders, write_label

HEX = "0123456789ab"
FACTS = {"stage": "sft", "step": 4}


def at(number: int) -> Address:
    return address(Checkpoint, revision=1, recipe={"number": number}, parents=())


def sealed(store: str, number: int) -> Checkpoint:
    with attempt(at(number), store=store) as folder:
        (folder / "model.safetensors").write_bytes(bytes(500))
    return seal(Checkpoint, at(number), folder, facts=FACTS, execution={})


def resume(store: str, number: int, *, step: int) -> Path:
    """A resume folder as a killed stage leaves it, with a checkpoint and a draft of the next."""
    folder = Path(store) / "resume" / at(number).key
    write_label(str(folder), "sft")
    for name in (f"step-{step:06d}", f".step-{step + 2:06d}-0a1b2c3d"):
        (folder / name).mkdir()
        (folder / name / "rank-00000-of-00001.safetensors").write_bytes(bytes(1000))
    (folder / f"step-{step:06d}" / "manifest.json").write_text("{}")
    return folder


def age(*folders: Path, days: float) -> None:
    for folder in folders:
        for path in (folder, *folder.rglob("*")):
            os.utime(path, (time.time() - 86400 * days,) * 2, follow_symlinks=False)


@pytest.fixture
def resources(make_resources: Callable[..., Resources], tmp_path: Path) -> Resources:
    return make_resources(tmp_path)


@pytest.fixture
def gc(resources: Resources, tmp_path: Path) -> Callable[..., list[dict[str, Any]]]:
    """Runs the command; returns what it lists."""
    file = tmp_path / "resources.yaml"
    file.write_text(yaml.safe_dump(resources.model_dump(mode="json")))

    def run(*more: str) -> list[dict[str, Any]]:
        done = CliRunner().invoke(app, ["gc", "-r", str(file), "--json", *more], catch_exceptions=False)
        assert done.exit_code == 0, done.stderr
        listed: list[dict[str, Any]] = json.loads(done.stdout)
        return listed

    return run


def removable(listed: list[dict[str, Any]]) -> set[str]:
    return {one["place"] for one in listed if one["kept"] is None}


def tree(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}


def test_everything_that_a_kill_leaves_is_listed_and_removed_and_a_strangers_files_stay(
    resources: Resources, gc: Callable[..., Any], tmp_path: Path
) -> None:
    store, cache = Path(resources.storage.store), Path(resources.storage.cache)
    made = sealed(str(store), 0)
    done = resume(str(store), 0, step=2)
    killed = begin(at(1), store=str(store))
    (killed / "model.safetensors").write_bytes(bytes(3000))
    left = [
        store / f"checkpoint/{at(1).key}/{killed.name}-rank-0.json",
        store / f"checkpoint/{at(0).key}/.manifest.json-{HEX}",
        store / f"leases/checkpoint/{at(1).key}/.000000000001-{HEX}",
        store / ".probe-a_b1c2d3/taken",
        store / f"plans/.index-{HEX}-{HEX}/keys.npy",
        store / "features/tower/ab/.abcd-01234567",
        store / f"resume/.{at(9).key}-removed-{HEX}/step-000001/manifest.json",
        cache / "packages/.npm-a-1-0123.k1ll3d/content/a",
        cache / "converted/.vision-tower-0123.k1ll3d/content/a",
        cache / "archives/.0123.k1ll3d/a.whl",
        tmp_path / f"data/.mine.vila-ops-{HEX}/files/a.tar",
    ]
    strangers = [
        store / "notes.txt", store / ".hidden", store / "checkpoint/.notes", store / f"checkpoint/{at(1).key}/mine",
        store / "resume/.notes", store / "plans/.notes", cache / "packages/mine/a", tmp_path / "data/.mine-backup/a",
        tmp_path / f"data/.mine-{HEX}/a", tmp_path / "data/mine/files/a.tar",
    ]  # fmt: skip
    for path in (*left, *strangers):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(10))
    age(tmp_path, days=9)
    before = tree(tmp_path)
    listed = gc()
    assert tree(tmp_path) == before, "without --delete it only lists"
    tops = {str(done), str(killed), *(str(next(p for p in (path, *path.parents) if is_top(p))) for path in left)}
    assert removable(listed) == tops
    assert listed[0]["num_bytes"] == 3000, "the largest first"
    gc("--delete")
    remaining = tree(tmp_path)
    assert before - remaining == {name for name in before if any((tmp_path / name).is_relative_to(top) for top in tops)}
    assert {path.relative_to(tmp_path).as_posix() for path in strangers} <= remaining
    assert seal_is_whole(made)
    assert removable(gc()) == set()


def is_top(path: Path) -> bool:
    """Whether a path of the list above is what is removed as a whole."""
    return path.name.startswith((".", "attempt-")) and path.parent.name[:1] != "."


def seal_is_whole(made: Checkpoint) -> bool:
    return len(list(Path(made.uri).glob("attempt-*/model.safetensors"))) == 1


def test_what_a_live_process_holds_or_just_wrote_is_kept(
    resources: Resources, gc: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = resources.storage.store
    part = Address("shard", "0" * 32, None, ())
    with hold(at(1), store=store):
        training, folder = begin(at(1), store=store), resume(store, 1, step=2)
        writing, other = begin(part, store=store), begin(at(2), store=store)
        with hold(at(2), store=store):
            pass  # released
        age(training, folder, writing, other, days=30)
        for more in ((), ("--older-than", "1")):
            kept = {one["place"]: one["kept"] for one in gc(*more) if one["kept"] is not None}
            assert kept.keys() == {str(training), str(folder), str(writing)}
            assert set(kept.values()) == {"a process holds its lease"}
        found = {one.place: one for one in leftovers.find(resources, grace_hours=0)}
        with pytest.raises(ValueError, match="is in use: a process holds its lease; wait"):
            leftovers.remove(found[str(folder)], store=store)
        gc("--delete")
        assert (training.exists(), folder.exists(), writing.exists(), other.exists()) == (True, True, True, False)
    assert {str(training), str(writing)} <= removable(gc())
    young = begin(at(3), store=store)
    assert str(young) not in removable(gc("--older-than", "1"))
    monkeypatch.setattr(Holder, "is_gone", lambda _: False)  # of another host
    with hold(at(3), store=store):
        age(young, days=30)
        assert str(young) not in removable(gc())
        age(Path(store) / "leases", days=30)
        assert str(young) in removable(gc()), "nothing was heard of its holder for a month"


def test_the_progress_of_an_unfinished_stage_goes_only_where_its_user_says_so(
    resources: Resources, gc: Callable[..., Any]
) -> None:
    store = resources.storage.store
    first, second = (resume(store, number, step=number) for number in (2, 4))
    age(first, second, days=3)
    listed = {one["place"]: one for one in gc()}
    draft = str(first / ".step-000004-0a1b2c3d")
    assert {str(first), str(second), draft} <= listed.keys()
    assert listed[str(first)]["what"] == "resume checkpoints of stage sft, the last after step 2"
    assert listed[str(first)]["num_bytes"] > 2000
    assert 2.9 < (time.time() - listed[str(first)]["changed"]) / 86400 < 3.1
    gc("--delete")
    assert not Path(draft).exists()
    assert [(one.address, one.step) for one in resume_folders(store)] == sorted([(first.name, 2), (second.name, 4)])
    gc("--delete", "--also", str(first))
    assert [one.place for one in resume_folders(store)] == [str(second)]
    told = CliRunner().invoke(app, ["gc", "--also", "nowhere"])
    assert isinstance(told.exception, ValueError)
    assert "--also nowhere is not a place of the list" in str(told.exception)


def test_a_stage_that_ended_before_its_first_checkpoint_has_no_progress_to_keep(
    resources: Resources, gc: Callable[..., Any]
) -> None:
    folder = Path(resources.storage.store) / "resume" / at(1).key
    write_label(str(folder), "sft")
    listed = {one["place"]: one for one in gc()}
    assert listed[str(folder)]["what"] == "a folder of stage sft, which ended before its first resume checkpoint"
    assert str(folder) in removable(list(listed.values()))
    gc("--delete")
    assert not folder.exists()


def test_the_lease_of_a_flow_run_goes_some_time_after_its_end(resources: Resources, gc: Callable[..., Any]) -> None:
    store = resources.storage.store
    ended, running = lease_of("11111111"), lease_of("22222222")
    with hold(running, store=store):
        with hold(ended, store=store):
            pass
        place = Path(store) / "leases/flow_run/11111111"
        assert [one["place"] for one in gc()] == [str(place)]
        assert removable(gc()) == set()
        age(place, days=2)
        assert removable(gc("--delete")) == {str(place)}
        assert [path.name for path in place.parent.iterdir()] == ["22222222"]


def test_a_list_for_people_says_size_age_and_reason(
    resources: Resources, tmp_path: Path, gc: Callable[..., Any]
) -> None:
    folder = resume(resources.storage.store, 2, step=2)
    age(folder, days=3)
    done = CliRunner().invoke(app, ["gc", "-r", str(tmp_path / "resources.yaml")])
    lines = done.stdout.splitlines()
    assert lines[0].split("  ")[1:] == ["3 days", str(folder)]
    assert lines[1].strip() == "resume checkpoints of stage sft, the last after step 2"
    assert lines[2].strip() == "kept: only it has the progress of a stage that was not finished"
    assert max(map(len, lines[1:3])) <= 80
    assert "1 of 2" in done.stderr
    assert "would be removed with --delete" in done.stderr


def test_on_s3_uploads_without_a_manifest_are_found_too(
    make_resources: Callable[..., Resources], tmp_path: Path, s3_store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vila_ops.artifacts import s3

    resources = make_resources(tmp_path, **{"storage.store": s3_store})
    made = sealed(s3_store, 0)
    folder = begin(at(1), store=s3_store)
    (folder / "model.safetensors").write_bytes(bytes(3000))
    s3.publish(folder, f"{at(1).uri(s3_store)}/{folder.name}")
    for place in (
        f"{s3_store}/resume/{at(2).key}/step-000002-0a1b2c3d",
        f"{s3_store}/resume/{at(0).key}/step-000002-0a1b2c3d",
    ):
        s3.create(f"{place}/rank-00000-of-00001.safetensors", bytes(100))
    s3.create(f"{s3_store}/resume/{at(2).key}/step-000001-0a1b2c3d/manifest.json", b"{}")
    write_label(f"{s3_store}/resume/{at(2).key}", "sft")
    s3.create(f"{s3_store}/.probe/0a1b2c3d", bytes(10))
    assert removable([one.model_dump() for one in leftovers.find(resources, grace_hours=24)]) == {
        f"{s3_store}/resume/{at(0).key}"
    }, "the rest changed just now"
    monkeypatch.setattr(leftovers, "_in_grace", lambda one, latest: one)  # nobody can set the time of an object
    found = leftovers.find(resources, grace_hours=24)
    assert removable([one.model_dump() for one in found]) == {
        str(folder),
        f"{at(1).uri(s3_store)}/{folder.name}",
        f"{s3_store}/resume/{at(0).key}",
        f"{s3_store}/resume/{at(2).key}/step-000002-0a1b2c3d",
        f"{s3_store}/.probe/0a1b2c3d",
    }
    for one in found:
        if one.kept is None:
            leftovers.remove(one, store=s3_store)
    names = s3.names(s3_store)
    assert [name for name in names if at(1).key in name and "leases" not in name] == []
    assert sorted(name for name in names if name.startswith("resume/")) == [
        f"resume/{at(2).key}/stage.json", f"resume/{at(2).key}/step-000001-0a1b2c3d/manifest.json"
    ]  # fmt: skip
    assert s3.names(made.uri)
    assert not [name for name in names if name.startswith(".probe")]
