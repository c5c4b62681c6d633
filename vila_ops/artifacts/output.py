"""Output outside of the store: a command replaces or removes only what vila-ops wrote.

A folder may be replaced where it is empty, or where an earlier export's manifest names every file in it. A file may be
replaced where it begins as our files of its kind do. Callers check before any work, and the functions that write check
again.
"""

import os
import secrets
import shutil
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

MARK = "<!-- written by vila-ops -->\n"
"""First line of our SVG and Markdown files, second line of our HTML pages."""
HTML = f"<!doctype html>\n{MARK}"
"""First lines of our HTML pages."""


def check_folder(out: Path, *, ours: Collection[str] = (), apart: Sequence[Path] = ()) -> Path:
    """The absolute path of a folder that may be written or replaced. Raises ValueError with the reason for any other.

    `ours` are the names of the files in it that we wrote. `apart` are folders in use, such as the store: `out` may
    neither be nor contain one of them.
    """
    if out.is_symlink():
        raise ValueError(f"{out} is a symbolic link, which is not replaced; name the folder that it points to")
    place = out.resolve()
    if not next(parent for parent in (place, *place.parents) if parent.exists()).is_dir():
        raise ValueError(f"{out} cannot be a folder, because it or a parent is a file; name another folder")
    in_use = {"the current folder": Path.cwd(), "the home folder": Path.home()}
    in_use |= {f"{folder}, which is in use": folder.resolve() for folder in apart}
    for name, folder in in_use.items():
        if folder.is_relative_to(place):
            raise ValueError(f"{out} is or contains {name}, so it is not replaced; name another folder")
    if foreign := next((name for name in _names(place) if name not in ours), None):
        raise ValueError(
            f"{out} holds {foreign}, which vila-ops did not write there; only an empty folder, or one whose manifest "
            f"names every file in it, is replaced: name another folder, or move the file away"
        )
    return place


@contextmanager
def draft_of(place: Path) -> Iterator[Path]:
    """A folder beside `place` to write in until `replace`; it is removed unless it was put in place."""
    draft = place.with_name(f".{place.name}-{secrets.token_hex(6)}")
    draft.mkdir(parents=True)
    try:
        yield draft
    finally:
        shutil.rmtree(draft, ignore_errors=True)


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A draft of the absent or empty folder `out`; it becomes `out` by one rename when the block ends without error."""
    place = check_folder(out)
    with draft_of(place) as draft:
        yield draft
        draft.rename(place)  # fails where the folder is no longer empty


def replace(place: Path, draft: Path) -> None:
    """Put a draft in place of a folder that `check_folder` has just accepted."""
    if not place.exists():
        draft.rename(place)
        return
    old = place.with_name(f".{place.name}-old-{secrets.token_hex(6)}")
    place.rename(old)
    draft.rename(place)
    shutil.rmtree(old)


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
    draft = out.with_name(f".{out.name}-{secrets.token_hex(6)}")
    try:
        draft.write_text(text, encoding="utf-8")
        draft.replace(out)
    finally:
        draft.unlink(missing_ok=True)


def _names(folder: Path) -> Iterator[str]:
    """Every file and link below a folder, relative to it. Raises OSError for a folder that cannot be listed."""
    if not folder.exists():
        return
    for here, folders, files in os.walk(folder, onerror=_fail):
        links = [name for name in folders if (Path(here) / name).is_symlink()]
        yield from ((Path(here) / name).relative_to(folder).as_posix() for name in sorted([*links, *files]))


def _fail(error: OSError) -> None:
    raise error
