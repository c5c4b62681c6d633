"""Images that `vila-ops data download` brought: by URL, one seek each, checked against what was noted of them."""

import hashlib
import tarfile
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from vila_ops.data.download.manifest import key_of, manifest_path, tar_path
from vila_ops.data.raw.files import paths

_COLUMNS = ("key", "outcome", "detail", "bytes", "sha256", "offset")


@dataclass(frozen=True)
class Missing:
    """Why there is no image of a URL."""

    outcome: str
    """The downloader's word, or `not_asked`, `damaged`."""
    detail: str


class Downloaded:
    """The images of one raw file; a context, in which its tar is open."""

    def __init__(self, out: Path, urls: Collection[str]) -> None:
        """`out` is the path of tar and manifest without their suffixes; what is noted of `urls` is held in memory."""
        keys = list({key_of(url) for url in urls})
        path = manifest_path(out)
        try:
            table = pq.read_table(path, columns=list(_COLUMNS), filters=pc.field("key").isin(keys))
        except (pa.ArrowException, OSError) as error:
            raise ValueError(
                f"{path} is not a manifest of `vila-ops data download` ({error}); download again"
            ) from error
        self._rows: dict[str, dict[str, Any]] = {row["key"]: row for row in table.to_pylist()}
        self._path = tar_path(out)
        self._tar = self._path.open("rb")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._tar.close()

    def image(self, url: str) -> bytes | Missing:
        """The bytes that the server sent."""
        row = self._rows.get(key_of(url))
        if row is None:
            return Missing("not_asked", "the manifest does not have the URL; download again")
        if row["outcome"] != "ok":
            return Missing(row["outcome"], row["detail"] or "")
        self._tar.seek(row["offset"] + tarfile.BLOCKSIZE)
        data = self._tar.read(row["bytes"])
        if hashlib.sha256(data).hexdigest() != row["sha256"]:
            return Missing(
                "damaged", f"byte {row['offset']} of {self._path.name} is not what was noted; download again"
            )
        return data


def out_of(images: str, name: str) -> Path:
    """The path of tar and manifest of the raw file of that name, without their suffixes."""
    return Path(images) / Path(name).with_suffix("")


def companions(root: Path, suffix: str, *, images: str) -> dict[tuple[str, Path], tuple[str, str]]:
    """For the name and path of each raw file its manifest and tar. `images` may be a folder inside the root.

    Raises ValueError where a raw file was not downloaded to the end.
    """
    if Path(images) == (root.parent if root.is_file() else root):
        raise ValueError(f"{images} is where the raw files are; images is the folder of `vila-ops data download --out`")
    found = {}
    for name, path in paths(root, (suffix,)):
        if path.is_relative_to(images):
            continue
        out = out_of(images, name)
        if missing := [one for one in (manifest_path(out), tar_path(out)) if not one.is_file()]:
            raise ValueError(
                f"no {missing[0]}: the images of {name} are not there yet; fetch them with `vila-ops data download`"
            )
        found[name, path] = (str(manifest_path(out)), str(tar_path(out)))
    return found
