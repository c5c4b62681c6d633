"""What is read of a sealed artifact was compared first; the printed way out of damage works."""

import hashlib
import os
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from vila_ops.artifacts import disk
from vila_ops.artifacts.copies import copy_of
from vila_ops.artifacts.exports import export
from vila_ops.artifacts.kinds import Dataset, EvalReport, Shard
from vila_ops.artifacts.s3 import names
from vila_ops.artifacts.s3_calls import client, place
from vila_ops.artifacts.store import (
    address,
    begin,
    content,
    file,
    find,
    find_in,
    opened,
    read_manifest,
    seal,
    verify,
    verify_folder,
)
from vila_ops.errors import CorruptArtifact
from vila_ops.eval.report import Report, ReportMetric, read_report, write_report

FACTS = {"num_samples": 1, "num_tokens": 2}
TAR = bytes(range(256)) * 8


def damage(uri: str, *, bit: int = 3) -> None:
    """Flip one bit of a place of a store, of which this machine keeps no copy."""
    if "://" not in uri:
        Path(uri).write_bytes(flipped(Path(uri).read_bytes(), bit))
        return
    body = client().get_object(**place(uri))["Body"].read()
    client().put_object(**place(uri), Body=flipped(body, bit))
    shutil.rmtree(copy_of("s3://"))


