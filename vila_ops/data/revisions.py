"""Datasets under DVC: written out with what `dvc metrics` and `dvc plots` compare, rebuilt when raw data arrives."""

import json
import logging
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from vila_ops.artifacts import exports, output, store
from vila_ops.artifacts.kinds import Dataset
from vila_ops.config import Config, Mixture
from vila_ops.data.preprocess.card import CARD
from vila_ops.data.preprocess.identity import PLACES
from vila_ops.data.preprocess.summary import LEFT_OUT, SUMMARY
from vila_ops.data.raw.files import files_below
from vila_ops.data.raw.known import version_of
from vila_ops.data.raw.objects import raw_path_in

TABLES = ("samples", "tokens", "images", "left_out")
"""Bar charts of `dvc plots`, by source and split, or by source and reason."""
BESIDE = {"json": '{\n "mixture": "', "md": output.MARK, **{f"{table}.csv": f"part,{table}\n" for table in TABLES}}
"""Files beside a dataset that are kept in git: suffix -> how the file begins."""
BUSY = "is busy, it is being blocked by"
"""What DVC says of an output that another of its commands reads or writes (dvc/rwlock.py)."""
BUSY_SECONDS = 600.0
"""How long a command of DVC waits for such an output."""
log = logging.getLogger(__name__)


def export_for_dvc(dataset: Dataset, out: Path) -> None:
    """Copy a dataset to `out`, and beside it, for git, its card and its counts for `dvc metrics` and `plots`.

    Raises ValueError as `check_export` does.
    """
    check_export(out)
    exports.export(dataset, out)
    _write(out, "md", output.MARK + store.file(dataset, CARD).read_text(encoding="utf-8"))
    summary = json.loads(store.file(dataset, SUMMARY).read_text())
    metrics = {**summary, "sources": {name: _metrics(counts) for name, counts in summary["sources"].items()}}
    _write(out, "json", json.dumps(metrics, indent=1, sort_keys=True) + "\n")
    for table in TABLES:
        rows = [f"{part},{count}" for part, count in _bars(summary, table)]
        _write(out, f"{table}.csv", "\n".join([f"part,{table}", *rows]) + "\n")


def check_export(out: Path, *, apart: Sequence[Path] = (), outside: Sequence[Path] = ()) -> None:
    """Raise ValueError if `export_for_dvc` would replace a folder or a file beside it that it did not write.

    `apart` are folders that `out` must neither be nor contain, `outside` places of raw data, in which it must not lie.
    """
    exports.check_target(out, apart=apart, outside=outside)
    if out.parent.is_dir():
        for suffix, begins in BESIDE.items():
            output.check_file(_beside(out, suffix), begins=begins)


class Revision(Config):
    """A new revision of a dataset."""

    stage: str
    digest: str
    """Digest of the dataset, which may equal the previous one if a change made no difference to it."""
    num_samples: int
    num_tokens: int
    commit: str | None
    """The git commit; None without `commit`, or if no file in git has changed."""


def watch(
    mixture: Mixture, *, folder: Path, every_seconds: float, settle_seconds: float, commit: bool
) -> Iterator[Revision | None]:
    """Poll a mixture's raw data; each poll yields a new revision, or None if nothing has changed.

    The DVC stage is `prepare@NAME` of the repository in `folder`. A poll starts when no file in the raw folders has
    changed for `settle_seconds`. Raises ValueError if there is no folder to watch, and the errors of `revise`.
    """
    roots = raw_roots(mixture)
    if not roots:
        raise ValueError(f"mixture {mixture.name!r} is made of pinned packages alone; there is no folder to watch")
    while True:
        wait_until_quiet([raw_path_in(folder, root) for root in roots], seconds=settle_seconds)
        yield revise(f"prepare@{mixture.name}", commit=commit, folder=folder)
        time.sleep(every_seconds)


def raw_roots(mixture: Mixture) -> list[str]:
    """The paths of a mixture's raw files, those of its evaluation sets included."""
    against = mixture.contamination.sources if mixture.contamination else {}
    read = [*mixture.sources.values(), *against.values()]
    return sorted({place for source in read for key in PLACES if (place := getattr(source, key, None)) is not None})


