"""Seconds to reach sample 10^6 of 10^7 and read the batch that follows: 16 sequences of 4096, about 86 samples.

Ours: `RowLoader` is opened and a batch read, in a new process each time. Warm: as at every start on a machine
except the first. Cold: the epoch is planned first. Bare: the dataset's index is not cached as arrays either. Peers
read the same samples: torchdata's StatefulDataLoader with its own RandomSampler, restored to its state at that
sample, and accelerate's `skip_first_batches`, which the trainers on transformers use. Both iterate over what was
seen before, and neither packs. The tokens are real, read from a shard that 10^7 index rows point into. Target: 50
ms, warm.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from peers import installed, llava_like
from result import result

from vila_ops.data.shards import INDEX, SCHEMA, Sample, ShardWriter

SAMPLES, POSITION, BATCH = 10**7, 10**6, 86
HELD_OUT = 1000
DISTINCT = 2000
"""Samples in the shard; the index repeats them."""
ROUNDS = 5
TARGET_SECONDS = 0.05
OURS = """
import json, resource, sys, time
from pathlib import Path
from vila_ops.config import Stage
from vila_ops.data.loading.loader import RowLoader

folder, step = Path(sys.argv[1]), int(sys.argv[2])
source = {"kind": "jsonl", "path": "x", "render": "caption"}
stage = Stage.model_validate({
    "name": "s", "mixture": {"name": "m", "sources": {"a": source}}, "trainable": ["projector"], "num_steps": 10**6,
    "global_batch_size": 16, "sequence_length": 4096, "learning_rate": 1e-3, "precision": "fp32", "save_every": 1,
    "validate_every": 1,
})
start = time.perf_counter()
rows = RowLoader(folder.joinpath, digest="ab" * 32, stage=stage, cache=folder / "cache")
opened = time.perf_counter() - start
batch, targets = rows.batch(step)
seconds = time.perf_counter() - start
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"seconds": seconds, "opened": opened, "samples": sum(len(row.keys) for row in batch), "bytes": peak}))
"""
PEER = """
import json, resource, sys, time
from pathlib import Path
import numpy as np
import pyarrow.parquet as pq
from torch.utils.data import BatchSampler, DataLoader, Dataset
from vila_ops.data.shards import read_sample

folder, which, size, position, batch_size = Path(sys.argv[1]), sys.argv[2], *map(int, sys.argv[3:])

class Samples(Dataset):
    def __init__(self):
        table = pq.read_table(folder / "distinct.parquet")
        self.rows = table.to_pylist()

    def __len__(self):
        return size

    def __getitem__(self, number):
        row = self.rows[number % len(self.rows)]
        return read_sample(folder, shard=row["shard"], offset=row["offset"], key=row["key"])

data = Samples()
step = position // batch_size
if which == "torchdata":
    from torchdata.stateful_dataloader import StatefulDataLoader
    from torchdata.stateful_dataloader.sampler import RandomSampler
    import torch

    def make():
        torch.manual_seed(0)
        return StatefulDataLoader(data, batch_size=batch_size, sampler=RandomSampler(data), collate_fn=list)

    first = make()
    read = next(iter(first))
    state = first.state_dict()
    # The state at sample 10^6 without reading a million samples: its counters, multiplied.
    state["_num_yielded"] = state["_sampler_iter_yielded"] = step
    state["_sampler_iter_state"]["samples_yielded"] = step * batch_size
    state["_sampler_iter_state"]["sampler_iter_state"]["yielded"] = step * batch_size
    start = time.perf_counter()
    loader = make()
    loader.load_state_dict(state)
    batch = next(iter(loader))
else:
    from accelerate import skip_first_batches
    from torch import Generator

    start = time.perf_counter()
    order = Generator().manual_seed(0)
    loader = DataLoader(data, batch_size=batch_size, shuffle=True, generator=order, collate_fn=list)
    batch = next(iter(skip_first_batches(loader, step)))
seconds = time.perf_counter() - start
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"seconds": seconds, "samples": len(batch), "bytes": peak}))
"""


def main() -> None:
    with tempfile.TemporaryDirectory() as name, installed("torchdata==0.11.0"):
        folder = Path(name)
        _write(folder)
        _run(OURS, folder, 0)
        num_rows = next(json.loads(path.read_text()) for path in folder.glob("cache/plan-*/header.json"))["facts"][
            "num_rows"
        ]
        step = num_rows * POSITION // SAMPLES // 16
        times: dict[str, list[dict[str, float]]] = {
            "warm": [],
            "cold": [],
            "bare": [],
            "torchdata": [],
            "accelerate": [],
        }
        peer = [SAMPLES, POSITION, BATCH]
        for round_ in range(ROUNDS):
            times["warm"].append(_run(OURS, folder, step))
            times["torchdata"].append(_run(PEER, folder, "torchdata", *peer))
            times["accelerate"].append(_run(PEER, folder, "accelerate", *peer))
            if round_ < 3:
                for case, pattern in (("cold", "plan-*"), ("bare", "*")):
                    for path in folder.glob(f"cache/{pattern}"):
                        shutil.rmtree(path)
                    times[case].append(_run(OURS, folder, step))
    seconds = {case: statistics.median(one["seconds"] for one in ran) for case, ran in times.items()}
    result(
        "position",
        ours=seconds["warm"] * 1000,
        peer=min(seconds["torchdata"], seconds["accelerate"]) * 1000,
        target=TARGET_SECONDS * 1000,
        ok=seconds["warm"] <= TARGET_SECONDS,
        unit="ms to the batch at sample 10^6 of 10^7",
        seconds={case: round(value, 4) for case, value in seconds.items()},
        opened={
            case: round(statistics.median(one["opened"] for one in times[case]), 4) for case in ("warm", "cold", "bare")
        },
        peak_gb={case: round(max(one["bytes"] for one in ran) / 1e9, 3) for case, ran in times.items()},
    )


def _write(folder: Path) -> None:
    """A shard of text-only samples, and an index whose 10^7 rows point into it."""
    lengths, _ = llava_like(DISTINCT)
    draw = np.random.default_rng(1)
    writer = ShardWriter(folder / "a-a.tar", name="a-a.tar", suffix="png")
    for length in lengths.tolist():
        ids = draw.integers(4, 32_000, length).tolist()
        made = Sample(
            id="x", source="a", object="o", category="", text="", licence="", provenance="", input_ids=ids,
            is_target=[False] + [True] * (length - 1), images=(),
        )  # fmt: skip
        writer.add(made, split="train")
    distinct = pa.Table.from_pylist(writer.close(), schema=SCHEMA)
    pq.write_table(distinct, folder / "distinct.parquet")
    with pq.ParquetWriter(folder / INDEX, SCHEMA, compression="zstd") as file:
        held_out = distinct.slice(0, HELD_OUT).set_column(
            SCHEMA.get_field_index("split"), "split", pa.array(["validation"] * HELD_OUT)
        )
        file.write_table(held_out)
        many = pa.concat_tables([distinct] * 100).combine_chunks()
        for _ in range(SAMPLES // len(many)):
            file.write_table(many)


def _run(code: str, folder: Path, *arguments: object) -> dict[str, float]:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, str(folder), *map(str, arguments)]
    said: dict[str, float] = json.loads(
        subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True).stdout
    )
    print(arguments, said, file=sys.stderr)
    return said


if __name__ == "__main__":
    main()
