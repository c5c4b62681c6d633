"""Nothing that we did not write is replaced or removed."""

import os
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from vila_ops.artifacts import output
from vila_ops.artifacts.attempts import keep
from vila_ops.artifacts.exports import check_target, export
from vila_ops.artifacts.kinds import Dataset
from vila_ops.artifacts.output import MARK, check_file, check_folder, drafts, new_folder, replace, write_file
from vila_ops.artifacts.store import address, begin, content, find_in, seal


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def made(tmp_path: Path) -> Dataset:
    """A sealed dataset of one file."""
    at = address(Dataset, revision=1, recipe={}, parents=())
    attempt = begin(at, store=str(tmp_path / "store"))
    (attempt / "a.txt").write_text("hello")
    return seal(Dataset, at, attempt, facts={"num_samples": 1, "num_tokens": 1}, execution={})


@pytest.mark.parametrize("stranger", ["photo.jpg", "files/photo.jpg", "files/deep/.hidden", "linked"])
def test_a_file_among_those_of_an_export_survives_the_next_export(stranger: str, made: Dataset, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export(made, out)
    export(made, out)  # nothing but ours: replaced
    (out / stranger).parent.mkdir(exist_ok=True)
    if stranger == "linked":
        (out / stranger).symlink_to(tmp_path / "store")
    else:
        (out / stranger).write_text("mine")
    before = tree(tmp_path)
    with pytest.raises(ValueError, match=f"{out} holds {stranger}, which vila-ops did not write there"):
        export(made, out)
    assert tree(tmp_path) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "store"]


@pytest.mark.parametrize("text", ['{"name": "A web app", "icons": []}', "[]", "no JSON"])
def test_another_program_s_manifest_is_not_ours(text: str, made: Dataset, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "manifest.json").write_text(text)
    with pytest.raises(ValueError, match=r"holds manifest\.json"):
        export(made, out)
    assert tree(out) == {"manifest.json": text.encode()}


def test_an_artifact_that_is_sealed_in_a_store_is_not_replaced(made: Dataset) -> None:
    before = tree(Path(made.uri))
    with pytest.raises(ValueError, match="vila-ops did not write there"):
        export(made, Path(made.uri))
    assert tree(Path(made.uri)) == before


def test_a_link_is_not_followed_into_a_removal(made: Dataset, tmp_path: Path) -> None:
    export(made, tmp_path / "real")
    before = tree(tmp_path / "real")
    for name, target in (("link", "real"), ("dangling", "nothing")):
        (tmp_path / name).symlink_to(tmp_path / target)
        with pytest.raises(ValueError, match="symbolic link"):
            export(made, tmp_path / name)
        assert (tmp_path / name).is_symlink()
    assert tree(tmp_path / "real") == before


def test_folders_that_are_in_use_are_refused_even_if_empty_and_absent_or_empty_ones_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, home, store = (tmp_path / name for name in ("one/here", "two/home", "three/store"))
    for folder in (here, home, tmp_path / "empty"):
        folder.mkdir(parents=True)
    monkeypatch.chdir(here)
    monkeypatch.setenv("HOME", str(home))
    refused = [(Path(), "current"), (Path(".."), "current"), (here, "current"), (home, "home"), (home.parent, "home")]
    refused += [(store, "in use"), (store.parent, "in use")]
    for folder, why in refused:
        with pytest.raises(ValueError, match=f"is or contains .*{why}"):
            check_target(folder, apart=[store])
    assert check_folder(Path("new/deep")) == here / "new/deep"
    assert check_folder(tmp_path / "empty") == tmp_path / "empty"


def test_a_file_where_a_folder_is_to_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file/below/it"):
        with pytest.raises(ValueError, match="is a file; name another folder"):
            check_folder(out)


