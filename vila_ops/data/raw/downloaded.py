"""Images that `vila-ops data download` fetched: read by URL with one seek each, and compared with their sha256."""

import hashlib
import tarfile
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from vila_ops.data.download.manifest import key_of, manifest_path, tar_path
from vila_ops.data.raw.files import RawFile, RawMissing, Scan, scan_files
from vila_ops.data.raw.known import known
from vila_ops.data.raw.objects import for_arrow
from vila_ops.data.raw.url_files import out_of, url_files
from vila_ops.data.records import NOT_DOWNLOADED
from vila_ops.data.sources.faults import Fault
from vila_ops.errors import VilaError

_COLUMNS = ("key", "outcome", "detail", "bytes", "sha256", "offset")


@dataclass(frozen=True)
class Missing:
    """The reason that a URL has no image."""

    outcome: str
    """The downloader's outcome, or `not_asked` (the URL is not in the manifest) or `damaged`."""
    detail: str

    def fault(self, url: str) -> Fault:
        """The fault of a record that cannot do without the image; it does not count as bad."""
        return Fault(NOT_DOWNLOADED, f"{url}: {self.outcome} {self.detail}".strip(), is_bad=False)


class Downloaded:
    """The images of one raw file; a context manager that keeps its tar open."""

    def __init__(self, out: Path, urls: Collection[str]) -> None:
        """`out` is the path of tar and manifest without suffixes; the manifest rows of `urls` are held in memory."""
        keys = pa.array(list({key_of(url) for url in urls}), pa.string())
        path = self._manifest = manifest_path(out)
        self._path = tar_path(out)
        self._check()
        try:
            table = pq.read_table(for_arrow(path), columns=list(_COLUMNS), filters=pc.field("key").isin(keys))
        except VilaError:  # of the store, not of the file
            raise
        except (pa.ArrowException, OSError) as error:
            raise ValueError(
                f"{path} is not a manifest of `vila-ops data download` ({error}); download again"
            ) from error
        self._rows: dict[str, dict[str, Any]] = {row["key"]: row for row in table.to_pylist()}
        self._tar = self._path.open("rb")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._tar.close()
        if kind is None:
            self._check()

    def image(self, url: str) -> bytes | Missing:
        """The bytes that the server sent, or why there are none."""
        row = self._rows.get(key_of(url))
        if row is None:
            return Missing("not_asked", "the manifest does not have the URL; download again")
        if row["outcome"] != "ok":
            return Missing(row["outcome"], row["detail"] or "")
        self._tar.seek(row["offset"] + tarfile.BLOCKSIZE)
        data = self._tar.read(row["bytes"])
        if hashlib.sha256(data).hexdigest() != row["sha256"]:
            return Missing(
                "damaged",
                f"byte {row['offset']} of {self._path.name} does not have the sha256 of the manifest; download again",
            )
        return data

    def _check(self) -> None:
        """Raise RawChanged if manifest or tar are not those that were scanned."""
        for path in (self._manifest, self._path):
            known().check(str(path))


def scan_downloaded(
    root: Path,
    suffixes: tuple[str, ...],
    kind: str,
    scan: Callable[[Path, tuple[str, ...]], Scan],
    *,
    images: str,
    cache: Path,
) -> list[RawFile]:
    """As `scan_files`, of the raw files whose images were downloaded to `images`.

    `scan` is given the path of a raw file and those of its manifest and tar. Raises RawMissing if the images of a raw
    file have not been downloaded to the end.
    """
    beside = _companions(root, suffixes, images=images)
    by_path = {path: companions for (_, path), companions in beside.items()}
    return scan_files(beside, kind, lambda path: scan(path, by_path[path]), cache=cache)


def _companions(root: Path, suffixes: tuple[str, ...], *, images: str) -> dict[tuple[str, Path], tuple[str, str]]:
    """Manifest and tar of each raw file, by its name and path (see `url_files`).

    Raises RawMissing if the images of a raw file have not been downloaded to the end.
    """
    by_file = {}
    for name, path in url_files(root, suffixes, images=images):
        out = out_of(images, name)
        if missing := [one for one in (manifest_path(out), tar_path(out)) if not one.is_file()]:
            raise RawMissing(
                f"no {missing[0]}: the images of {name} are not there yet; fetch them with `vila-ops data download`"
            )
        by_file[name, path] = (str(manifest_path(out)), str(tar_path(out)))
    return by_file
