"""What a store promises, on disk and on S3."""

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from tests.racing import FORKS, racer, racers
from vila_ops.artifacts.attempts import keep
from vila_ops.artifacts.backend import FileFacts
from vila_ops.artifacts.exports import export
from vila_ops.artifacts.folders import folder_digest
from vila_ops.artifacts.kinds import Checkpoint, Dataset, Shard
from vila_ops.artifacts.s3_calls import client, place
from vila_ops.artifacts.store import (
    Address,
    address,
    begin,
    content,
    file,
    find,
    find_in,
    probe,
    read_manifest,
    seal,
    verify,
)
from vila_ops.config import fingerprint
from vila_ops.errors import CorruptArtifact, OtherFormat

RECIPE = {"rate": 1e-05, "name": "é"}
FACTS = {"num_samples": 1, "num_tokens": 2}


def at(**more: Any) -> Address:
    return address(Dataset, **{"revision": 1, "recipe": RECIPE, "parents": ("p",), **more})


def write(store: Path | str, text: str = "hello", *, where: Address | None = None) -> Dataset:
    attempt = begin(where or at(), store=str(store))
    (attempt / "sub").mkdir()
    (attempt / "sub/a.txt").write_text(text)
    (attempt / "b.bin").write_bytes(bytes(range(256)))
    return seal(Dataset, where or at(), attempt, facts=FACTS, execution={"seconds": time.time()})


def stored(uri: str) -> dict[str, bytes]:
    """Every file below a place of a store."""
    if "://" not in uri:
        return tree(Path(uri))
    bucket, prefix = place(f"{uri}/").values()
    keys = [found["Key"] for found in client().list_objects_v2(Bucket=bucket, Prefix=prefix).get("Contents", [])]
    return {key.removeprefix(prefix): client().get_object(Bucket=bucket, Key=key)["Body"].read() for key in keys}


def overwrite(uri: str, data: bytes | None) -> None:
    """Other bytes at a place of a store, or none."""
    match "://" in uri, data:
        case False, None:
            Path(uri).unlink()
        case False, bytes(data):
            Path(uri).write_bytes(data)
        case True, None:
            client().delete_object(**place(uri))
        case True, bytes(data):
            client().put_object(**place(uri), Body=data)


def test_sealed_is_found_and_reads_back(store: str) -> None:
    assert find(Dataset, at(), store=store) is None
    made = write(store)
    assert find(Dataset, at(), store=store) == made
    assert (made.num_samples, made.num_tokens, made.parents) == (1, 2, ("p",))
    assert tree(content(made)) == {"sub/a.txt": b"hello", "b.bin": bytes(range(256))}
    assert file(made, "sub/a.txt").read_text() == "hello"
    verify(made)
    attempt = content(made).name
    assert set(stored(made.uri)) == {f"{attempt}/sub/a.txt", f"{attempt}/b.bin", "manifest.json"}
    with pytest.raises(ValueError, match=r"has no file 'c'; it has \['b.bin', 'sub/a.txt'\]"):
        file(made, "c")


def test_an_address_is_kind_revision_recipe_and_parents() -> None:
    changed = [{"revision": 2}, {"recipe": {**RECIPE, "rate": 2e-05}}, {"parents": ("q",)}, {"parents": ("p", "p")}]
    keys = {at().key, *(at(**change).key for change in changed)}
    assert len(keys) == 5
    other = address(Checkpoint, revision=1, recipe=RECIPE, parents=("p",))
    assert (other.kind, other.key in keys) == ("checkpoint", False)
    assert at(recipe=dict(reversed(RECIPE.items()))).key == at().key


def test_a_digest_is_of_bytes_names_and_facts_and_nothing_else(tmp_path: Path, s3_store: str) -> None:
    one = write(tmp_path / "a")
    assert write(s3_store).digest == one.digest
    assert write(tmp_path / "b", where=at(revision=2)).digest == one.digest
    assert write(tmp_path / "c", "hellO").digest != one.digest


def race(store: str, number: int) -> tuple[str, str]:
    attempt = begin(at(), store=store)
    (attempt / "a.txt").write_text(f"{number}" * 1000)
    made = seal(Dataset, at(), attempt, facts=FACTS, execution={})
    return made.digest, (content(made) / "a.txt").read_text()[:1]


