"""How long a step waits for its rows, each with about 3,900 tokens and eight JPEGs of 448 px that were not seen before.

A step that sleeps for 100 ms stands for the device. Ours: `BatchLoader`, which reads, decodes and packs the rows in
THREADS threads. The peer: torch's DataLoader with as many worker processes, over the same rows, which it reads and
decodes by the same functions; its batches come as tensors in shared memory. The first row, for which both start up, is
not counted. `rows_per_s` is without any step. On a machine that other programs use too, they take the processor from
the thread that steps, for milliseconds at a time; `chrt -r 1 make bench NAME=loading_ahead` gives both sides priority
over them. Targets: waits of at most 1 % of the time (the mean), and as many rows per second as the DataLoader.
VILA_BENCH_ROUNDS (3) makes it smaller.
"""

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image as Pillow
from result import result
from sklearn.datasets import load_sample_images
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vila_ops.config import NO_CONTEXT, Mixture, Model, Stage, load
from vila_ops.data.preprocess.prepare import prepare
from vila_ops.model.assemble import assemble
from vila_ops.train import loop
from vila_ops.train.batch_builder import BatchBuilder, HostBatch
from vila_ops.train.batch_loader import BatchLoader
from vila_ops.train.job import RankInfo, TrainJob
from vila_ops.train.objective import Batch

ROOT = Path(__file__).parents[1]
ROUNDS = int(os.environ.get("VILA_BENCH_ROUNDS", "3"))
THREADS = 2
ROWS, IMAGES, WORDS, SIDE = 60, 8, 640, 448
STEP_SECONDS = 0.1
WAIT, TARGET = 0.01, 1.0


class HostOnly(BatchBuilder):
    """Leaves out what a device does: it copies tokens and levels beside the step, and normalises the levels."""

    def on_device(self, host: HostBatch, upcoming: Any = ()) -> Batch:
        return host.batch


class Rows(Dataset[dict[str, Tensor]]):
    """The rows of the stage as the DataLoader reads them."""

    def __init__(self, job: TrainJob) -> None:
        _, self.rows, self.batches = loop.load(job)

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        torch.set_num_threads(1)
        host = self.batches.on_host(self.rows.read(self.rows.global_batch(number).rows), step=number)
        assert host.images is not None
        tokens = {name: value for name, value in vars(host.batch).items() if isinstance(value, Tensor)}
        return {**tokens, **host.images.levels}


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="vila") as name:
        job = prepared(Path(name))
        _, rows, _ = loop.load(job)
        whole = [rows.batch(step)[0][0] for step in range(ROWS)]
        assert len({image for row in whole for image in row.images}) == ROWS * IMAGES
        tokens = statistics.mean(len(row.input_ids) for row in whole)
        measured: dict[str, list[float]] = {}
        for _ in range(ROUNDS):
            for who, batches in (("ours", ours), ("peer", peer)):
                measured.setdefault(f"{who}_rows_per_s", []).append(rows_per_second(batches, job))
                share, median = wait_shares(batches, job)
                measured.setdefault(f"{who}_wait", []).append(share)
                measured.setdefault(f"{who}_median_wait", []).append(median)
            print({key: round(values[-1], 4) for key, values in measured.items()}, flush=True)
    rounded = {key: [round(value, 5) for value in values] for key, values in measured.items()}
    medians = {key: statistics.median(values) for key, values in measured.items()}
    ratio = medians["ours_rows_per_s"] / medians["peer_rows_per_s"]
    result(
        "loading_ahead", ours=medians["ours_rows_per_s"], peer=medians["peer_rows_per_s"], target=TARGET,
        ok=ratio >= TARGET and medians["ours_wait"] <= WAIT, unit="rows/s", wait_share=round(medians["ours_wait"], 5),
        peer_wait_share=round(medians["peer_wait"], 5), median_wait_share=round(medians["ours_median_wait"], 5),
        peer_median_wait_share=round(medians["peer_median_wait"], 5), step_seconds=STEP_SECONDS,
        tokens_per_row=round(tokens), images_per_row=IMAGES, threads=THREADS, rounds=rounded,
    )  # fmt: skip


def ours(job: TrainJob) -> Iterator[object]:
    """Our micro-batches."""
    model, rows, batches = loop.load(job)
    with BatchLoader(job, RankInfo(), rows, HostOnly(job, model, device=batches.device)) as loader:
        for step in range(ROWS):
            yield from loader.train(step)


