"""An attempt that fails leaves nothing, and what a killed one left is removed once it is old; nothing else is."""

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from vila_ops.artifacts import s3
from vila_ops.artifacts.attempts import attempt, unsealed
from vila_ops.artifacts.backend import GRACE_SECONDS
from vila_ops.artifacts.copies import copy_of
from vila_ops.artifacts.kinds import Dataset, Shard
from vila_ops.artifacts.s3_calls import client, place
from vila_ops.artifacts.store import Address, address, backend, begin, content, find, opened, read_manifest, seal
from vila_ops.errors import CorruptArtifact, StoreUnreachable

FACTS = {"num_samples": 1, "num_tokens": 2}


def at(number: int = 0) -> Address:
    return address(Dataset, revision=1, recipe={"number": number}, parents=())


def make(where: Address, store: str, text: str = "whole") -> Dataset:
    with attempt(where, store=store) as folder:
        (folder / "a").write_text(text)
    return seal(Dataset, where, folder, facts=FACTS, execution={})


def files(store: str, tmp_path: Path) -> list[str]:
    """What lies below the kinds' folders of a store, and in this machine's copies of them."""
    stored = [entry.name for entry in backend(store).entries(store) if entry.size]
    local = [path.relative_to(tmp_path).as_posix() for path in tmp_path.glob("copies/s3/**/*") if path.is_file()]
    return [name for name in (*stored, *local) if "leases" not in name and name != "format.json"]


def killed(where: Address, store: str, *, days: float) -> Path:
    """What an attempt that was killed `days` ago left, on this machine and, for S3, in the store."""
    folder = begin(where, store=store)
    (folder / "deep").mkdir()
    (folder / "deep" / "weights").write_bytes(bytes(1000))
    if "://" in store:
        s3.publish(folder, f"{where.uri(store)}/{folder.name}")
    for path in (folder / "deep" / "weights", folder / "deep", folder):
        os.utime(path, (time.time() - 86400 * days,) * 2)
    return folder


@pytest.fixture
def grace(monkeypatch: pytest.MonkeyPatch) -> None:
    """On S3 nobody can set the time of an object, so there everything is old at once."""
    monkeypatch.setattr("vila_ops.artifacts.attempts.GRACE_SECONDS", -60.0)


@pytest.mark.slow
@pytest.mark.parametrize("error", [ValueError("bad"), KeyboardInterrupt(), SystemExit(1)])
def test_whatever_ends_an_attempt_it_leaves_nothing(error: BaseException, store: str, tmp_path: Path) -> None:
    def fail() -> None:
        with attempt(at(), store=store) as folder:
            (folder / "deep").mkdir()
            (folder / "deep" / "half").write_text("of it")
            folder.with_name(f"{folder.name}-rank-0.json").write_text("{}")
            raise error

    with pytest.raises(type(error)):
        fail()
    assert files(store, tmp_path) == []
    made = make(at(), store)
    assert (content(made) / "a").read_text() == "whole"