@pytest.mark.slow
def test_of_eight_racing_processes_one_seals_and_all_agree(store: str) -> None:
    with racers(8) as pool:
        for turn in range(2 if "://" in store else 5):
            told = set(pool.map(race, [f"{store}/{turn}"] * 8, range(8)))
            assert len(told) == 1
            found = find(Dataset, at(), store=f"{store}/{turn}")
            assert found is not None
            verify(found)
            assert sorted(stored(found.uri)) == [f"{content(found).name}/a.txt", "manifest.json"]


@pytest.mark.slow
def test_of_eight_racing_threads_one_seals_and_all_agree(store: str) -> None:
    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(race, [store] * 8, range(8)))) == 1


def sleeper(store: str, waking: Connection) -> None:
    attempt = begin(at(), store=store)
    (attempt / "a.txt").write_text("from before")
    waking.send("asleep")
    waking.recv()
    seal(Dataset, at(), attempt, facts=FACTS, execution={})


@pytest.mark.slow
def test_a_writer_that_slept_loses_and_its_attempt_is_removed(store: str) -> None:
    waking, theirs = FORKS.Pipe()
    process = racer(sleeper, store, theirs)
    assert waking.poll(60)
    assert find(Dataset, at(), store=store) is None
    made = write(store)
    before = stored(made.uri)["manifest.json"]
    waking.send("awake")
    process.join(60)
    assert process.exitcode == 0
    verify(made)
    left = stored(made.uri)
    assert left.pop("manifest.json") == before
    assert {name.partition("/")[0] for name in left} == {content(made).name}


def test_a_crash_before_the_manifest_leaves_nothing_to_find(tmp_path: Path) -> None:
    code = (
        "import os, sys; from vila_ops.artifacts import store; "
        "from vila_ops.artifacts.kinds import Dataset; root = sys.argv[1]; "
        "at = store.address(Dataset, revision=1, recipe={'rate': 1e-05, 'name': 'é'}, parents=('p',)); "
        "attempt = store.begin(at, store=root); (attempt / 'a').write_text('half'); "
        "os.link = lambda *_: os.kill(os.getpid(), 9); "
        "store.seal(Dataset, at, attempt, facts={}, execution={})"
    )
    died = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert died.returncode == -9
    assert list(Path(at().uri(str(tmp_path))).glob("attempt-*/a")), "it worked at this address"
    assert find(Dataset, at(), store=str(tmp_path)) is None
    made = write(tmp_path)
    assert find(Dataset, at(), store=str(tmp_path)) == made


@pytest.mark.slow
def test_any_flipped_bit_of_files_or_manifest_is_found(store: str) -> None:
    made = write(store)
    draw = random.Random(0)
    files = stored(made.uri)
    for turn in range(20 if "://" in store else 400):
        name = "manifest.json" if turn % 2 == 0 else draw.choice(sorted(files)[:-1])
        flipped = bytearray(files[name])
        flipped[draw.randrange(len(flipped))] ^= 1 << draw.randrange(8)
        overwrite(f"{made.uri}/{name}", bytes(flipped))
        with pytest.raises(CorruptArtifact, match=r"\S"):
            verify(made)
        overwrite(f"{made.uri}/{name}", files[name])
    verify(made)


@pytest.mark.parametrize("left", [b"short", None])
def test_a_truncated_or_missing_file_is_found_at_once(left: bytes | None, store: str) -> None:
    made = write(store)
    overwrite(f"{made.uri}/{content(made).name}/b.bin", left)
    with pytest.raises(CorruptArtifact, match=r"b\.bin (is missing|has 5 bytes).*run again to rebuild it"):
        find(Dataset, at(), store=store)


def test_another_artifact_at_the_handle_is_refused(store: str) -> None:
    made = write(store)
    other = write(store, "other", where=at(revision=2))
    swapped = Dataset.model_validate({**made.model_dump(), "uri": other.uri})
    with pytest.raises(CorruptArtifact, match=f"holds digest {other.digest}, not {made.digest}"):
        verify(swapped)
    with pytest.raises(CorruptArtifact, match="never finished"):
        verify(Dataset.model_validate({**made.model_dump(), "uri": f"{made.uri}/nowhere"}))


