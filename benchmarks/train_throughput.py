"""Useful tokens per second in training: our loop beside HF Trainer with stock LLaVA, with the same weights and samples.

A step is one global batch: the samples of ROWS_PER_STEP packed sequences. The Trainer gets exactly these as its data
set and accumulates over it, so that both take one optimizer step on the same samples. Ours packs them, ROWS_PER_PASS
sequences in a pass. In the first epoch its steps differ, as a pass of the tower takes images of later steps too: `ours`
is the rate over WINDOW steps one after the other, the middle one of which the peers take, and one more step comes
before them, so that they are in the middle of training. The peer pads micro-batches of 16 samples, about as many tokens
(with its default sampler, or with its group_by_length, which here sorts the whole step: its best case), or takes one
sample at a time, unpadded. Lengths are LLaVA-like (benchmarks/peers.py), divided by 9, since an image is 64 tokens here
and 576 there. Both compute in PRECISION: bf16 (ours: bf16 weights with fp32 masters; the peer: autocast over fp32
weights), or fp32 on a CPU without instructions for bf16. Fused AdamW, clipping at 1, frozen tower; the language model
is SmolLM2-135M with its real weights.
`loss_per_token` is that of the first round with the initial weights, which no step changes (our learning rate is 0,
and a peer loads them for each).

Targets: 1.8 times the default sampler; 1.5 times group_by_length; no slower than unpadded, and ourselves unpacked; the
loop costs at most 3 % over a bare torch loop on ready batches, in LOOP_PAIRS pairs of steps of two sequences (the time
of a long step drifts by more than that); from the second epoch on the tower's features take at most 2 % of a step;
the loss of 2,048 x 49,152 logits needs at most 250 MiB and no more time than full logits. VILA_BENCH_ROUNDS (3) and
VILA_BENCH_PAIRS (40) make it smaller.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peers import llava_like
from PIL import Image as Pillow
from result import result
from sklearn.datasets import load_sample_images
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration, Trainer, TrainerCallback, TrainingArguments

from vila_ops.artifacts.kinds import Dataset, Pretrained
from vila_ops.artifacts.store import content
from vila_ops.config import NO_CONTEXT, Mixture, Resources, Stage, load
from vila_ops.data.loading.packing import IGNORE_INDEX, pack
from vila_ops.data.preprocess.prepare import prepare
from vila_ops.data.shards import Sample, read_index, read_sample
from vila_ops.device import precision_notes
from vila_ops.model import folder as model_folder
from vila_ops.model.assemble import assemble
from vila_ops.model.pixels import Pixels
from vila_ops.model.trainable import set_trainable
from vila_ops.tracking import MetricLog
from vila_ops.train import loop
from vila_ops.train.bad_samples import BadSampleFinder
from vila_ops.train.batch_builder import BatchBuilder
from vila_ops.train.batch_loader import BatchLoader, LoadedBatch
from vila_ops.train.engine import PlainEngine, build_engine
from vila_ops.train.job import RankInfo, TrainJob
from vila_ops.train.metrics import LossAccumulator, MetricsLogger
from vila_ops.train.objective import Objective
from vila_ops.train.optim import parameter_groups
from vila_ops.train.watchdog import StepWatchdog

ROOT = Path(__file__).parents[1]
ROUNDS = int(os.environ.get("VILA_BENCH_ROUNDS", "3"))
LOOP_PAIRS = int(os.environ.get("VILA_BENCH_PAIRS", "40"))
THREADS = 2
SCALE = 9
TARGETS = {"default": 1.8, "group_by_length": 1.5, "unpadded": 1.0, "ours_unpacked": 1.0}
SAMPLES, ROWS_PER_STEP, ROWS_PER_PASS, SEQUENCE_LENGTH, SIDE = 900, 8, 4, 512, 112
WINDOW = 3
PRECISION = "fp32" if precision_notes("bf16", torch.device("cpu")) else "bf16"
PEERS: dict[str, dict[str, Any]] = {
    "default": {"per_device_train_batch_size": 16},
    "group_by_length": {"per_device_train_batch_size": 16, "train_sampling_strategy": "group_by_length"},
    "unpadded": {"per_device_train_batch_size": 1},
}
WORDS = ["the", "of", "and", "to", "in", "is", "that", "for", "it", "was", "on", "are", "as", "with", "his", "they"]


def main() -> None:
    torch.set_num_threads(THREADS)
    with tempfile.TemporaryDirectory(prefix="vila") as folder:
        root = Path(folder)
        data, init, stage, resources = prepared(root)
        ours = Ours(data, init, stage, resources, root)
        losses: dict[str, float] = {}
        rates: dict[str, list[float]] = {}
        tower_shares = []
        for number in range(ROUNDS):
            begin = number * (WINDOW + 1)
            window, step = range(begin + 1, begin + 1 + WINDOW), begin + 1 + WINDOW // 2
            rates.setdefault("ours", []).append(round(ours.rate(window), 1))
            samples = ours.samples(step=step)
            seconds = {"ours_from_second_epoch": ours.seconds(step=step)}
            if not losses:
                losses["ours"] = ours.loss(step=step)
            tower_shares.append(ours.tower_seconds(step=step) / seconds["ours_from_second_epoch"])
            seconds["ours_unpacked"] = ours.unpacked_seconds(samples)
            for name, how in PEERS.items():
                seconds[name], loss = peer(ours.init, samples, how, out=Path(ours.job.attempt))
                losses.setdefault(name, loss)
            tokens = tokens_of(samples)
            for name, took in seconds.items():
                rates.setdefault(name, []).append(round(tokens / took, 1))
            print({name: values[-1] for name, values in rates.items()}, flush=True)
        del ours
        few = Stage.model_validate({**stage.model_dump(), "global_batch_size": 2})
        alone = resources.with_changes({"train.micro_batch_size": 1})
        loop_share = round(Ours(data, init, few, alone, root / "few").loop_share(), 4)
    medians = {name: statistics.median(values) for name, values in rates.items()}
    ratios = {name: round(medians["ours"] / medians[name], 3) for name in TARGETS}
    tower_share = round(statistics.median(tower_shares), 4)
    logits = of_the_loss()
    ok = (
        all(ratios[name] >= target for name, target in TARGETS.items())
        and loop_share <= 0.03
        and tower_share <= 0.02
        and logits["mib"] <= 250
        and logits["seconds"] <= logits["full_seconds"]
    )
    result(
        "train_throughput", ours=medians["ours"], peer=medians["default"], target=TARGETS["default"], ok=ok,
        unit="useful tokens/s", precision=PRECISION, targets=TARGETS, rates=rates, ratios=ratios,
        loss_per_token=losses, loop_overhead=loop_share, tower_share_from_second_epoch=tower_share,
        loss_of_2048_x_49152=logits,
    )  # fmt: skip


def prepared(root: Path) -> tuple[Dataset, Pretrained, Stage, Resources]:
    """LLaVA records with LLaVA-like lengths, prepared by our task, and the model."""
    run = load(
        ROOT / "configs/recipes/demo.yaml",
        resources=ROOT / "configs/resources/inline.yaml",
        overrides=(f"model.image_size={SIDE}",),
    )
    folders = {f"storage.{name}": str(root / name) for name in ("store", "data")}
    resources = run.resources.with_changes({**folders, "train.micro_batch_size": ROWS_PER_PASS})
    records(root / "llava.json", images=root / "images")
    mixture = Mixture.model_validate(
        {
            "name": "llava",
            "split": {"salt": "bench", "validation": 0.02, "test": 0.02},
            "sources": {
                "llava": {
                    "kind": "llava",
                    "path": str(root / "llava.json"),
                    "images": str(root / "images"),
                    "licence": "CC0-1.0",
                }
            },
        }
    )
    model = run.recipe.model
    data = prepare(mixture, model.text(max_tokens=SEQUENCE_LENGTH), resources)
    own = {"name": "bench", "mixture": mixture.model_dump(), "num_steps": 100, "global_batch_size": ROWS_PER_STEP,
           "precision": PRECISION}  # fmt: skip
    stage = Stage.model_validate({**run.recipe.stages["sft"].model_dump(), **own})
    return data, assemble(model, resources), stage, resources


def records(path: Path, *, images: Path) -> None:
    """One conversation for each sample; its text has as many words as LLaVA's has tokens, divided by SCALE."""
    images.mkdir()
    draw = np.random.default_rng(0)
    photos = [np.asarray(photo) for photo in load_sample_images().images]
    made = []
    for number, (length, shows) in enumerate(zip(*llava_like(SAMPLES), strict=True)):
        words = max(8, (int(length) - 576 * int(shows)) // SCALE)
        said = draw.choice(WORDS, words).tolist()
        asked, answered = " ".join(said[: words // 4]), " ".join(said[words // 4 :])
        turns = [
            {"from": "human", "value": f"<image>\n{asked}" if shows else asked},
            {"from": "gpt", "value": answered},
        ]
        record: dict[str, Any] = {"id": f"s{number}", "conversations": turns}
        if shows:
            photo = photos[number % 2]
            top, left = (int(draw.integers(0, side - SIDE)) for side in photo.shape[:2])
            Pillow.fromarray(photo[top : top + SIDE, left : left + SIDE]).save(images / f"{number}.jpg", quality=95)
            record["image"] = f"{number}.jpg"
        made.append(record)
    path.write_text(json.dumps(made))


class Ours:
    """The parts of a stage, put together as in `loop.train`."""

    def __init__(self, data: Dataset, init: Pretrained, stage: Stage, resources: Resources, root: Path) -> None:
        self.init = init
        (root / "attempt").mkdir(parents=True)
        self.job = TrainJob(
            stage=stage, data=data, init=init, resources=resources, attempt=str(root / "attempt"),
            resume=str(root / "resume"), run_id=None, fresh_projector=False, context=NO_CONTEXT,
        )  # fmt: skip
        model, self.rows, self.batches = loop.load(self.job)
        self.objective = Objective(model)
        self.trained = set_trainable(self.objective, stage.trainable, stage.tuning)
        self.engine = build_engine(self.objective, self.trained, stage, resources)
        self.accumulator = LossAccumulator(self.job, model, self.batches, self.rows.sources())
        metrics = MetricLog(resources, None)
        self.bad_samples = BadSampleFinder(self.job, StepWatchdog(self.job, RankInfo()), self.rows, [], metrics)
        self.metrics_logger = MetricsLogger(
            self.job, metrics, self.batches.device, step=0, num_steps=stage.num_steps or 0
        )
        assert isinstance(self.engine, PlainEngine)
        masters = iter(self.engine.masters)
        updated = {part: [(name, next(masters)) for name, _ in named] for part, named in self.trained.items()}
        self.bare = torch.optim.AdamW(parameter_groups(stage, updated), betas=stage.betas, fused=True)
        self.index = {row["key"]: row for row in read_index(content(data)).to_pylist()}

    def samples(self, *, step: int) -> list[Sample]:
        """The samples of a step."""
        rows, _ = self.rows.batch(step)
        rows_of_index = [self.index[key] for row in rows for key in row.keys]
        folder = content(self.job.data)
        return [read_sample(folder, shard=row["shard"], offset=row["offset"], key=row["key"]) for row in rows_of_index]

    @torch.no_grad()
    def loss(self, *, step: int) -> float:
        """Loss of a step's samples, nats per token."""
        rows, num_targets = self.rows.batch(step)
        return sum(float(self.engine.loss(self.batches([row]))[0]) for row in rows) / num_targets

    def rate(self, steps: range) -> float:
        """Tokens a second of some steps of `loop.train` one after the other, which another one of theirs begins."""
        with BatchLoader(self.job, RankInfo(), self.rows, self.batches) as loader:
            self.seconds_of(loader, step=steps[0] - 1)
            seconds = sum(self.seconds_of(loader, step=step) for step in steps)
        return sum(tokens_of(self.samples(step=step)) for step in steps) / seconds

    def seconds(self, *, step: int, rows: Any = None) -> float:
        """Seconds of one step of `loop.train`, metrics included."""
        with BatchLoader(self.job, RankInfo(), self.rows, self.batches) as loader:
            return self.seconds_of(rows or loader, step=step)

    def seconds_of(self, loader: Any, *, step: int) -> float:
        """Seconds of one step with the micro-batches of a loader."""
        started = time.perf_counter()
        self.bad_samples.watchdog.heartbeat(step, "train")
        loop.accumulate_gradients(self.engine, self.accumulator, loader, step=step, bad_samples=self.bad_samples)
        seen = self.accumulator.reduce(self.engine.step(0.0))
        self.bad_samples.check_finite("loss", seen.loss, step=step)
        self.bad_samples.check_finite("gradient norm", seen.grad_norm, step=step)
        self.bad_samples.check_spike(step, seen.loss)
        self.metrics_logger.log_step(step, seen, lr_multiplier=0.0, stall_seconds=0.0)
        return time.perf_counter() - started

    def loop_share(self) -> float:
        """Share of time that a step of the loop takes over a bare one; its features are in the cache."""
        shares = []
        for step in range(1, LOOP_PAIRS + 2):
            for kept in (step - 1, step):
                self.tower_seconds(step=kept)
            if step % 2:
                ours, bare = self.seconds(step=step), self.bare_seconds(step=step)
            else:
                bare, ours = self.bare_seconds(step=step), self.seconds(step=step)
            shares.append(ours / bare - 1)
        return statistics.median(shares[1:])  # the first one allocates the moments

    def unpacked_seconds(self, samples: list[Sample]) -> float:
        """Seconds of one step with one sequence for each sample."""
        return self.seconds(step=0, rows=Alone(samples, self.batches))

    def bare_seconds(self, *, step: int) -> float:
        """Seconds of forward and backward passes over ready batches, clipping and an update; nothing else."""
        rows, num_targets = self.rows.batch(step)
        ready = [self.batches([row], step=step) for row in rows]
        started = time.perf_counter()
        for batch in ready:
            (self.objective(batch)[0] / num_targets).backward()
        pairs = [(p, master) for (_, p), master in zip(self.engine.named, self.engine.masters, strict=True)]
        for p, master in pairs:
            if master is not p:  # in fp32 they are the same
                master.grad, p.grad = p.grad, None
        nn.utils.clip_grad_norm_([master for _, master in pairs], 1.0)
        for group in self.bare.param_groups:
            group["lr"] = 0.0
        self.bare.step()
        with torch.no_grad():
            for p, master in pairs:
                if master is not p:
                    p.copy_(master)
        self.bare.zero_grad(set_to_none=True)
        return time.perf_counter() - started

    def tower_seconds(self, *, step: int) -> float:
        """Seconds of reading a step's features from the cache."""
        rows, _ = self.rows.batch(step)
        started = time.perf_counter()
        for row in rows:
            if row.images:
                self.batches.feature_cache(row.images)
        return time.perf_counter() - started


def tokens_of(samples: list[Sample]) -> int:
    """Useful tokens of samples."""
    return sum(len(sample.input_ids) for sample in samples)


class Alone:
    """Sequences as `loop.accumulate_gradients` reads them, one sample in each."""

    def __init__(self, samples: list[Sample], batches: BatchBuilder) -> None:
        self.rows = [pack([sample], capacity=len(sample.input_ids)) for sample in samples]
        self.batches = batches

    def train(self, step: int) -> Iterator[LoadedBatch]:
        """All sequences of the step."""
        num_targets = sum(int((row.labels >= 0).sum()) for row in self.rows)
        for row in self.rows:
            yield LoadedBatch(self.batches([row], step=step), [row], num_targets, 0.0)


class Samples(torch.utils.data.Dataset[dict[str, Any]]):
    """Our samples as HF's Trainer reads them."""

    def __init__(self, samples: list[Sample]) -> None:
        self.items = [
            {
                "input_ids": list(sample.input_ids),
                "labels": [
                    i if is_target else IGNORE_INDEX
                    for i, is_target in zip(sample.input_ids, sample.is_target, strict=True)
                ],
                "images": list(sample.images),
            }
            for sample in samples
        ]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, number: int) -> dict[str, Any]:
        return self.items[number]


def collate(items: list[dict[str, Any]], *, pad: int, pixels: Pixels) -> dict[str, Tensor]:
    """A micro-batch padded to its longest sample."""
    longest = max(len(item["input_ids"]) for item in items)

    def padded(key: str, value: int) -> Tensor:
        return torch.tensor([item[key] + [value] * (longest - len(item[key])) for item in items])

    batch = {"input_ids": padded("input_ids", pad), "labels": padded("labels", IGNORE_INDEX)}
    lengths = torch.tensor([len(item["input_ids"]) for item in items])
    batch["attention_mask"] = (torch.arange(longest)[None] < lengths[:, None]).long()
    if images := [image for item in items for image in item["images"]]:
        batch["pixel_values"] = pixels(images)
    return batch


class Clock(TrainerCallback):
    """Records the seconds of the one step, reading of its samples included."""

    def on_epoch_begin(self, *_: Any, **__: Any) -> None:
        self.started = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds = time.perf_counter() - self.started


def peer(init: Pretrained, samples: list[Sample], how: dict[str, Any], *, out: Path) -> tuple[float, float]:
    """Seconds and loss per token of one step of HF's Trainer over the samples, from the initial weights."""
    model = LlavaForConditionalGeneration.from_pretrained(content(init), dtype=torch.float32)
    model.requires_grad_(True)
    model.model.vision_tower.requires_grad_(False)
    mean, std = model_folder.normalisation(content(init))
    clock = Clock()
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(out),
            gradient_accumulation_steps=-(-len(samples) // how["per_device_train_batch_size"]),
            max_steps=1,
            learning_rate=1e-5,
            max_grad_norm=1.0,
            optim="adamw_torch_fused",
            bf16=PRECISION == "bf16",
            use_cpu=True,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
            dataloader_pin_memory=False,
            **how,
        ),
        train_dataset=Samples(samples),
        data_collator=partial(collate, pad=0, pixels=Pixels(mean, std)),
        callbacks=[clock],
    )
    trainer.train()
    return clock.seconds, round(trainer.state.log_history[0]["loss"], 4)


def of_the_loss() -> dict[str, float]:
    """Peak MiB beyond the inputs, and seconds, of head and loss in fp32, forward and backward: ours and in full."""
    said = subprocess.run([sys.executable, "-c", LOSS], check=True, capture_output=True, text=True).stdout
    measured: dict[str, float] = json.loads(said.splitlines()[-1])
    return measured


LOSS = f"""
import json, re, statistics, time
from pathlib import Path
import torch
from vila_ops.model.loss import Head

torch.set_num_threads({THREADS})
torch.manual_seed(0)
head = Head(576, 49_152, bias=False)
hidden = torch.randn(2048, 576, requires_grad=True)
labels = torch.randint(49_152, (2048,))

def ours():
    head(hidden, labels)[0].backward()

def full():
    torch.nn.functional.cross_entropy(head(hidden), labels, reduction="sum").backward()

def resident(kind):
    return int(re.search(kind + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024

def measured(step):
    hidden.grad = head.weight.grad = None
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak to the resident memory
    before, started = resident("VmRSS"), time.perf_counter()
    step()
    return resident("VmHWM") - before, time.perf_counter() - started

measurements = {{"ours": [], "full": []}}
for number in range(6):
    for name, step in (("ours", ours), ("full", full)):
        measurements[name].append(measured(step))
medians = {{name: [statistics.median(column) for column in zip(*rows[1:])] for name, rows in measurements.items()}}
(mib, seconds), (full_mib, full_seconds) = medians["ours"], medians["full"]
kept = {{"mib": mib, "seconds": seconds, "full_mib": full_mib, "full_seconds": full_seconds}}
print(json.dumps({{name: round(value, 3) for name, value in kept.items()}}))
"""

if __name__ == "__main__":
    main()