def test_a_seal_that_fails_leaves_nothing(store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with attempt(at(), store=store) as folder:
        (folder / "a").write_text("whole")
    with pytest.raises(ValueError, match="has no files"):
        seal(Dataset, at(), folder, facts=FACTS, execution={}, known={"b": {"size": 1, "sha256": "0"}})
    assert files(store, tmp_path) == []

    def away(*_: Any) -> None:
        raise StoreUnreachable("it is away")

    with attempt(at(), store=store) as folder:
        (folder / "a").write_text("whole")
    with monkeypatch.context() as patch:
        patch.setattr(backend(store), "publish", away)
        with pytest.raises(StoreUnreachable):
            seal(Dataset, at(), folder, facts=FACTS, execution={})
    assert files(store, tmp_path) == []


def test_an_error_that_may_hide_the_seal_removes_nothing(
    store: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The answer to the write of the manifest is lost; the artifact is whole."""
    create = backend(store).create

    def lost(uri: str, data: bytes) -> bool:
        create(uri, data)
        raise StoreUnreachable("no answer")

    with attempt(at(), store=store) as folder:
        (folder / "a").write_text("whole")
    with monkeypatch.context() as patch:
        patch.setattr(backend(store), "create", lost)
        with pytest.raises(StoreUnreachable):
            seal(Dataset, at(), folder, facts=FACTS, execution={})
    made = find(Dataset, at(), store=store)
    assert made
    assert (content(made) / "a").read_text() == "whole"


def test_the_next_attempt_removes_an_old_one_and_no_young_one(tmp_path: Path) -> None:
    store = str(tmp_path / "store")
    old, young = (killed(at(), store, days=days) for days in (GRACE_SECONDS / 86400 + 0.1, 0.5))
    (old.parent / f".manifest.json-{'0' * 12}").write_text("")
    (old.parent / "notes.txt").write_text("mine")
    elsewhere = killed(at(1), store, days=9)
    make(at(), store)
    assert not old.exists()
    assert young.exists()
    assert elsewhere.exists()
    assert (old.parent / "notes.txt").read_text() == "mine"
    assert {one.place for one in unsealed(store)} == {
        str(young), str(elsewhere), str(old.parent / f".manifest.json-{'0' * 12}")
    }  # fmt: skip


def test_what_is_sealed_is_never_among_what_is_left(store: str, tmp_path: Path, grace: None) -> None:
    made = make(at(), store)
    sealed = Path(killed(at(), store, days=9)).name
    assert {one.place.rpartition("/")[2] for one in unsealed(store)} == {sealed}
    assert sum(one.num_bytes for one in unsealed(store)) == (2000 if "://" in store else 1000)
    with attempt(at(), store=store) as folder:
        pass
    assert not [name for name in files(store, tmp_path) if sealed in name]
    assert find(Dataset, at(), store=store) == made
    assert (content(made) / "a").read_text() == "whole"
    assert {one.place.rpartition("/")[2] for one in unsealed(store)} <= {folder.name}


def test_nothing_is_removed_where_the_manifest_cannot_be_read(tmp_path: Path, grace: None) -> None:
    store = str(tmp_path / "store")
    made = make(at(), store)
    left = killed(at(), store, days=9)
    manifest = Path(made.uri) / "manifest.json"
    whole = manifest.read_text()
    manifest.write_text(whole.replace("whole", "half").replace("attempt-", "attempt_", 1))
    with attempt(at(), store=store) as folder:
        pass
    assert left.exists()
    assert (Path(made.uri) / json.loads(whole)["data"]).exists()
    assert folder.exists()


def test_an_object_that_a_dataset_points_to_is_kept_without_its_own_manifest(s3_store: str, grace: None) -> None:
    where = address(Shard, revision=1, recipe={}, parents=())
    with attempt(where, store=s3_store) as folder:
        (folder / "shard.tar").write_bytes(bytes(100))
    shard = seal(Shard, where, folder, facts={"num_samples": 1}, execution={})
    with attempt(at(), store=s3_store) as folder:
        (folder / "index").write_text("one")
    dataset = seal(Dataset, at(), folder, facts=FACTS, execution={}, known={"a.tar": (shard, "shard.tar")})
    client().delete_object(**place(f"{shard.uri}/manifest.json"))
    assert not [one for one in unsealed(s3_store) if one.place.startswith("s3://")]
    with attempt(where, store=s3_store):
        pass
    assert opened(dataset).file("a.tar").read_bytes() == bytes(100)
    client().delete_object(**place(f"{dataset.uri}/manifest.json"))
    assert {one.place.split("/")[-3] for one in unsealed(s3_store) if one.place.startswith("s3://")} == {
        "shard", "dataset"
    }  # fmt: skip


def test_a_damaged_manifest_stops_the_search_on_s3(s3_store: str) -> None:
    made = make(at(), s3_store)
    killed(at(1), s3_store, days=9)
    client().put_object(**place(f"{made.uri}/manifest.json"), Body=b"{}")
    with pytest.raises(CorruptArtifact, match="is not a manifest"):
        unsealed(s3_store)


def test_what_is_only_on_this_machine_is_found_too(s3_store: str, grace: None) -> None:
    folder = begin(at(), store=s3_store)
    (folder / "half").write_text("of it")
    assert [one.place for one in unsealed(s3_store)] == [str(folder)]
    assert str(folder).startswith(str(copy_of("s3://")))
    make(at(), s3_store)
    assert not folder.exists()
    assert read_manifest(at().uri(s3_store))