def test_a_new_folder_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    def fill(out: Path, *, beside: Path) -> None:
        with new_folder(out) as draft:
            (draft / "half").write_text("")
            beside.mkdir()  # fails if it is there
            (beside / "photo.jpg").write_text("mine")

    with pytest.raises(FileExistsError):
        fill(tmp_path / "out", beside=tmp_path)
    assert list(tmp_path.iterdir()) == []
    with new_folder(tmp_path / "out") as draft:
        (draft / "whole").write_text("")
    assert tree(tmp_path) == {"out/whole": b""}
    with pytest.raises(ValueError, match="holds whole"), new_folder(tmp_path / "out"):
        pass
    with pytest.raises(OSError, match="not empty"):
        fill(tmp_path / "late", beside=tmp_path / "late")
    assert tree(tmp_path) == {"out/whole": b"", "late/photo.jpg": b"mine"}


def test_a_file_is_replaced_only_where_it_begins_as_ours_do(tmp_path: Path) -> None:
    out = tmp_path / "page.svg"
    for text in (f"{MARK}one", f"{MARK}two"):
        write_file(out, text, begins=MARK)
        assert out.read_text() == text
    for mine in ("<svg/>", "", MARK[:-2]):
        out.write_text(mine)
        with pytest.raises(ValueError, match="vila-ops did not write it"):
            write_file(out, f"{MARK}three", begins=MARK)
        assert out.read_text() == mine
    with pytest.raises(ValueError, match="would not begin with"):
        write_file(tmp_path / "other", "<svg/>", begins=MARK)
    assert list(tmp_path.iterdir()) == [out]


def test_what_is_no_file_is_refused_as_one(tmp_path: Path) -> None:
    ours, link, pipe = tmp_path / "ours", tmp_path / "link", tmp_path / "pipe"
    write_file(ours, MARK, begins=MARK)
    link.symlink_to(ours)
    os.mkfifo(pipe)
    for out in (tmp_path, link, pipe):
        with pytest.raises(ValueError, match="a folder, a link or a device"):
            check_file(out, begins=MARK)
    with pytest.raises(ValueError, match="no folder"):
        check_file(tmp_path / "none/page.html", begins=MARK)


def test_a_file_that_appears_while_a_folder_is_replaced_survives(made: Dataset, tmp_path: Path) -> None:
    """After the last check, which nothing can exclude."""
    out, draft = tmp_path / "out", tmp_path / "draft"
    export(made, out)
    export(made, draft)
    ours = {"manifest.json", "files/a.txt"}
    for name in ("photo.jpg", "files/deep/photo.jpg"):
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text("mine")
    with pytest.raises(ValueError, match=r"photo\.jpg, files/deep/photo\.jpg appeared .* kept in (\S+), move") as told:
        replace(out, draft, ours=ours)
    assert tree(out).keys() == ours
    (kept,) = tmp_path.glob(".out-old-*")
    assert str(kept) in str(told.value)
    assert tree(kept) == {"photo.jpg": b"mine", "files/deep/photo.jpg": b"mine"}


def test_a_folder_stays_where_its_replacement_fails(made: Dataset, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export(made, out)
    before = tree(out)
    with pytest.raises(FileNotFoundError):
        replace(out, tmp_path / "no draft", ours=before.keys())
    assert tree(out) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "store"]


def test_no_output_lies_in_a_folder_from_which_data_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    for out, why in ((raw / "mine", f"lies in {raw}"), (raw, "in use"), (tmp_path, "in use")):
        with pytest.raises(ValueError, match=why):
            check_folder(out, outside=[raw])
    assert check_folder(tmp_path / "raws", outside=[raw]) == tmp_path / "raws"
    (raw / "project").mkdir()
    monkeypatch.chdir(raw / "project")
    assert check_folder(raw / "project/data/mine", outside=[raw]) == raw / "project/data/mine"


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o002])
def test_what_is_sealed_exported_and_written_has_the_umask_s_mode(umask: int, tmp_path: Path) -> None:
    """safetensors writes to a temporary file, as does every library that calls it."""
    before = os.umask(umask)
    try:
        at = address(Dataset, revision=1, recipe={}, parents=())
        attempt = begin(at, store=str(tmp_path / "store"))
        (attempt / "adapter").mkdir()
        for name in ("model.safetensors", "adapter/adapter_model.safetensors"):
            save_file({"w": torch.zeros(2)}, attempt / name)
        made = seal(Dataset, at, attempt, facts={"num_samples": 1, "num_tokens": 1}, execution={})
        export(made, tmp_path / "out")
        with new_folder(tmp_path / "new") as draft:
            save_file({"w": torch.zeros(2)}, draft / "model.safetensors")
        write_file(tmp_path / "page.svg", MARK, begins=MARK)
    finally:
        os.umask(before)
    written = [
        tmp_path / "page.svg",
        *(p for name in ("store/dataset", "out", "new") for p in (tmp_path / name).rglob("*")),
    ]
    assert len(written) > 12
    for path in written:
        assert stat.S_IMODE(path.stat().st_mode) == (0o777 if path.is_dir() else 0o666) & ~umask, path