def revise(stage: str, *, commit: bool, folder: Path) -> Revision | None:
    """Run a DVC stage `prepare@NAME` again if its dependencies have changed; None if nothing has changed.

    Shards whose raw records did not change are reused. The revision before stays in the working tree until the new one
    is whole, since the outputs of dvc.yaml are marked `persist`. `commit` commits the files that DVC wrote, and
    nothing else; a revision that `dvc repro` made by hand and git does not have yet is one too. Raises RuntimeError
    with the output of `dvc` or `git` if one of them fails, such as for raw data that `prepare` refuses.
    """
    name = stage.rpartition("@")[2]
    if not json.loads(run_dvc(folder, "status", "--json", stage)):
        recorded = _commit(folder, name) if commit else None
        return _revision(stage, folder, recorded) if recorded else None
    log.info("%s: its dependencies have changed", stage)
    try:
        run_dvc(folder, "repro", stage)
    except RuntimeError as error:
        raise RuntimeError(f"{error}\n{_state(folder, name)}") from error
    for line in run_dvc(folder, "metrics", "diff", "--md", "--targets", f"data/{name}.json").splitlines():
        log.info("%s", line)
    return _revision(stage, folder, _commit(folder, name) if commit else None)


def _revision(stage: str, folder: Path, recorded: str | None) -> Revision:
    """The revision in the working tree; `recorded` is its commit."""
    manifest = store.read_manifest(str(folder / "data" / stage.rpartition("@")[2]))
    facts = {key: manifest["facts"][key] for key in ("num_samples", "num_tokens")}
    return Revision(stage=stage, digest=manifest["digest"], **facts, commit=recorded)


def _state(folder: Path, name: str) -> str:
    """What a failed revision has left in the working tree."""
    manifest = store.find_manifest(str(folder / "data" / name))
    if manifest is None:
        return f"data/{name} holds no dataset; `dvc checkout` brings back one that was there before"
    return f"data/{name} is still the revision before, data {manifest['digest'][:12]}"


def wait_until_quiet(roots: list[Path], *, seconds: float) -> None:
    """Return when no file under the roots has changed for `seconds`, so that unfinished copies are not read."""
    before = None
    while (now := list(_files(roots))) != before:
        before = now
        time.sleep(seconds)


def _files(roots: list[Path]) -> Iterator[tuple[str, str]]:
    """Each file with its version."""
    for root in roots:
        for path in sorted(path for _, path in files_below(root)) if root.is_dir() else [root]:
            version = version_of(path)
            if version is not None:  # else deleted while listing; the next listing lacks it
                yield str(path), version


def _commit(folder: Path, name: str) -> str | None:
    """Commit the files that DVC wrote: its lock, the counts beside the dataset, and the .dvc files of raw data."""
    written = ["dvc.lock", "data/.gitignore", *(f"data/{name}.{suffix}" for suffix in BESIDE)]
    written += run_program(folder, "git", "ls-files", "--modified", "*.dvc").splitlines()
    run_program(folder, "git", "add", "--", *written)
    if not run_program(folder, "git", "diff", "--cached", "--name-only", "--", *written):
        return None
    run_program(folder, "git", "commit", "--quiet", "-m", f"Data: a new revision of {name}", "--", *written)
    return run_program(folder, "git", "rev-parse", "HEAD").strip()


def _metrics(counts: dict[str, Any]) -> dict[str, Any]:
    """The numeric part of a source's summary."""
    return {key: value for key, value in counts.items() if key not in ("examples", "packages")}


def _bars(summary: dict[str, Any], table: str) -> Iterator[tuple[str, int]]:
    for name, counts in summary["sources"].items():
        counted = (
            counts[table] if table in counts else sum((Counter(counts[kind]) for kind in LEFT_OUT), Counter[str]())
        )
        for key, count in counted.items():
            yield f"{name} {key}", count


def _write(out: Path, suffix: str, text: str) -> None:
    output.write_file(_beside(out, suffix), text, begins=BESIDE[suffix])


def _beside(out: Path, suffix: str) -> Path:
    return out.with_name(f"{out.name}.{suffix}")


def run_dvc(folder: Path, *arguments: str) -> str:
    """The standard output of a command of DVC; waits while other commands of DVC use the repository.

    `--wait-for-lock` waits for the whole repository, but not for single outputs that another command reads or writes.
    """
    deadline = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            return run_program(folder, "dvc", "--wait-for-lock", *arguments)
        except RuntimeError as error:
            if BUSY not in str(error) or time.monotonic() > deadline:
                raise
            log.warning("waiting: %s", error)
        time.sleep(1.0)


def run_program(folder: Path, *command: str) -> str:
    """The standard output of a command. Raises RuntimeError with its error output if it fails."""
    own = str(Path(sys.executable).parent)  # `dvc`, and the `vila-ops` that it calls, of this environment
    env = {**os.environ, "PATH": os.pathsep.join(filter(None, [own, os.environ.get("PATH")]))}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"`{' '.join(command)}` failed: {(done.stderr or done.stdout).strip()}")
    return done.stdout
