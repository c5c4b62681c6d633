"""Sources read as `prepare` reads them: scanned once, then by spans."""

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from vila_ops.config import Source
from vila_ops.data import sources
from vila_ops.data.download.journal import Journal
from vila_ops.data.download.manifest import write_manifest
from vila_ops.data.download.outcome import DownloadRecord as Fetched
from vila_ops.data.download.outcome import Outcome
from vila_ops.data.raw.files import STRIDE, RawFile, Span
from vila_ops.data.records import Dropped, Record

Scan = Callable[..., list[RawFile]]
ReadAll = Callable[..., list[list[Record | Dropped]]]
Download = Callable[[Path, Mapping[str, bytes | Outcome]], None]
NO_FOLDERS: Mapping[str, Path] = {}


@pytest.fixture
def scan(tmp_path_factory: pytest.TempPathFactory) -> Scan:
    """The raw files of a source and its packages' folders; what is noted of them outlives a call."""
    cache = tmp_path_factory.mktemp("cache")
    return lambda source, folders=NO_FOLDERS: sources.raw_files(source, folders, cache=cache)


@pytest.fixture
def read_all(scan: Scan) -> ReadAll:
    """What each raw record of a source holds; every file is read whole, and must come out the same by short spans."""

    def read(source: Source, folders: Mapping[str, Path] = NO_FOLDERS) -> list[list[Record | Dropped]]:
        found = []
        for file in scan(source, folders):
            whole = list(sources.read(source, folders, _span(file, 0, file.count)))
            assert len(whole) == file.count
            for start in range(0, file.count, STRIDE):
                stop = min(file.count, start + STRIDE)
                assert list(sources.read(source, folders, _span(file, start, stop))) == whole[start:stop]
            found += whole
        return found

    return read


def _span(file: RawFile, start: int, stop: int) -> Span:
    mark = file.marks[start // STRIDE] if file.marks else 0
    return Span(name=file.name, path=file.path, digest=file.digest, start=start, stop=stop, mark=mark)


@pytest.fixture
def download() -> Download:
    """Puts what became of URLs where the downloader puts it, by its own code: the bytes of an image, or an outcome."""

    def put(out: Path, became: Mapping[str, bytes | Outcome]) -> None:
        out.parent.mkdir(parents=True, exist_ok=True)
        with Journal(out) as journal:
            for url, what in became.items():
                if isinstance(what, bytes):
                    sha256 = hashlib.sha256(what).hexdigest()
                    record = Fetched(url, "ok", "", 200, 1, url, extension="jpg", bytes=len(what), sha256=sha256)
                    journal.write([(record, what)])
                else:
                    journal.write([(Fetched(url, what, "asked in vain", None, 1, url), b"")])
            write_manifest(journal, list(became), out)
            journal.remove()

    return put
