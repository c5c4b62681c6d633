import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from vila_ops.artifacts.folders import folder_digest
from vila_ops.artifacts.kinds import Checkpoint, Dataset
from vila_ops.artifacts.store import (
    Address,
    CorruptArtifact,
    address,
    begin,
    content,
    export,
    find,
    read_manifest,
    seal,
    verify,
)

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


def test_sealed_is_found_and_reads_back(tmp_path: Path) -> None:
    assert find(Dataset, at(), store=str(tmp_path)) is None
    made = write(tmp_path)
    assert find(Dataset, at(), store=str(tmp_path)) == made
    assert (made.num_samples, made.num_tokens, made.parents) == (1, 2, ("p",))
    assert (content(made) / "sub/a.txt").read_text() == "hello"
    verify(made)
    assert not list(tmp_path.rglob(".manifest*"))


def test_an_address_is_kind_revision_recipe_and_parents() -> None:
    changed = [{"revision": 2}, {"recipe": {**RECIPE, "rate": 2e-05}}, {"parents": ("q",)}, {"parents": ("p", "p")}]
    keys = {at().key, *(at(**change).key for change in changed)}
    assert len(keys) == 5
    other = address(Checkpoint, revision=1, recipe=RECIPE, parents=("p",))
    assert (other.kind, other.key in keys) == ("checkpoint", False)
    assert at(recipe=dict(reversed(RECIPE.items()))).key == at().key


def test_a_digest_is_of_bytes_names_and_facts_and_nothing_else(tmp_path: Path) -> None:
    one = write(tmp_path / "a")
    assert write(tmp_path / "b", where=at(revision=2)).digest == one.digest
    assert write(tmp_path / "c", "hellO").digest != one.digest


def race(arguments: tuple[Path, int]) -> tuple[str, str]:
    store, number = arguments
    attempt = begin(at(), store=str(store))
    (attempt / "a.txt").write_text(f"{number}" * 1000)
    made = seal(Dataset, at(), attempt, facts=FACTS, execution={})
    return made.digest, (content(made) / "a.txt").read_text()[:1]


def test_of_eight_racing_processes_one_seals_and_all_agree(tmp_path: Path) -> None:
    with multiprocessing.get_context("fork").Pool(8) as pool:
        for turn in range(5):
            told = set(pool.map(race, [(tmp_path / str(turn), number) for number in range(8)], chunksize=1))
            assert len(told) == 1
            found = find(Dataset, at(), store=str(tmp_path / str(turn)))
            assert found is not None
            verify(found)
            assert sorted(path.name for path in Path(found.uri).iterdir()) == [content(found).name, "manifest.json"]


def sleeper(store: Path) -> None:
    attempt = begin(at(), store=str(store))
    (attempt / "a.txt").write_text("from before")
    os.kill(os.getpid(), signal.SIGSTOP)
    seal(Dataset, at(), attempt, facts=FACTS, execution={})


def test_a_writer_that_slept_loses_and_its_attempt_is_removed(tmp_path: Path) -> None:
    process = multiprocessing.get_context("fork").Process(target=sleeper, args=(tmp_path,))
    process.start()
    assert process.pid is not None
    _, status = os.waitpid(process.pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status)
    assert find(Dataset, at(), store=str(tmp_path)) is None
    made = write(tmp_path)
    before = (Path(made.uri) / "manifest.json").read_bytes()
    os.kill(process.pid, signal.SIGCONT)
    process.join(30)
    assert process.exitcode == 0
    assert (Path(made.uri) / "manifest.json").read_bytes() == before
    verify(made)
    assert sorted(path.name for path in Path(made.uri).iterdir()) == [content(made).name, "manifest.json"]


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


def test_any_flipped_bit_of_files_or_manifest_is_found(tmp_path: Path) -> None:
    made = write(tmp_path)
    draw = random.Random(0)
    files = [Path(made.uri) / "manifest.json", *(path for path in content(made).rglob("*") if path.is_file())]
    for turn in range(400):
        path = files[turn % 2] if turn % 2 == 0 else draw.choice(files[1:])
        whole = path.read_bytes()
        flipped = bytearray(whole)
        flipped[draw.randrange(len(flipped))] ^= 1 << draw.randrange(8)
        path.write_bytes(flipped)
        with pytest.raises(CorruptArtifact, match=r"\S"):
            verify(made)
        path.write_bytes(whole)
    verify(made)


@pytest.mark.parametrize("damage", ["short", "gone", "no_folder"])
def test_a_truncated_or_missing_file_is_found_at_once(damage: str, tmp_path: Path) -> None:
    made = write(tmp_path)
    path = content(made) / "b.bin"
    match damage:
        case "short":
            path.write_bytes(path.read_bytes()[:-1])
        case "gone":
            path.unlink()
        case "no_folder":
            shutil.rmtree(content(made))
    with pytest.raises(CorruptArtifact, match=r"run again to make it anew"):
        find(Dataset, at(), store=str(tmp_path))


def test_another_artifact_at_the_handle_is_refused(tmp_path: Path) -> None:
    made = write(tmp_path)
    other = write(tmp_path, "other", where=at(revision=2))
    swapped = Dataset.model_validate({**made.model_dump(), "uri": other.uri})
    with pytest.raises(CorruptArtifact, match=f"holds digest {other.digest}, not {made.digest}"):
        verify(swapped)
    with pytest.raises(CorruptArtifact, match="never finished"):
        verify(Dataset.model_validate({**made.model_dump(), "uri": str(tmp_path / "nowhere")}))


def test_a_manifest_of_another_format_is_refused(tmp_path: Path) -> None:
    made = write(tmp_path)
    path = Path(made.uri) / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 2}))
    with pytest.raises(CorruptArtifact, match="format 2; this version reads 1"):
        read_manifest(made.uri)


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_exports_of_two_attempts_are_byte_identical_and_found_first(tmp_path: Path) -> None:
    one, other = write(tmp_path / "1"), write(tmp_path / "2")
    assert content(one).name != content(other).name
    out = tmp_path / "data/mixture"
    export(one, out)
    export(other, tmp_path / "data/again")
    assert tree(out) == tree(tmp_path / "data/again")
    assert folder_digest(out) == folder_digest(tmp_path / "data/again")
    shutil.rmtree(tmp_path / "1")
    found = find(Dataset, at(), store=str(tmp_path / "1"), first=out)
    assert found is not None
    assert found.digest == one.digest
    verify(found)
    assert find(Dataset, at(revision=2), store=str(tmp_path / "1"), first=out) is None


def test_an_export_is_a_copy_of_its_own_and_older_than_any_run(tmp_path: Path) -> None:
    made, out = write(tmp_path / "store"), tmp_path / "data/mixture"
    export(made, out)
    found = find(Dataset, at(), store=str(tmp_path / "nowhere"), first=out)
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