def flipped(data: bytes, bit: int) -> bytes:
    other = bytearray(data)
    other[bit // 8] ^= 1 << bit % 8
    return bytes(other)


def named(message: str) -> list[str]:
    """The folders that a message says to move away."""
    found = re.search(r"move (?:all of )?(.+) away and run again", message)
    assert found, message
    return found[1].split(", ")


def move_away(uri: str, to: Path) -> None:
    if "://" not in uri:
        to.mkdir(exist_ok=True)
        shutil.move(uri, to)
        return
    for name in names(uri):
        client().delete_object(**place(f"{uri}/{name}"))


def shard(store: str) -> Shard:
    """Found, or made."""
    at = address(Shard, revision=1, recipe={}, parents=())
    if done := find(Shard, at, store=store):
        return done
    attempt = begin(at, store=store)
    (attempt / "shard.tar").write_bytes(TAR)
    (attempt / "counts.json").write_text('{"records": 12}')
    return seal(Shard, at, attempt, facts={"num_samples": 1}, execution={})


def dataset(store: str, revision: int = 1) -> Dataset:
    """Found, or made of the shard."""
    at = address(Dataset, revision=revision, recipe={}, parents=())
    if done := find(Dataset, at, store=store):
        return done
    attempt = begin(at, store=store)
    (attempt / "index").write_text("one")
    return seal(Dataset, at, attempt, facts=FACTS, execution={}, known={"a.tar": (shard(store), "shard.tar")})


def places(artifact: Dataset | Shard) -> dict[str, str]:
    return {name: where for name, (where, _) in opened(artifact).places.items()}


@pytest.mark.parametrize("name", ["shard.tar", "counts.json"])
def test_one_flipped_bit_is_named_by_every_way_to_read(name: str, store: str, tmp_path: Path) -> None:
    made = shard(store)
    damage(places(made)[name], bit=random.Random(name).randrange(8 * 15))
    other = ({"shard.tar", "counts.json"} - {name}).pop()
    ways: list[Callable[[], object]] = [
        lambda: file(made, name),
        lambda: content(made),
        lambda: export(made, tmp_path / "out"),
        lambda: verify(made),
    ]
    for read in ways:
        with pytest.raises(CorruptArtifact, match=rf"{made.uri}/attempt-\w+/{name} .*sealed.*move {made.uri} away"):
            read()
    assert file(made, other).is_file()


def test_an_edit_right_after_a_read_is_seen(tmp_path: Path) -> None:
    """Also within one tick of the file system's clock, where no time of the file changes."""
    made = shard(str(tmp_path))
    path = Path(places(made)["shard.tar"])
    for turn in range(100):
        assert file(made, "shard.tar") == path
        path.write_bytes(flipped(TAR, turn))
        with pytest.raises(CorruptArtifact, match=r"shard\.tar has sha256"):
            file(made, "shard.tar")
        path.write_bytes(TAR)


def test_a_file_is_hashed_once_a_process_and_again_once_it_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = dataset(str(tmp_path))
    read: list[str] = []
    own = hashlib.file_digest

    def noted(file: object, *rest: object) -> object:
        read.append(Path(file.name).name)  # type: ignore[attr-defined]
        return own(file, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(hashlib, "file_digest", noted)
    monkeypatch.setattr(disk, "SETTLED_SECONDS", -1.0)
    for _ in range(3):
        content(made)
        file(shard(str(tmp_path)), "shard.tar")
    assert sorted(read) == ["a.tar", "index"]
    verify(made)
    assert sorted(read) == ["a.tar", "a.tar", "index", "index"], "verify reads the bytes again"
    path = Path(places(made)["index"])
    before = path.stat()
    while path.stat().st_ctime_ns == before.st_ctime_ns:
        path.write_text("onE")
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(CorruptArtifact, match="index has sha256"):
        content(made)


@pytest.mark.slow
def test_the_way_out_of_a_damaged_shared_file_works(store: str, tmp_path: Path) -> None:
    made = dataset(store)
    digest, part = made.digest, shard(store)
    if "://" not in store:
        dataset(store, revision=2)
    damage(places(made)["a.tar"])
    with pytest.raises(CorruptArtifact, match=r"tar .*sealed") as told:
        file(made, "a.tar")
    assert {made.uri, part.uri} <= set(named(str(told.value)))
    assert len(named(str(told.value))) == (2 if "://" in store else 3)
    with pytest.raises(CorruptArtifact) as same:
        verify(made)
    assert named(str(same.value)) == named(str(told.value))
    for uri in named(str(told.value)):
        move_away(uri, tmp_path / f"away-{Path(uri).parent.name}")
    rebuilt = dataset(store)
    verify(rebuilt)
    assert rebuilt.digest == digest
    assert file(rebuilt, "a.tar").read_bytes() == TAR


def test_a_folder_named_from_within_the_store_names_its_neighbours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = dataset(str(tmp_path))
    part = shard(str(tmp_path))
    damage(places(part)["shard.tar"])
    at = "/".join(Path(part.uri).parts[-2:])
    for folder, name in ((tmp_path, at), (tmp_path / "shard", Path(at).name), (Path(part.uri), ".")):
        monkeypatch.chdir(folder)
        with pytest.raises(CorruptArtifact, match=r"shard\.tar has sha256") as told:
            verify_folder(name)
        assert named(str(told.value)) == [part.uri, made.uri]


def test_a_dataset_is_not_sealed_with_a_damaged_file_of_a_shard(store: str, tmp_path: Path) -> None:
    """Whoever moves only the dataset away is told of the shard, and of nothing that is gone."""
    made = dataset(store)
    part = shard(store)
    damage(places(part)["shard.tar"])
    move_away(made.uri, tmp_path / "away")
    with pytest.raises(CorruptArtifact, match=r"shard\.tar has sha256") as told:
        dataset(store)
    assert named(str(told.value)) == [part.uri]
    assert find(Dataset, address(Dataset, revision=1, recipe={}, parents=()), store=store) is None
    move_away(part.uri, tmp_path / "away")
    assert dataset(store).digest == made.digest


def test_a_missing_or_truncated_shared_file_has_a_way_out_too(store: str, tmp_path: Path) -> None:
    made = dataset(store)
    part = shard(store)
    where = places(made)["a.tar"]
    if "://" in store:
        client().put_object(**place(where), Body=b"short")
    else:
        Path(where).write_bytes(b"short")
    with pytest.raises(CorruptArtifact, match=r"tar has 5 bytes, sealed with 2048") as told:
        dataset(store)
    assert named(str(told.value)) == [made.uri, part.uri]
    for uri in named(str(told.value)):
        move_away(uri, tmp_path / f"away-{Path(uri).parent.name}")
    assert dataset(store).digest == made.digest


def test_an_exported_folder_is_moved_away_alone(tmp_path: Path) -> None:
    store, out = str(tmp_path / "store"), tmp_path / "data/mine"
    export(dataset(store), out)
    at = address(Dataset, revision=1, recipe={}, parents=())
    exported = find_in(Dataset, at, str(out))
    assert exported
    assert exported.uri == str(out)
    damage(places(exported)["a.tar"])
    with pytest.raises(CorruptArtifact, match=rf"{out}/files/a\.tar has sha256") as told:
        content(exported)
    assert named(str(told.value)) == [str(out)]
    move_away(str(out), tmp_path / "away")
    assert find_in(Dataset, at, str(out)) is None
    found = find(Dataset, at, store=store)
    assert found
    verify(found)


def test_what_was_replaced_by_another_artifact_is_not_read(store: str) -> None:
    made = dataset(store)
    other = Dataset.model_validate({**made.model_dump(), "digest": "0" * 64})
    for read in (content, lambda one: file(one, "index")):
        with pytest.raises(CorruptArtifact, match=f"{made.uri} holds digest {made.digest}, not 0000"):
            read(other)


def test_a_report_with_another_digit_is_not_shown(tmp_path: Path) -> None:
    at = address(EvalReport, revision=1, recipe={}, parents=())
    attempt = begin(at, store=str(tmp_path))
    metric = ReportMetric(
        name="cider", measure="cider", role="model", value=0.125, low=0.1, high=0.2, n=9, lower_is_better=False, unit=""
    )
    content = Report(
        suite="s", split="test", model="m", data="d", benchmarks={}, metrics=(metric,), layers=(), answers=()
    )
    path = write_report(attempt, content)
    made = seal(EvalReport, at, attempt, facts={"suite": "s", "model": "m"}, execution={})
    assert read_report(made) == content
    path.write_text(path.read_text().replace("0.125", "0.925"))
    with pytest.raises(CorruptArtifact, match=rf"report\.json has sha256 .*move {made.uri} away"):
        read_report(made)
    assert read_manifest(made.uri)["digest"] == made.digest
