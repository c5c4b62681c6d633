"""The digest of a local folder's content."""

from pathlib import Path

from vila_ops.artifacts.disk import sha256
from vila_ops.config import fingerprint


def folder_digest(folder: Path) -> str:
    """sha256 over the names and bytes of a folder's files; its own place does not count."""
    if not folder.is_dir():
        raise ValueError(f"no such folder: {folder.resolve()}; the path in the config is relative to {Path.cwd()}")
    files = {str(path.relative_to(folder)): sha256(path) for path in sorted(folder.rglob("*")) if path.is_file()}
    if not files:
        raise ValueError(f"{folder.resolve()} is empty")
    return fingerprint(files)
