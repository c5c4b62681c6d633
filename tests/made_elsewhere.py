"""A process that makes one of each artifact under a folder: `made_elsewhere.py ROOT`. Their digests are in made.json.

`made_elsewhere.py ROOT 2` makes data, checkpoint and report with 2 threads too, in a store of their own; the losses and
metrics of both are in numbers.json.

The recipe is the same wherever ROOT lies; torch's, numpy's and Python's global generators begin anywhere.
"""

import importlib
import json
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vila_ops.artifacts.exports import export
from vila_ops.artifacts.kinds import Checkpoint, EvalReport
from vila_ops.artifacts.store import content, file
from vila_ops.config import Mixture, Model, Resources, Stage, Suite
from vila_ops.data.preprocess.prepare import prepare
from vila_ops.eval.evaluate import evaluate
from vila_ops.eval.report import read_report
from vila_ops.model.assemble import assemble
from vila_ops.model.export import write_plain
from vila_ops.train.curve import CURVE
from vila_ops.train.stage import train_stage

SPLIT = {"salt": "tiny", "validation": 0.2, "test": 0.2}


def model(root: Path, **more: Any) -> Model:
    """A random tower and language model, or the parts in `more`."""
    return Model.model_validate(
        {
            "vision_tower": {"kind": "random", "architecture": "clip"},
            "projector": {"kind": "mlp_gelu"},
            "language_model": {"kind": "random", "tokenizer": str(root / "tiny/tokenizer")},
            "image_size": 56,
            "patch_size": 14,
            **more,
        }
    )


def mixture(root: Path) -> Mixture:
    """Captions, some of whose records and images are damaged."""
    tiny = root / "tiny"
    llava = {"kind": "llava", "path": str(tiny / "llava.json"), "images": str(tiny / "pairs"), "licence": "CC0-1.0"}
    sources = {
        "pairs": {"kind": "jsonl", "path": str(tiny / "pairs"), "render": "caption"},
        "documents": {"kind": "jsonl", "path": str(tiny / "documents"), "render": "document"},
        "llava": llava,
    }
    more = {"shard_bytes": 40_000, "split": SPLIT, "max_bad_share": 0.5}
    return Mixture.model_validate({"name": "mixed", "sources": sources, **more})


def stage(mixed: Mixture) -> Stage:
    """Two steps of projector and adapters."""
    return Stage.model_validate(
        {
            "name": "sft",
            "mixture": mixed.model_dump(),
            "trainable": ["projector", "language_model"],
            "tuning": {"kind": "lora", "rank": 2, "alpha": 4, "dropout": 0.1},
            "num_steps": 2,
            "global_batch_size": 2,
            "sequence_length": 128,
            "learning_rate": 1e-3,
            "precision": "fp32",
            "save_every": 1,
            "validate_every": 2,
            "validation_rows": 2,
        }
    )


def suite(mixed: Mixture) -> Suite:
    """One benchmark on the validation split."""
    settings = {"name": "suite", "mixture": mixed.model_dump(), "split": "validation", "max_tokens": 128}
    return Suite.model_validate({**settings, "benchmarks": {"caption_loss": {"kind": "caption_loss"}}})


def numbers(trained: Checkpoint, report: EvalReport) -> list[float]:
    """The losses of a stage, and the metrics of its model."""
    curve = json.loads(file(trained, CURVE).read_text())
    losses = [float.fromhex(row[key]) for row in curve for key in ("loss", "validation_loss") if key in row]
    return losses + [metric.value for metric in read_report(report).metrics]


def main(root: Path, threads: int) -> None:
    """Make everything, twice with the cache cold and warm for what is converted."""
    torch.set_num_threads(1)
    torch.manual_seed(random.getrandbits(60))
    np.random.seed(random.getrandbits(32))
    importlib.import_module("prefect.logging.handlers")  # it imports rich, which draws a number when it is imported
    before = torch.get_rng_state(), random.getstate(), str(np.random.get_state())
    places = {f"storage.{name}": f"{root}/{name}" for name in ("store", "cache", "data")}
    resources = Resources(launch="inline").with_changes(places)
    again = resources.with_changes({"storage.store": f"{root}/again"})
    packaged = model(root, **json.loads((root / "packaged.json").read_text()))
    folders = model(root, **json.loads((root / "folders.json").read_text()))
    mixed = mixture(root)
    made: dict[str, Any] = {"cold": assemble(packaged, resources), "warm": assemble(packaged, again)}
    made |= {"folders": assemble(folders, resources), "base": assemble(model(root), resources)}
    made["data"] = prepare(mixed, model(root).text(max_tokens=128), resources)
    made["trained"] = train_stage(stage(mixed), model(root), made["data"], made["base"], resources)
    made["report"] = evaluate(suite(mixed), made["trained"], made["data"], resources)
    write_plain(content(made["trained"]), root / "exported/model")
    export(made["data"], root / "exported/data")
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (random.getstate(), str(np.random.get_state()))
    digests = {name: [one.uri.rpartition("/")[2], one.digest] for name, one in made.items()}
    (root / "made.json").write_text(json.dumps(digests))
    if threads > 1:
        with_threads(threads, root, made, resources)


def with_threads(threads: int, root: Path, made: dict[str, Any], resources: Resources) -> None:
    """Make data, checkpoint and report again, in a store of their own, with this number of threads."""
    torch.set_num_threads(threads)
    names = ("train.threads_per_worker", "evaluate.threads_per_worker")
    other = resources.with_changes({"storage.store": f"{root}/threads", **dict.fromkeys(names, threads)})
    mixed = mixture(root)
    data = prepare(mixed, model(root).text(max_tokens=128), other)
    assert data.digest == made["data"].digest
    trained = train_stage(stage(mixed), model(root), data, made["base"], other)
    report = evaluate(suite(mixed), trained, data, other)
    both = {1: numbers(made["trained"], made["report"]), threads: numbers(trained, report)}
    (root / "numbers.json").write_text(json.dumps(both))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 1)