def test_an_export_of_links_into_a_cache_is_replaced_and_copied_not_written_through(
    made: Dataset, tmp_path: Path
) -> None:
    """DVC checks out links where its `cache.type` says so."""
    out, cache = tmp_path / "out", tmp_path / "cache"
    export(made, out)
    before = tree(out)
    for name in before:
        (cache / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).rename(cache / name)
        (cache / name).chmod(0o444)
        (out / name).symlink_to(cache / name)
    at = address(Dataset, revision=1, recipe={}, parents=())
    linked = find_in(Dataset, at, str(out))
    assert linked is not None
    kept = keep(linked, at, store=str(tmp_path / "other"))
    assert not any(path.is_symlink() for path in content(kept).rglob("*"))
    attempt = begin(address(Dataset, revision=2, recipe={}, parents=()), store=str(tmp_path / "store"))
    (attempt / "a.txt").write_text("other")
    other = address(Dataset, revision=2, recipe={}, parents=())
    export(seal(Dataset, other, attempt, facts={"num_samples": 1, "num_tokens": 1}, execution={}), out)
    assert tree(cache) == before
    assert (out / "files/a.txt").read_text() == "other"
    assert not (out / "files/a.txt").is_symlink()
    assert content(kept).joinpath("a.txt").read_text() == "hello"


def test_what_a_killed_export_left_is_removed_by_a_later_one_and_nothing_of_a_stranger(
    made: Dataset, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    out = data / "mine"
    export(made, out)
    hexes = "0123456789ab"
    draft, young = (data / f".mine.vila-ops-{hexes[:-1]}{digit}" for digit in "ce")
    strangers = [
        data / name for name in (f".mine-{hexes}", ".mine.vila-ops-notes", f".other.vila-ops-{hexes}", ".mine")
    ]
    for folder in (draft, young, *strangers):
        (folder / "files").mkdir(parents=True)
        (folder / "files" / "a.txt").write_text("hello")
    for folder in (draft, *strangers):
        for path in (folder / "files" / "a.txt", folder / "files", folder):
            os.utime(path, (1, 1))
    export(made, out)
    assert sorted(path.name for path in data.iterdir()) == sorted(path.name for path in (out, young, *strangers))
    assert [path.name for path in drafts(data)] == [f".mine.vila-ops-{hexes[:-1]}e", f".other.vila-ops-{hexes}"]


def test_what_is_left_of_an_output_stays_until_the_new_one_is_whole(
    made: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And of a folder that was being replaced, only our files are removed."""
    out, grace = tmp_path / "data/mine", "vila_ops.artifacts.exports.GRACE_SECONDS"
    hidden, shared, stranger = (out.with_name(f".mine-old-{digit * 12}") for digit in "012")
    for folder in (hidden, shared):
        export(made, out)
        out.rename(folder)  # a kill between the two renames
    (shared / "files" / "photo.jpg").write_text("mine")
    stranger.mkdir()
    (stranger / "photo.jpg").write_text("mine")

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(grace, -60.0)
        patch.setattr(output, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            export(made, out)
    assert tree(hidden)
    export(made, out)
    assert tree(hidden), "for a day"
    monkeypatch.setattr(grace, -60.0)
    export(made, out)
    assert not hidden.exists()
    assert tree(shared) == {"files/photo.jpg": b"mine"}
    assert tree(stranger) == {"photo.jpg": b"mine"}
