"""The content of local folders: its digest, and a listing by which a folder of the cache proves to be undamaged."""

import json
import os
import secrets
from pathlib import Path

from vila_ops.artifacts.disk import known_sha256, sha256
from vila_ops.config import fingerprint


def folder_digest(folder: Path) -> str:
    """sha256 over the names and bytes of a folder's files; its own place does not count."""
    if not folder.is_dir():
        raise ValueError(f"no such folder: {folder.resolve()}; the path in the config is relative to {Path.cwd()}")
    files = {str(path.relative_to(folder)): sha256(path) for path in sorted(folder.rglob("*")) if path.is_file()}
    if not files:
        raise ValueError(f"{folder.resolve()} is empty")
    return fingerprint(files)


def write_listing(folder: Path, *, cache: Path, name: str) -> None:
    """Record the content that the folder `name` of a cache is about to have, in CACHE/listings."""
    listing = _listing(cache, name)
    listing.parent.mkdir(parents=True, exist_ok=True)
    draft = listing.with_name(f".{listing.name}.{secrets.token_hex(6)}")
    draft.write_text(json.dumps(_sha256_by_name(folder)))
    os.replace(draft, listing)


def is_as_listed(folder: Path, *, cache: Path) -> bool:
    """Whether a folder of a cache has the files and bytes that were recorded; each is read once per process."""
    if not folder.is_dir():
        return False
    try:
        listed = json.loads(_listing(cache, folder.name).read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return bool(listed == _sha256_by_name(folder))


def _listing(cache: Path, name: str) -> Path:
    return cache / "listings" / f"{name}.json"


def _sha256_by_name(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): known_sha256(path) for path in folder.rglob("*") if path.is_file()}
