"""Near duplicates among a million images and texts: seconds and memory. Targets: 60 s and 2 GB.

Peer: comparing all pairs of hashes in numpy, timed on a part and extrapolated. It does not compare texts.
"""

import resource
import time

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from result import result

from vila_ops.config.clean import MAX_IMAGE_BITS, NearDuplicates
from vila_ops.data.dedup.hashing import MINIMA, THUMBNAIL_BYTES
from vila_ops.data.dedup.near_duplicates import near_duplicates
from vila_ops.data.dedup.signatures import SCHEMA

COUNT = 10**6
COPIES = COUNT // 10
PEER_COUNT = 20_000
TARGET_SECONDS, TARGET_BYTES = 60.0, 2 * 10**9


def main() -> None:
    hashes, signatures = _signatures()
    started = time.perf_counter()
    drops = near_duplicates(signatures, NearDuplicates(image_bits=MAX_IMAGE_BITS, text_similarity=0.8))
    ours = time.perf_counter() - started
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    started = time.perf_counter()
    for place in range(PEER_COUNT):
        np.flatnonzero(np.bitwise_count(hashes[place] ^ hashes[:place]) <= MAX_IMAGE_BITS)
    peer = (time.perf_counter() - started) * (COUNT / PEER_COUNT) ** 2
    ok = ours <= TARGET_SECONDS and memory <= TARGET_BYTES
    more = {"records": COUNT, "dropped": len(drops), "memory_bytes": memory, "memory_target": TARGET_BYTES}
    result("cleaning", ours=ours, peer=peer, target=TARGET_SECONDS, ok=ok, unit="s", **more)


def _signatures() -> tuple[NDArray[np.uint64], pa.Table]:
    """Random signatures; a tenth are copies of others, half of them by image, half by text."""
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**64, COUNT, dtype=np.uint64)
    thumbnails = rng.integers(0, 256, (COUNT, THUMBNAIL_BYTES), dtype=np.uint8)
    minima = rng.integers(0, 2**16, (COUNT, MINIMA), dtype=np.uint16)
    copies, originals = rng.permutation(COUNT)[: 2 * COPIES].reshape(2, COPIES)
    shown, said = slice(None, COPIES // 2), slice(COPIES // 2, None)
    hashes[copies[shown]] = hashes[originals[shown]] ^ np.uint64(0b10101)
    thumbnails[copies[shown]] = thumbnails[originals[shown]]
    minima[copies[said]] = minima[originals[said]]
    minima[copies[said], :16] = rng.integers(0, 2**16, (COPIES // 2, 16), dtype=np.uint16)
    one_each = pa.array(np.arange(COUNT + 1), pa.int32())
    columns = [
        pa.array(np.arange(COUNT)),
        pa.array(np.zeros(COUNT, np.int64)),
        pa.nulls(COUNT, pa.float64()),
        pa.array(np.ones(COUNT, np.bool_)),
        pa.ListArray.from_arrays(one_each, pa.array(hashes)),
        pa.ListArray.from_arrays(one_each, _fixed(thumbnails, THUMBNAIL_BYTES)),
        _fixed(minima, 2 * MINIMA),
        pa.array([[]], SCHEMA.field("ngrams").type).take(pa.array(np.zeros(COUNT, np.int64))),
    ]
    return hashes, pa.table(columns, schema=SCHEMA)


def _fixed(values: NDArray[np.uint8] | NDArray[np.uint16], width: int) -> pa.FixedSizeBinaryArray:
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(width), COUNT, [None, pa.py_buffer(values.tobytes())])


if __name__ == "__main__":
    main()
