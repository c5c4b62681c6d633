import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vila_ops.data.loading import index as module
from vila_ops.data.loading.index import Index
from vila_ops.data.shards import INDEX, SCHEMA, read_index, write_index

DIGEST = "ab" * 32


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An index of two sources in three splits, with keys of many lengths."""
    draw = np.random.default_rng(0)
    rows = [
        {
            "key": f"schlüssel-{'x' * (number % 5)}{number}",
            "id": str(number),
            "source": ("a", "b/with slash")[int(draw.integers(2))],
            "split": ("train", "validation", "test")[int(draw.integers(3))],
            "object": "o",
            "licence": "CC0-1.0",
            "shard": f"shard-{number // 10}.tar",
            "offset": number * 2**33,
            "num_tokens": int(draw.integers(1, 2000)),
            "num_targets": int(draw.integers(1, 100)),
            "num_images": int(draw.integers(0, 5)),
        }
        for number in range(100)
    ]
    write_index(rows, tmp_path)
    return tmp_path


@pytest.mark.parametrize("batch", [7, 2**17])
def test_the_arrays_say_what_the_index_says(
    batch: int, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BATCH", batch)
    for _ in ("made", "opened"):
        index = Index(folder.joinpath, digest=DIGEST, cache=tmp_path / "cache")
        rows = read_index(folder).to_pylist()
        assert index.num_tokens().tolist() == [row["num_tokens"] for row in rows]
        for number, row in enumerate(rows):
            assert index.location(number) == (row["key"], row["shard"], row["offset"])
        chosen = np.random.default_rng(1).integers(0, len(rows), 200)
        for name, read in (("num_targets", index.num_targets), ("num_images", index.num_images)):
            assert read(chosen).tolist() == [rows[number][name] for number in chosen]
        assert len(index.groups) == 6
        for group in index.groups:
            own = [i for i, row in enumerate(rows) if (row["split"], row["source"]) == (group.split, group.source)]
            assert index.numbers(group).tolist() == own
            assert group.samples == len(own)
            assert group.tokens == sum(rows[i]["num_tokens"] for i in own)


def test_an_empty_index_has_no_groups(tmp_path: Path) -> None:
    write_index([], tmp_path)
    assert Index(tmp_path.joinpath, digest=DIGEST, cache=tmp_path / "cache").groups == []


def test_datasets_do_not_share_arrays(folder: Path, tmp_path: Path) -> None:
    Index(folder.joinpath, digest=DIGEST, cache=tmp_path / "cache")
    write_index([], folder)
    assert len(Index(folder.joinpath, digest=DIGEST, cache=tmp_path / "cache").groups) == 6
    assert Index(folder.joinpath, digest="cd" * 32, cache=tmp_path / "cache").groups == []


OPEN = """
import json, sys
from pathlib import Path
from vila_ops.data.loading.index import Index

# not getrusage's peak, which a process inherits from the one that started it: here pytest with all that it has loaded
def memory(field):
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field)]
    return 1024 * int(line.split()[1])

before = memory("VmRSS")
index = Index(Path(sys.argv[1]).joinpath, digest="ab" * 32, cache=Path(sys.argv[1]) / "cache")
print(json.dumps({"key": index.location(100_000).key, "bytes": memory("VmHWM") - before}))
"""
FEW, MANY = 125_000, 500_000


def _opened_twice(folder: Path, *, num_rows: int) -> list[int]:
    """Write an index, and open it in two new processes. Returns by how many bytes the memory of each grew."""
    folder.mkdir()
    rows = pa.table(
        {
            **{name: pa.array(["s"] * num_rows) for name in ("id", "source", "object", "licence")},
            "key": pa.array([f"0123456789abcdef-{number:06d}" for number in range(num_rows)]),
            "split": pa.array(["train"] * num_rows),
            "shard": pa.array([f"s-{number // 5000}.tar" for number in range(num_rows)]),
            "offset": pa.array(np.arange(num_rows, dtype=np.int64)),
            **{name: pa.array(np.ones(num_rows, np.int32)) for name in ("num_tokens", "num_targets", "num_images")},
        }
    ).select(SCHEMA.names)
    pq.write_table(rows.cast(SCHEMA), folder / INDEX, row_group_size=2**16)
    command = [sys.executable, "-c", OPEN, str(folder)]
    env = {**os.environ, "ARROW_DEFAULT_MEMORY_POOL": "system"}  # others keep freed memory, each by a rule of its own
    answers = [json.loads(subprocess.check_output(command, env=env)) for _ in ("converted", "opened")]
    assert {answer["key"] for answer in answers} == {"0123456789abcdef-100000"}
    return [answer["bytes"] for answer in answers]


@pytest.mark.slow
def test_an_index_takes_few_bytes_a_row_and_none_where_it_was_converted_before(tmp_path: Path) -> None:
    """Rows as objects of Python take about 600 bytes each; as arrays 27 and a key of 23. Fixed costs cancel out."""
    few, many = (_opened_twice(tmp_path / f"{number}", num_rows=number) for number in (FEW, MANY))
    assert many[0] - few[0] < 300 * (MANY - FEW)
    assert many[1] - few[1] < 10 * (MANY - FEW)
