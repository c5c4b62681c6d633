"""Copies of sealed artifacts outside of their store, such as the dataset's folder that DVC versions.

    TARGET/manifest.json
    TARGET/files/...

An export is replaced by the next one and by nothing else.
"""

import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from vila_ops.artifacts import disk, output
from vila_ops.artifacts.backend import GRACE_SECONDS
from vila_ops.artifacts.disk_faults import require
from vila_ops.artifacts.kinds import Artifact
from vila_ops.artifacts.store import EXPORTED, MANIFEST, copy_files, find_manifest, manifest_of, manifest_text
from vila_ops.errors import CorruptArtifact

ANY_EXECUTION: dict[str, Any] = {"seconds": 0.0, "sealed": "1970-01-01T00:00:00+00:00", "workers": []}
"""The execution in an exported manifest: of no attempt, and older than any run, so that runs count it as reused."""


def export(artifact: Artifact, target: Path) -> None:
    """Copy a sealed folder to `target`, in place of an earlier export. An edit of the copy does not reach the store.

    The copy's bytes depend neither on the store nor on the attempt that was sealed, so that DVC sees only real changes.
    Raises ValueError as `check_target` does, and DiskFault where the disk is full or fails.
    """
    manifest = manifest_of(artifact)
    out = check_target(target)
    require(out, sum(facts["size"] for facts in manifest["files"].values()))
    with output.draft_of(out) as fresh:
        files = copy_files(artifact.uri, manifest, fresh / EXPORTED)
        exported = {**manifest, "files": files, "data": EXPORTED, "execution": ANY_EXECUTION}
        (fresh / MANIFEST).write_text(manifest_text(exported))
        disk.publish(fresh, str(fresh))
        output.replace(check_target(target), fresh, ours=_exported(target))  # checked again: a copy may take long
    for old in output.replaced(out.parent):
        if old.name.startswith(f".{out.name}-old-") and time.time() - old.stat().st_ctime > GRACE_SECONDS:
            remove_replaced(old)


def remove_replaced(folder: Path) -> None:
    """Remove an earlier export that was being replaced when a command was killed; other files in it stay."""
    output.remove_ours(folder, _exported(folder))


def is_replaced(folder: Path) -> bool:
    """Whether a folder is one for `remove_replaced`: an earlier export under a hidden name."""
    return output.REPLACED.fullmatch(folder.name) is not None and bool(_exported(folder))


def check_target(target: Path, *, apart: Sequence[Path] = (), outside: Sequence[Path] = ()) -> Path:
    """The absolute path of a folder that `export` may write: absent, empty, or an earlier export and nothing else.

    Raises ValueError for any other; `apart` and `outside` are as in `output.check_folder`. An artifact that is sealed
    in a store is not an export.
    """
    return output.check_folder(target, ours=_exported(target), apart=apart, outside=outside)


def _exported(folder: Path) -> Collection[str]:
    """Names of the files that `export` wrote into a folder, the manifest last; none if the folder is not an export."""
    try:
        manifest = find_manifest(str(folder)) if folder.is_dir() else None
    except CorruptArtifact:  # the manifest.json of another program: no file is ours
        return ()
    if manifest is None or manifest["data"] != EXPORTED:
        return ()
    return dict.fromkeys([*(f"{EXPORTED}/{name}" for name in manifest["files"]), MANIFEST])
