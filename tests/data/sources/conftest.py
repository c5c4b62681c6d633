"""Sources read as `prepare` reads them: scanned once, then by spans."""

from collections.abc import Callable

import pytest

from vila_ops.config import Source
from vila_ops.data import sources
from vila_ops.data.raw import STRIDE, RawFile, Span
from vila_ops.data.records import Dropped, Record

Scan = Callable[[Source], list[RawFile]]
ReadAll = Callable[[Source], list[list[Record | Dropped]]]


@pytest.fixture
def scan(tmp_path_factory: pytest.TempPathFactory) -> Scan:
    """The raw files of a source; what is noted of them outlives a call."""
    cache = tmp_path_factory.mktemp("cache")
    return lambda source: sources.raw_files(source, {}, cache=cache)


@pytest.fixture
def read_all(scan: Scan) -> ReadAll:
    """What each raw record of a source holds; every file is read whole, and must come out the same by short spans."""

    def read(source: Source) -> list[list[Record | Dropped]]:
        found = []
        for file in scan(source):
            whole = _read(source, file, 0, file.count)
            assert len(whole) == file.count
            for start in range(0, file.count, STRIDE):
                stop = min(file.count, start + STRIDE)
                assert _read(source, file, start, stop) == whole[start:stop]
            found += whole
        return found

    return read


def _read(source: Source, file: RawFile, start: int, stop: int) -> list[list[Record | Dropped]]:
    mark = file.marks[start // STRIDE] if file.marks and stop else 0
    span = Span(name=file.name, path=file.path, digest=file.digest, start=start, stop=stop, mark=mark)
    return list(sources.read(source, {}, span))