def peer(job: TrainJob) -> Iterator[object]:
    """The DataLoader's batches of one row."""
    yield from DataLoader(Rows(job), batch_size=None, num_workers=THREADS)


def rows_per_second(batches: Callable[[TrainJob], Iterator[object]], job: TrainJob) -> float:
    """Rows per second without a step, from the first row on."""
    rows = batches(job)
    next(rows)
    started = time.perf_counter()
    taken = sum(1 for _ in rows)
    return taken / (time.perf_counter() - started)


def wait_shares(batches: Callable[[TrainJob], Iterator[object]], job: TrainJob) -> tuple[float, float]:
    """Share of the time that steps wait for their rows, from the second step on, and of that the median step waits."""
    rows = batches(job)
    next(rows)
    started, waits = time.perf_counter(), list[float]()
    for _ in range(ROWS - 1):
        time.sleep(STEP_SECONDS)
        began = time.perf_counter()
        next(rows)
        waits.append(time.perf_counter() - began)
    share = sum(waits) / (time.perf_counter() - started)
    rows.close()  # type: ignore[attr-defined]
    return share, statistics.median(waits) / STEP_SECONDS


def prepared(root: Path) -> TrainJob:
    """Documents of eight photos and 640 words each, prepared by our task, and a small model to read them for."""
    run = load(ROOT / "configs/recipes/tiny.yaml", resources=ROOT / "configs/resources/inline.yaml")
    resources = run.resources.with_changes(
        {**{f"storage.{name}": str(root / name) for name in ("store", "data", "cache")},
         "train.loading_threads": THREADS, "storage.features_leave_free": 1.0}
    )  # fmt: skip
    records(root / "documents")
    mixture = Mixture.model_validate(
        {
            "name": "photos",
            "split": {"salt": "bench", "validation": 0.05, "test": 0.05},
            "images": {"encoding": {"kind": "jpeg"}},
            "sources": {"photos": {"kind": "jsonl", "path": str(root / "documents"), "render": "document"}},
        }
    )
    images = {"image_size": SIDE, "projector": {"kind": "mlp_downsample", "factor": 2}}
    model = Model.model_validate({**run.recipe.model.model_dump(), **images})
    own = {"name": "bench", "mixture": mixture.model_dump(), "num_steps": ROWS, "global_batch_size": 1, "pack": False,
           "sequence_length": 4096}  # fmt: skip
    (root / "attempt").mkdir()
    return TrainJob(
        stage=Stage.model_validate({**run.recipe.stages["align"].model_dump(), **own}),
        data=prepare(mixture, model.text(max_tokens=4096), resources), init=assemble(model, resources),
        resources=resources, attempt=str(root / "attempt"), resume=str(root / "resume"), run_id=None,
        fresh_projector=False, context=NO_CONTEXT,
    )  # fmt: skip


def records(folder: Path) -> None:
    """Documents of crops of photos, no two alike, and of words of the committed texts."""
    folder.mkdir()
    draw = np.random.default_rng(0)
    photos = [Pillow.fromarray(np.asarray(photo)).resize((960, 640)) for photo in load_sample_images().images]
    lines = (ROOT / "tests/tiny/definitions/records.jsonl").read_text().splitlines()
    words = [word for line in lines for turn in json.loads(line)["turns"] for part in turn["parts"]
             for word in part.get("text", "").split()]  # fmt: skip
    with (folder / "records.jsonl").open("w") as file:
        for number in range(ROWS + ROWS // 4):
            parts = []
            for image in range(IMAGES):
                left, top = int(draw.integers(0, 512)), int(draw.integers(0, 192))
                crop = photos[int(draw.integers(2))].crop((left, top, left + SIDE, top + SIDE))
                crop.save(folder / f"{number}-{image}.jpg", quality=95)
                said = " ".join(draw.choice(words, WORDS // IMAGES).tolist())
                parts += [{"image": f"{number}-{image}.jpg"}, {"text": said}]
            record = {"id": str(number), "object": f"o{number}", "category": "photos", "licence": "CC0-1.0",
                      "provenance": "scikit-learn", "turns": [{"role": "document", "parts": parts}]}  # fmt: skip
            file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
