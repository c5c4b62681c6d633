"""What is watched of raw data; what a look then does is in tests/test_dvc.py, in a repository."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from vila_ops.config import Mixture
from vila_ops.data import revisions
from vila_ops.data.revisions import raw_roots, revise, wait_until_quiet, watch

PACKAGE = {"registry": "npm", "name": "renders", "version": "1.0.0", "sha256": "0" * 64, "licence": "MIT"}
LLAVA = {"kind": "llava", "licence": "MIT"}


def mixture(**sources: dict[str, object]) -> Mixture:
    return Mixture.model_validate({"name": "own", "sources": sources})


def test_records_and_images_of_all_sources_are_watched_those_compared_against_too() -> None:
    chosen = mixture(
        one={**LLAVA, "path": "raw/one.json", "images": "raw/images"},
        other={"kind": "flan", "licence": "MIT", "path": "raw/flan"},
        pinned={"kind": "wordnet", "package": PACKAGE, "render": "document"},
    )
    against = {"pope": {**LLAVA, "path": "eval/pope.json", "images": "raw/images"}}
    guarded = Mixture.model_validate({**chosen.model_dump(), "contamination": {"sources": against}})
    assert raw_roots(chosen) == ["raw/flan", "raw/images", "raw/one.json"]
    assert raw_roots(guarded) == ["eval/pope.json", "raw/flan", "raw/images", "raw/one.json"]


def test_a_mixture_of_packages_cannot_be_watched(tmp_path: Path) -> None:
    pinned = mixture(pinned={"kind": "wordnet", "package": PACKAGE, "render": "document"})
    looks = watch(pinned, folder=tmp_path, every_seconds=0, settle_seconds=0, commit=False)
    with pytest.raises(ValueError, match=r"'own' is made of pinned packages alone"):
        next(looks)


@pytest.mark.parametrize(("name", "sleeps"), [("a.jsonl", 4), ("a.jsonl.part", 1)])
def test_a_file_that_grows_is_waited_for_and_a_half_one_is_not(
    name: str, sleeps: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "deep" / name
    file.parent.mkdir()
    file.write_text("")
    slept = []

    def copy_on(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) <= 3:
            with file.open("a") as out:
                out.write("more\n")

    monkeypatch.setattr(revisions, "time", SimpleNamespace(sleep=copy_on))
    wait_until_quiet([tmp_path, tmp_path / "not there yet"], seconds=7)
    assert slept == [7] * sleeps


def test_what_dvc_says_is_told(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"`dvc .*prepare@own` failed: .*not inside of a DVC repository"):
        revise("prepare@own", commit=False, folder=tmp_path)
