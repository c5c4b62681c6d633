"""Output outside of the store: a command replaces or removes only what vila-ops wrote.

A folder may be replaced where it is empty, or where an earlier export's manifest names every file in it. A file may be
replaced where it begins as our files of its kind do. Callers check before any work, and the functions that write check
again.
"""

import logging
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from vila_ops.artifacts import disk
from vila_ops.artifacts.backend import GRACE_SECONDS
from vila_ops.artifacts.disk_faults import faults_named

MARK = "<!-- written by vila-ops -->\n"
"""First line of our SVG and Markdown files, second line of our HTML pages."""
HTML = f"<!doctype html>\n{MARK}"
"""First lines of our HTML pages."""
DRAFT = re.compile(r"\..+\.vila-ops-[0-9a-f]{12}")
REPLACED = re.compile(r"\..+-old-[0-9a-f]{12}")
"""Hidden names beside an output: of a draft, and of a folder that is replaced."""
log = logging.getLogger(__name__)


def check_folder(
    out: Path, *, ours: Collection[str] = (), apart: Sequence[Path] = (), outside: Sequence[Path] = ()
) -> Path:
    """The absolute path of a folder that may be written or replaced. Raises ValueError with the reason for any other.

    `ours` are the names of the files in it that we wrote. `apart` are folders in use, such as the store: `out` may
    neither be nor contain one of them. `outside` are places that are read, such as raw data: `out` may not lie in one,
    unless that holds the current folder too.
    """
    if out.is_symlink():
        raise ValueError(f"{out} is a symbolic link, which is not replaced; name the folder that it points to")
    place = out.resolve()
    if not next(parent for parent in (place, *place.parents) if parent.exists()).is_dir():
        raise ValueError(f"{out} cannot be a folder, because it or a parent is a file; name another folder")
    in_use = {"the current folder": Path.cwd(), "the home folder": Path.home()}
    in_use |= {f"{folder}, which is in use": folder.resolve() for folder in (*apart, *outside)}
    for name, folder in in_use.items():
        if folder.is_relative_to(place):
            raise ValueError(f"{out} is or contains {name}, so it is not replaced; name another folder")
    read = [folder for folder in outside if not Path.cwd().is_relative_to(folder.resolve())]
    if around := next((folder for folder in read if place.is_relative_to(folder.resolve())), None):
        raise ValueError(f"{out} lies in {around}, from which data is read; name a folder outside of it")
    if foreign := next((name for name in _names(place) if name not in ours), None):
        raise ValueError(
            f"{out} holds {foreign}, which vila-ops did not write there; only an empty folder, or one whose manifest "
            f"names every file in it, is replaced: name another folder, or move the file away"
        )
    return place


