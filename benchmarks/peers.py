"""LLaVA-like lengths, and TRL's packing of them; for the other benchmarks."""

import contextlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

CAPACITIES = (2048, 4096, 8192)


def llava_like(count: int, *, seed: int = 0) -> tuple[NDArray[np.uint16], NDArray[np.bool_]]:
    """Tokens of each sample, and whether it shows an image.

    94 %: 576 image tokens and a text of lognormal(4.9, 0.85) tokens, at least 16; the rest text only, lognormal(6.2,
    0.8); 2048 at most. Drawn by the million, so that 10^8 lengths need no memory beyond their own.
    """
    lengths, shows = np.empty(count, np.uint16), np.empty(count, np.bool_)
    for start in range(0, count, 10**6):
        part = slice(start, min(count, start + 10**6))
        size = part.stop - start
        draw = np.random.default_rng(seed + start // 10**6)
        shows[part] = draw.random(size) < 0.94
        image = 576 + np.maximum(16, draw.lognormal(4.9, 0.85, size))
        text = np.maximum(1, draw.lognormal(6.2, 0.8, size))
        lengths[part] = np.minimum(2048, np.where(shows[part], image, text))
    return lengths, shows


@contextlib.contextmanager
def installed(*packages: str) -> Iterator[None]:
    """Install third-party packages for the time of a benchmark, without their dependencies."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder, *packages]
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
        sys.path.insert(0, folder)
        try:
            yield
        finally:
            sys.path.remove(folder)


TRL = ("trl==1.16.0", "datasets==5.2.0", "dill", "multiprocess", "xxhash")


def trl_rows(lengths: NDArray[np.uint16], capacity: int, *, batch_size: int | None) -> int:
    """The number of rows that TRL's `pack_dataset` makes (strategy bfd) of samples whose tokens are all 0.

    batch_size: samples packed together; TRL's own default is 1000, None packs all at once, and in memory.
    """
    import datasets
    import pyarrow as pa
    from trl.data_utils import pack_dataset

    datasets.disable_progress_bars()
    ends = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int32)
    samples = pa.ListArray.from_arrays(ends, np.zeros(int(ends[-1]), np.int8))
    dataset = datasets.Dataset(pa.table({"input_ids": samples}))
    how = {"batch_size": batch_size or len(lengths), "writer_batch_size": 1000, "keep_in_memory": True}
    return len(pack_dataset(dataset, capacity, "bfd", how))