def test_a_manifest_of_another_format_is_refused(tmp_path: Path) -> None:
    made = write(tmp_path)
    path = Path(made.uri) / "manifest.json"
    other = {**json.loads(path.read_text()), "format": 2}
    path.write_text(json.dumps(other))
    with pytest.raises(CorruptArtifact, match="was changed after sealing"):
        read_manifest(made.uri)
    body = {key: value for key, value in other.items() if key != "checksum"}
    path.write_text(json.dumps({**body, "checksum": fingerprint(body)}, indent=1, sort_keys=True))
    with pytest.raises(OtherFormat, match=r"format 2, and vila-ops .* reads 1; nothing was changed"):
        read_manifest(made.uri)


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_exports_of_two_attempts_are_byte_identical_and_found(tmp_path: Path, store: str) -> None:
    one, other = write(tmp_path / "1"), write(store)
    assert content(one).name != content(other).name
    out = tmp_path / "data/mixture"
    export(one, out)
    export(other, tmp_path / "data/again")
    assert tree(out) == tree(tmp_path / "data/again")
    assert folder_digest(out) == folder_digest(tmp_path / "data/again")
    shutil.rmtree(tmp_path / "1")
    found = find_in(Dataset, at(), str(out))
    assert found is not None
    assert found.digest == one.digest
    verify(found)
    assert find_in(Dataset, at(revision=2), str(out)) is None


def test_an_export_is_a_copy_of_its_own_and_older_than_any_run(tmp_path: Path) -> None:
    made, out = write(tmp_path / "store"), tmp_path / "data/mixture"
    export(made, out)
    found = find_in(Dataset, at(), str(out))
    assert found is not None
    execution = read_manifest(found.uri)["execution"]
    assert (execution["seconds"], execution["workers"]) == (0, [])
    assert datetime.fromisoformat(execution["sealed"]) < datetime.fromisoformat("2020-01-01T00:00:00+00:00")
    ours = content(made) / "sub/a.txt"
    assert ours.stat().st_ino != (content(found) / "sub/a.txt").stat().st_ino
    (content(found) / "sub/a.txt").write_text("hellO")
    verify(made)
    with pytest.raises(CorruptArtifact, match="sealed as"):
        verify(found)


def test_an_export_replaces_what_was_there(tmp_path: Path) -> None:
    old = write(tmp_path, "old", where=at(revision=2))
    export(old, tmp_path / "data/mixture")
    export(write(tmp_path), tmp_path / "data/mixture")
    assert (tmp_path / "data/mixture/files/sub/a.txt").read_text() == "hello"
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["mixture"]


def shard(store: str, number: int) -> Shard:
    where = address(Shard, revision=1, recipe={"number": number}, parents=())
    attempt = begin(where, store=store)
    (attempt / "shard.tar").write_bytes(bytes([number]) * 1000)
    return seal(Shard, where, attempt, facts={"num_samples": number}, execution={})


def test_files_of_other_artifacts_are_listed_and_not_copied(store: str, tmp_path: Path) -> None:
    shards = {f"shards/{number}.tar": (shard(store, number), "shard.tar") for number in range(3)}
    attempt = begin(at(), store=store)
    (attempt / "index").write_text("0 1 2")
    made = seal(Dataset, at(), attempt, facts=FACTS, execution={}, known=shards)
    whole = {"index": b"0 1 2", **{f"shards/{number}.tar": bytes([number]) * 1000 for number in range(3)}}
    assert find(Dataset, at(), store=store) == made
    verify(made)
    assert file(made, "shards/1.tar").read_bytes() == whole["shards/1.tar"]
    assert tree(content(made)) == whole
    if "://" in store:
        assert set(stored(made.uri)) == {f"{content(made).name}/index", "manifest.json"}
    else:
        assert os.stat(file(made, "shards/1.tar")).st_nlink == 2
    export(made, tmp_path / "data")
    copied = begin(at(revision=2), store=str(tmp_path / "copied"))
    (copied / "shards").mkdir()
    for name, data in whole.items():
        (copied / name).write_bytes(data)
    plain = seal(Dataset, at(), copied, facts=FACTS, execution={})
    export(plain, tmp_path / "plain")
    assert plain.digest == made.digest
    assert tree(tmp_path / "plain") == tree(tmp_path / "data")
    part, name = shards["shards/2.tar"]
    overwrite(f"{part.uri}/{content(part).name}/{name}", b"\0" * 1000)
    with pytest.raises(CorruptArtifact, match=r"tar has sha256 .*sealed as"):
        verify(made)


