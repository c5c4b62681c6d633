"""Raw files to units, each of which becomes one shard. Pure.

The boundaries of a unit depend only on the files near it, so a file that is added changes only neighbouring units, and
all other shards are reused.
"""

from collections.abc import Iterator
from typing import assert_never

from vila_ops.config import Config
from vila_ops.config.images import ImageEncoding, Jpeg, Webp
from vila_ops.data.raw.files import STRIDE, RawFile, Span, Thinned

RECORD_BYTES = 1500
"""Bytes of a record in a shard without its images: tokens, text, tar headers (measured on captions and documents)."""


def stored_image_bytes(side: int, encoding: ImageEncoding) -> float:
    """Approximate bytes of a square of `side` pixels in a shard (measured on photos; drawings take less)."""
    match encoding:
        case Jpeg(quality=quality):
            per_pixel = 0.5 * 2 ** ((quality - 95) / 10)
        case Webp(quality=None):
            per_pixel = 1.2
        case Webp():
            per_pixel = 0.2
        case _:
            assert_never(encoding)
    return side * side * per_pixel


class Unit(Config):
    """Consecutive records of one source that become one shard."""

    source: str
    spans: tuple[Span, ...]


def plan_units(
    source: str,
    files: list[RawFile],
    *,
    shard_bytes: int,
    image_bytes: float,
    limit: int | None = None,
    share: float = 1.0,
) -> list[Unit]:
    """The units of a source in the order of its records, each of about `shard_bytes` as a shard.

    `image_bytes` is the estimated size of one encoded image, `share` the share of records that top_share keeps. Long
    files are cut and short files are joined. A unit of short files ends, from half of shard_bytes on, after a file
    whose digest marks a boundary (1 file in 4), or at 1.5 shard_bytes.
    """
    total = sum(file.count for file in files)
    thin = 1.0 if limit is None else min(1.0, limit / max(1, total))
    units: list[Unit] = []
    spans: list[Span] = []
    size = 0.0
    first = 0
    for file in files:
        weight = thin * share * (file.images * image_bytes + file.count * RECORD_BYTES)
        thinned = None if thin == 1.0 else Thinned(first=first, total=total, limit=limit or 0)
        cuts = list(_cuts(file, pieces=round(weight / shard_bytes)))
        for start, stop in cuts:
            spans.append(_span(file, start, stop, thinned))
            size += weight / len(cuts)
            ends = len(cuts) > 1 or int(file.digest[:8], 16) % 4 == 0 or size >= 1.5 * shard_bytes
            if ends and size >= shard_bytes / 2:
                units.append(Unit(source=source, spans=tuple(spans)))
                spans, size = [], 0.0
        first += file.count
    return [*units, Unit(source=source, spans=tuple(spans))] if spans else units


def _cuts(file: RawFile, *, pieces: int) -> Iterator[tuple[int, int]]:
    """[start, stop) of equal pieces of a file; starts are multiples of STRIDE."""
    step = -(-file.count // max(1, pieces))
    step = -(-step // STRIDE) * STRIDE
    for start in range(0, file.count, step):
        yield start, min(file.count, start + step)


def _span(file: RawFile, start: int, stop: int, thinned: Thinned | None) -> Span:
    mark = file.marks[start // STRIDE] if file.marks else 0
    where = {"name": file.name, "path": file.path, "digest": file.digest}
    return Span(**where, start=start, stop=stop, mark=mark, thinned=thinned)
