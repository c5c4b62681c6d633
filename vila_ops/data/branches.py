"""A dataset as a DVC revision on a git branch of its own, made in a temporary worktree: the user's stays as it is."""

import difflib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vila_ops.artifacts.kinds import Dataset
from vila_ops.artifacts.store import file
from vila_ops.config import Config
from vila_ops.data.preprocess.card import CARD
from vila_ops.data.revisions import BESIDE, export_for_dvc, run_dvc, run_program

DIFF = "card.diff"


class DataRevision(Config):
    """Where the data of a retraining is versioned besides the store."""

    branch: str | None
    commit: str | None
    reason: str = ""
    """Why it stands in the store alone, where it does."""
    card_diff: str
    """The data card beside that of the data before, as a unified diff."""


def on_a_branch(dataset: Dataset, before: Dataset | None, *, folder: Path, name: str, branch: str) -> DataRevision:
    """Commit a dataset as data/NAME to a branch of the repository around `folder`, from its HEAD on.

    A branch that is there keeps its commit. Git and DVC use their own configuration and credentials. Where either
    refuses, the revision says why, and nothing is left behind.
    """
    diff = card_diff(dataset, before)
    try:
        top = Path(run_program(folder, "git", "rev-parse", "--show-toplevel").strip())
        commit = _head(top, branch) or _commit(dataset, top, name=name, branch=branch, diff=diff)
    except (RuntimeError, OSError) as error:
        return DataRevision(branch=None, commit=None, reason=f"Git cannot be written: {error}", card_diff=diff)
    return DataRevision(branch=branch, commit=commit, card_diff=diff)


def card_diff(dataset: Dataset, before: Dataset | None) -> str:
    """The data card of a dataset beside that of another one, as a unified diff."""
    old, new = (file(one, CARD).read_text(encoding="utf-8") if one else "" for one in (before, dataset))
    return "".join(difflib.unified_diff(old.splitlines(True), new.splitlines(True), "before", "now"))


def _head(top: Path, branch: str) -> str | None:
    """The commit of a branch; None where there is no such branch."""
    listed = run_program(top, "git", "for-each-ref", "--format=%(objectname)", f"refs/heads/{branch}").strip()
    return listed or None


def _commit(dataset: Dataset, top: Path, *, name: str, branch: str, diff: str) -> str:
    cache = run_dvc(top, "cache", "dir").strip()
    with _worktree(top) as tree:
        (tree / ".dvc/config.local").write_text(f"[cache]\n    dir = {top / cache}\n")
        out = tree / "data" / name
        export_for_dvc(dataset, out)
        (tree / f"data/{name}.{DIFF}").write_text(diff, encoding="utf-8")
        run_dvc(tree, "add", f"data/{name}")  # not --quiet, which says nothing of an error
        written = [f"data/{name}.{suffix}" for suffix in ("dvc", DIFF, *BESIDE)]
        run_program(tree, "git", "add", "--force", "--", "data/.gitignore", *written)
        run_program(tree, "git", "commit", "--quiet", "-m", f"Data: {name} for a retraining")
        commit = run_program(tree, "git", "rev-parse", "HEAD").strip()
        run_program(tree, "git", "branch", branch, commit)
    return commit


@contextmanager
def _worktree(top: Path) -> Iterator[Path]:
    """A temporary worktree at HEAD, without a branch."""
    parent = Path(tempfile.mkdtemp(prefix="vila-retrain-"))
    try:
        hooks = f"core.hooksPath={os.devnull}"  # such as `dvc install`'s, which would check all data out here
        run_program(top, "git", "-c", hooks, "worktree", "add", "--quiet", "--detach", str(parent / "tree"))
        yield parent / "tree"
    finally:
        shutil.rmtree(parent, ignore_errors=True)
        run_program(top, "git", "worktree", "prune")