@contextmanager
def draft_of(place: Path) -> Iterator[Path]:
    """A folder beside `place` to write in until `replace`; it is removed unless it was put in place.

    Raises DiskFault where the disk is full or fails.
    """
    draft = _hidden(place)
    draft.mkdir(parents=True)
    try:
        with faults_named(draft):
            yield draft
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    _remove_abandoned(place)  # not before: it may be all that is left of the output


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A draft of the absent or empty folder `out`; it becomes `out` by one rename when the block ends without error."""
    place = check_folder(out)
    with draft_of(place) as draft:
        yield draft
        use_umask(draft)
        draft.rename(place)  # fails where the folder is no longer empty


def replace(place: Path, draft: Path, *, ours: Collection[str]) -> None:
    """Put a draft in place of a folder that `check_folder` has just accepted, and remove `ours` of the old folder.

    If that fails, the old folder stays. A file that appeared in it meanwhile is kept; raises ValueError that names it.
    """
    old = place.with_name(f".{place.name}-old-{secrets.token_hex(6)}")
    with suppress(FileNotFoundError):  # nothing is replaced
        place.rename(old)
    try:
        draft.rename(place)
    except BaseException:
        if old.exists():
            old.rename(place)
        raise
    if not old.exists():
        return
    remove_ours(old, ours)
    if old.exists():
        kept = ", ".join(_names(old)) or "a folder"
        raise ValueError(
            f"{place} was replaced, but {kept} appeared in it meanwhile; it is kept in {old}, move it away"
        )


def remove_ours(folder: Path, ours: Collection[str]) -> None:
    """Remove files of ours from a folder in their order, and the folder if nothing else is in it."""
    for name in ours:
        (folder / name).unlink(missing_ok=True)
    for here, _, _ in os.walk(folder, topdown=False):
        with suppress(OSError):  # not empty
            os.rmdir(here)


def use_umask(folder: Path) -> None:
    """Give each file and folder below a folder the mode of a new one.

    Libraries write weights to a temporary file that only its owner may read, and rename it.
    """
    probe = folder / f".mode-{secrets.token_hex(6)}"
    probe.mkdir()
    (probe / "file").touch()
    of_folder, of_file = (stat.S_IMODE(path.stat().st_mode) for path in (probe, probe / "file"))
    shutil.rmtree(probe)
    for path in folder.rglob("*"):
        mode = of_folder if path.is_dir() else of_file
        if not path.is_symlink() and stat.S_IMODE(path.stat().st_mode) != mode:
            path.chmod(mode)


def check_file(out: Path, *, begins: str) -> None:
    """Raise ValueError with the reason where a file may not be written. `begins` starts our files of this kind."""
    if not out.parent.is_dir():
        raise ValueError(f"{out}: no folder {out.parent}; create it, or name a file in another one")
    if not (out.exists() or out.is_symlink()):
        return
    if out.is_symlink() or not out.is_file():
        raise ValueError(f"{out} is a folder, a link or a device; name a file")
    with out.open("rb") as file:
        if file.read(len(begins.encode())) != begins.encode():
            raise ValueError(
                f"{out} exists and vila-ops did not write it: it does not begin with {begins!r}; name "
                f"another file, or move this one away"
            )


def write_file(out: Path, text: str, *, begins: str) -> None:
    """Write a file whole or not at all, if `check_file` accepts it."""
    if not text.startswith(begins):
        raise ValueError(f"{out} would not begin with {begins!r}, so a later run could not recognise it")
    check_file(out, begins=begins)
    draft = _hidden(out)
    try:
        with faults_named(draft):
            draft.write_text(text, encoding="utf-8")
        draft.replace(out)
    finally:
        draft.unlink(missing_ok=True)
    _remove_abandoned(out)


def drafts(folder: Path) -> list[Path]:
    """Hidden folders and files in a folder that are being written, or that a killed command left half-written."""
    return sorted(path for path in folder.glob(".*") if DRAFT.fullmatch(path.name))


def replaced(folder: Path) -> list[Path]:
    """Hidden folders in a folder that are being replaced, or that were when a command was killed."""
    return sorted(path for path in folder.glob(".*") if REPLACED.fullmatch(path.name))


def _hidden(place: Path) -> Path:
    """An unused hidden name beside a place, which says whose it is."""
    return place.with_name(f".{place.name}.vila-ops-{secrets.token_hex(6)}")


def _remove_abandoned(place: Path) -> None:
    """Remove what killed commands left beside a place that they were to write."""
    own = [path for path in drafts(place.parent) if path.name.rpartition(".vila-ops-")[0] == f".{place.name}"]
    try:
        for path in own:
            if time.time() - disk.changed(path) > GRACE_SECONDS:
                disk.remove(str(path))
                log.info("%s was removed: a command that was killed left it", path)
    except OSError as error:
        log.warning("what killed commands left beside %s was not removed: %s", place, error)


def _names(folder: Path) -> Iterator[str]:
    """Every file and link below a folder, relative to it. Raises OSError for a folder that cannot be listed."""
    if not folder.exists():
        return
    for here, folders, files in os.walk(folder, onerror=_fail):
        links = [name for name in folders if (Path(here) / name).is_symlink()]
        yield from ((Path(here) / name).relative_to(folder).as_posix() for name in sorted([*links, *files]))


def _fail(error: OSError) -> None:
    raise error