def test_known_facts_stand_for_hashing_and_have_to_fit(store: str) -> None:
    def attempt() -> Path:
        folder = begin(at(), store=store)
        (folder / "a").write_bytes(b"abc")
        return folder

    facts = FileFacts(size=3, sha256=hashlib.sha256(b"abc").hexdigest())
    for wrong, told in (
        ({"a": {**facts, "size": 4}}, "has 3 bytes, but its known facts say 4"),
        ({"b": facts}, r"no files \['b'\]"),
    ):
        with pytest.raises(ValueError, match=told):
            seal(Dataset, at(), attempt(), facts=FACTS, execution={}, known=wrong)
    made = seal(Dataset, at(), attempt(), facts=FACTS, execution={}, known={"a": facts})
    verify(made)
    assert read_manifest(made.uri)["files"] == {"a": facts}


def test_a_link_into_another_store_is_refused_on_s3_and_made_on_disk(tmp_path: Path, s3_store: str) -> None:
    linked = {"a.tar": (shard(s3_store, 1), "shard.tar")}
    on_disk = begin(at(), store=str(tmp_path))
    made = seal(Dataset, at(), on_disk, facts=FACTS, execution={}, known=linked)
    assert (content(made) / "a.tar").read_bytes() == b"\1" * 1000
    elsewhere = begin(at(), store=f"{s3_store}/other")
    with pytest.raises(ValueError, match="is in another store"):
        seal(Dataset, at(), elsewhere, facts=FACTS, execution={}, known=linked)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["../../../escaped", "/tmp/escaped"])
def test_a_manifest_that_names_what_is_outside_is_refused(name: str, store: str) -> None:
    made = write(store)
    manifest = json.loads(stored(made.uri)["manifest.json"])
    manifest["files"][name] = manifest["files"]["b.bin"]
    body = {key: value for key, value in manifest.items() if key != "checksum"}
    forged = json.dumps({**body, "checksum": fingerprint(body)}, indent=1, sort_keys=True)
    overwrite(f"{made.uri}/manifest.json", forged.encode())
    with pytest.raises(CorruptArtifact, match="escaped', which is outside of the folder"):
        content(made)


def test_a_sound_store_passes_the_probe_and_keeps_nothing_of_it(store: str) -> None:
    assert store in probe(store)
    assert [place.rpartition("/")[2] for place in stored(store)] == ["format.json"]


def test_folder_digests_are_of_names_and_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name / "sub").mkdir(parents=True)
        (tmp_path / name / "sub/x").write_text("1")
    one = folder_digest(tmp_path / "a")
    assert folder_digest(tmp_path / "b") == one
    (tmp_path / "b/sub/x").rename(tmp_path / "b/sub/y")
    assert folder_digest(tmp_path / "b") != one
    (tmp_path / "c").mkdir()
    with pytest.raises(ValueError, match="is empty"):
        folder_digest(tmp_path / "c")
    with pytest.raises(ValueError, match="no such folder"):
        folder_digest(tmp_path / "d")


def test_an_export_is_copied_into_the_store_and_outlives_its_folder(store: str, tmp_path: Path) -> None:
    out = tmp_path / "data/mixture"
    made = write(tmp_path / "elsewhere")
    export(made, out)
    exported = find_in(Dataset, at(), str(out))
    assert exported is not None
    kept = keep(exported, at(), store=store)
    shutil.rmtree(out)
    verify(kept)
    assert kept == find(Dataset, at(), store=store) == keep(exported, at(), store=store)
    assert kept.digest == made.digest
    assert tree(content(kept)) == tree(content(made))
    manifests = [read_manifest(one.uri) for one in (kept, made)]
    assert manifests[0]["recipe"] == manifests[1]["recipe"] == RECIPE
    assert manifests[0]["execution"]["seconds"] == 0


def test_a_folder_that_is_replaced_while_it_is_copied_is_named(tmp_path: Path) -> None:
    out, store = tmp_path / "data/mixture", str(tmp_path / "store")
    export(write(tmp_path / "elsewhere"), out)
    exported = find_in(Dataset, at(), str(out))
    assert exported is not None
    (out / "files/b.bin").unlink()  # as `dvc checkout` begins
    with pytest.raises(CorruptArtifact, match=rf"{out}/files/b\.bin is missing; where `dvc` replaced {out} while"):
        keep(exported, at(), store=store)
    export(write(tmp_path / "elsewhere", "new", where=at(revision=2)), tmp_path / "other")
    shutil.rmtree(out)
    (tmp_path / "other").rename(out)
    with pytest.raises(
        CorruptArtifact, match=f"{out} holds digest .*, not {exported.digest}: it was replaced meanwhile"
    ):
        keep(exported, at(), store=store)
    assert not list(Path(at().uri(store)).glob("attempt-*")), "nothing is left of both"
    assert find(Dataset, at(), store=store) is None
