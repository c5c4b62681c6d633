"""The raw files whose images are on the web, and where each one's downloaded images are."""

import re
from pathlib import Path

from vila_ops.data.raw.files import paths
from vila_ops.data.raw.objects import raw_path

_COMPRESSED = re.compile(r"\.(zip|gz)$", re.IGNORECASE)


def out_of(images: str, name: str) -> Path:
    """The path of tar and manifest of the raw file of that name, without their suffixes."""
    return raw_path(images) / Path(_COMPRESSED.sub("", name)).with_suffix("")


def url_files(root: Path, suffixes: tuple[str, ...], *, images: str) -> list[tuple[str, Path]]:
    """Name and path of the raw files whose images are downloaded to `images`, which may be a folder inside the root.

    Raises ValueError if there are none, or if two of them would share a tar, such as a shard and its zip.
    """
    if raw_path(images).resolve() == (root.parent if root.is_file() else root).resolve():
        raise ValueError(f"{images} is where the raw files are; the downloaded images need a folder of their own")
    files = [(name, path) for name, path in paths(root, suffixes) if not path.is_relative_to(images)]
    first: dict[Path, str] = {}
    for name, _ in files:
        other = first.setdefault(out_of(images, name), name)
        if other != name:
            raise ValueError(f"{root} has {other} and {name}, which would share one tar of images; move one away")
    return files
