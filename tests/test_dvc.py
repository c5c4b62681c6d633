"""DVC: an unchanged repro does nothing, and an old revision's data comes back to be trained on."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ENV = {
    **os.environ,
    "DVC_NO_ANALYTICS": "1",
    "GIT_CONFIG_GLOBAL": os.devnull,
    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    **{f"GIT_{who}_{what}": "vila@example.invalid" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")},
}
TINY = """\
recipe: configs/recipes/tiny.yaml
resources: configs/resources/inline.yaml
mixtures: [tiny_align, tiny_held_out]
local_sources: tests/tiny
"""


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A git and DVC repository with our configs and dvc.yaml, on the tiny recipe."""
    for name in ("configs", "tests/tiny"):
        shutil.copytree(ROOT / name, tmp_path / name)
    shutil.copyfile(ROOT / "dvc.yaml", tmp_path / "dvc.yaml")
    (tmp_path / "configs/versioned.yaml").write_text(TINY)
    _run(tmp_path, "git", "init", "-q")
    _run(tmp_path, "dvc", "init", "-q")
    return tmp_path


@pytest.mark.slow
def test_git_checkout_and_dvc_checkout_bring_back_the_data_that_is_trained_on(repository: Path) -> None:
    _run(repository, "dvc", "repro", "-q")
    _commit(repository, "first data")
    assert "Data and pipelines are up to date" in _run(repository, "dvc", "repro")
    first = _prepared(repository)

    records = repository / "tests/tiny/pairs/records.jsonl"
    records.write_text("".join(records.read_text().splitlines(keepends=True)[:40]))
    _run(repository, "dvc", "repro", "-q")
    _commit(repository, "fewer pairs")
    second = _prepared(repository)
    assert second["digest"] != first["digest"]
    assert _metrics(repository)["num_samples"] == 40
    changed = json.loads(_run(repository, "dvc", "metrics", "diff", "--json", "HEAD~1"))
    assert changed["data/tiny_align.json"]["num_samples"] == {"old": 48, "new": 40, "diff": -8}

    _run(repository, "git", "checkout", "-q", "HEAD~1")
    _run(repository, "dvc", "checkout", "-q")
    shutil.rmtree(repository / "store")  # nothing but the checked-out data is left to train on
    assert _prepared(repository) == first
    assert not (repository / "store/dataset").exists()
    trained = json.loads(
        _run(repository, "vila-ops", "train", "configs/recipes/tiny.yaml", "--stage", "align", "--json")
    )
    assert first["digest"] in trained["parents"]


def _prepared(repository: Path) -> dict[str, object]:
    said = _run(repository, "vila-ops", "prepare", "configs/recipes/tiny.yaml", "--mixture", "tiny_align", "--json")
    found: dict[str, object] = json.loads(said)
    return found


def _metrics(repository: Path) -> dict[str, int]:
    found: dict[str, int] = json.loads((repository / "data/tiny_align.json").read_text())
    return found


def _commit(repository: Path, message: str) -> None:
    _run(repository, "git", "add", "--all", ":!store")
    _run(repository, "git", "commit", "-qm", message)


def _run(folder: Path, *command: str) -> str:
    done = subprocess.run(command, cwd=folder, env=ENV, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, f"{command}: {done.stdout}\n{done.stderr}"
    return done.stdout
