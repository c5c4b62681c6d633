"""Datasets under DVC: written out with what `dvc metrics` and `dvc plots` compare, made anew when raw data arrives."""

import json
import logging
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vila_ops.artifacts import store
from vila_ops.artifacts.kinds import Dataset
from vila_ops.data.card import LEFT_OUT, SUMMARY
from vila_ops.data.raw import UNFINISHED

log = logging.getLogger(__name__)


def export_for_dvc(dataset: Dataset, out: Path) -> None:
    """Copy a dataset to `out`, and beside it its counts: `out`.json for `dvc metrics`, three CSVs for `dvc plots`."""
    store.export(dataset, out)
    summary = json.loads(store.file(dataset, SUMMARY).read_text())
    numbers = {**summary, "sources": {name: _numbers(found) for name, found in summary["sources"].items()}}
    _beside(out, "json").write_text(json.dumps(numbers, indent=1, sort_keys=True) + "\n")
    for table in ("samples", "tokens", "left_out"):
        rows = [f"{part},{count}" for part, count in _bars(summary, table)]
        _beside(out, f"{table}.csv").write_text("\n".join([f"part,{table}", *rows]) + "\n")


def revise(stage: str, *, commit: bool, folder: Path) -> bool:
    """Make a DVC stage anew where what it is made from has changed; False where nothing has.

    Every shard whose raw records did not change is found and not made again. `commit` records the revision in git.
    """
    if not json.loads(_run(folder, "dvc", "status", "--json", stage)):
        return False
    log.info("%s: raw data has changed", stage)
    _run(folder, "dvc", "repro", stage)
    for line in _run(folder, "dvc", "metrics", "diff", "--md").splitlines():
        log.info("%s", line)
    if commit:
        name = stage.rpartition("@")[2]
        made = [str(path.relative_to(folder)) for path in sorted((folder / "data").glob(f"{name}.*")) if path.is_file()]
        _run(folder, "git", "add", "dvc.lock", *made)
        _run(folder, "git", "commit", "--quiet", "-m", f"Data: a new revision of {name}", "--", "dvc.lock", *made)
    return True


def wait_until_quiet(roots: list[Path], *, seconds: float) -> None:
    """Return when no file under the roots came, went or grew for so long: half a copy is not data."""
    before = None
    while (now := list(_files(roots))) != before:
        before = now
        time.sleep(seconds)


def _files(roots: list[Path]) -> Iterator[tuple[str, int, int]]:
    for root in roots:
        for path in sorted(root.rglob("*")) if root.is_dir() else [root]:
            if path.is_file() and not path.name.endswith(UNFINISHED):
                status = path.stat()
                yield str(path), status.st_size, status.st_mtime_ns


def _numbers(found: dict[str, Any]) -> dict[str, Any]:
    """Of a source's summary what can be compared as numbers."""
    return {key: value for key, value in found.items() if key not in ("examples", "packages")}


def _bars(summary: dict[str, Any], table: str) -> Iterator[tuple[str, int]]:
    for name, found in summary["sources"].items():
        counted = found[table] if table in found else {k: n for kind in LEFT_OUT for k, n in found[kind].items()}
        for key, count in counted.items():
            yield f"{name} {key}", count


def _beside(out: Path, suffix: str) -> Path:
    return out.with_name(f"{out.name}.{suffix}")


def _run(folder: Path, *command: str) -> str:
    """What a command printed; raises RuntimeError with what it said where it fails."""
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"`{' '.join(command)}` failed: {(done.stderr or done.stdout).strip()}")
    return done.stdout
