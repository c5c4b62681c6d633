"""A repository as a fresh clone of this one, as far as DVC reads it, and the programs that are run in it."""

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import dvc.cli
from typer.testing import CliRunner

from vila_ops.cli import app

ROOT = Path(__file__).parents[1]
CLONED = (
    *(".dvc", ".dvcignore", ".gitignore", "configs", "dvc.yaml", "tests/tiny"),
    *("vila_ops/data/preprocess/prepare.py", "vila_ops/data/preprocess/identity.py"),
)
ENV = {
    "GIT_CONFIG_GLOBAL": os.devnull,
    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    **{f"GIT_{who}_{what}": "vila@example.invalid" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")},
}
"""Environment of all programs: `vila-ops` is the one under test, and git has nothing of the user's own."""
TABLES = ("samples", "tokens", "images", "left_out")


def clone_into(folder: Path) -> None:
    """Copy what DVC reads of this repository into a folder, and make it a repository."""
    for name in CLONED:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_file():
            shutil.copyfile(ROOT / name, folder / name)
        else:
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("tmp", "cache", "config.local"))
    run_program(folder, "git", "init", "-q")


def commit(repository: Path, message: str) -> None:
    """Commit all that a repository has."""
    run_program(repository, "git", "add", "--all")
    run_program(repository, "git", "commit", "-qm", message)


def digests(repository: Path) -> dict[str, str]:
    """Digests of the datasets in data/ by name."""
    manifests = sorted((repository / "data").glob("*/manifest.json"))
    return {path.parent.name: json.loads(path.read_text())["digest"] for path in manifests}


def run_program(folder: Path, *command: str) -> str:
    """Run a program in a folder. Returns what it prints."""
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, **ENV}, capture_output=True, text=True, timeout=1200, check=False
    )
    assert done.returncode == 0, f"{command}: {done.stdout}\n{done.stderr}"
    return done.stdout


def run_dvc(folder: Path, *arguments: str) -> str:
    """Run `dvc` in a folder, in this process, as importing it takes most of its time. Returns what it prints."""
    out = io.StringIO()
    env = {**ENV, "DVC_TEST": "true"}  # or it prints JSON to another stdout than this
    with contextlib.chdir(folder), patch.dict(os.environ, env), contextlib.redirect_stdout(out):
        assert dvc.cli.main(list(arguments)) == 0, f"{arguments}: {out.getvalue()}"
    return out.getvalue()


def run_vila_ops(folder: Path, *arguments: str) -> str:
    """Run `vila-ops` in a folder, in this process. Returns what it prints."""
    with contextlib.chdir(folder), patch.dict(os.environ, ENV):
        done = CliRunner().invoke(app, list(arguments))
    assert done.exit_code == 0, f"{arguments}: {done.output} {done.exception!r}"
    return done.stdout
