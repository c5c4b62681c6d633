"""A champion of the tiny recipe, and deliveries of new, repeated, leaking and broken data."""

import io
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as Pillow

from vila_ops.artifacts.kinds import Checkpoint, ModelVersion
from vila_ops.config import Resources, Run, load
from vila_ops.config.retrain import RetrainPolicy
from vila_ops.data.preprocess.prepare import prepare
from vila_ops.data.split import split_of
from vila_ops.eval.evaluate import evaluate
from vila_ops.pipeline.stages import model_after, suite_text
from vila_ops.registry import alias_register
from vila_ops.registry.register import register

ROOT = Path(__file__).parents[2]
PAIRS = ROOT / "tests/tiny/pairs"
BENCHMARKS = {name: {"kind": name} for name in ("caption_loss", "text_loss")}
STAGE = {"num_steps": 2, "save_every": 2, "validate_every": 2, "validation_rows": 1}


def tiny(resources: Resources) -> Run:
    """The tiny recipe with its first stage and two benchmarks."""
    run = load(ROOT / "configs/recipes/tiny.yaml", resources=ROOT / "configs/resources/inline.yaml")
    align = run.recipe.stages["align"].with_changes(STAGE)
    few = {f"{suite}.benchmarks": BENCHMARKS for suite in ("final_suite", "stage_suite")}
    return Run(recipe=run.recipe.with_changes({"stages": {"align": align.model_dump()}, **few}), resources=resources)


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, make_resources: Callable[..., Resources]) -> Path:
    """A folder with a store in which the stage is trained."""
    root = tmp_path_factory.mktemp("trained")
    model_after(tiny(make_resources(root)), "align")
    return root


@pytest.fixture
def run(trained: Path, tmp_path: Path, make_resources: Callable[..., Resources]) -> Run:
    """The recipe on a copy of that store, whose model is the champion."""
    for name in ("store", "cache"):
        shutil.copytree(trained / name, tmp_path / name, symlinks=True, copy_function=_link)
    run = tiny(make_resources(tmp_path))
    model = model_after(run, "align")
    assert isinstance(model, Checkpoint)
    name = run.recipe.gate.model_name
    champion = ModelVersion(name=name, version=1, checkpoint=model, promoted=True)
    alias_register.move(name, {"champion": champion}, over=None, reason="test", store=run.resources.storage.store)
    return run


@pytest.fixture
def registered(run: Run, tmp_path: Path, empty_database: Path) -> Run:
    """The run with a registry, in which its model is version 1 and the champion."""
    shutil.copyfile(empty_database, tmp_path / "mlflow.db")
    run = run.with_changes({"resources.tracking.uri": f"sqlite:///{tmp_path}/mlflow.db"})
    recipe, resources = run.recipe, run.resources
    alias_register.remove(recipe.gate.model_name, reason="registered below", store=resources.storage.store)
    model = model_after(run, "align")
    assert isinstance(model, Checkpoint)
    held_out = prepare(recipe.final_suite.mixture, suite_text(recipe, "align"), resources)
    report = evaluate(recipe.final_suite, model, held_out, resources)
    version = register(recipe.gate, model, report, None, resources)
    assert (version.version, version.promoted) == (1, True)
    return run


@pytest.fixture
def policy(tmp_path: Path) -> RetrainPolicy:
    """Retraining on deliveries in a folder of this test."""
    (tmp_path / "inbox").mkdir()
    return RetrainPolicy.model_validate(
        {
            "watch": {"inbox": {"kind": "jsonl", "path": str(tmp_path / "inbox"), "render": "caption"}},
            "stage": "align",
            "replay": 0.5,
            "new_samples": 8,
            "min_new_samples": 4,
            "settle_minutes": 0,
            "canary": None,
        }
    )


def deliver(policy: RetrainPolicy, name: str, records: list[dict[str, Any]], images: dict[str, bytes]) -> Path:
    """A delivery with these lines and image files."""
    folder = Path(policy.watch["inbox"].path) / name  # type: ignore[union-attr]
    folder.mkdir()
    for image, data in images.items():
        (folder / image).write_bytes(data)
    (folder / "records.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    return folder


def record(name: str, image: str, caption: str) -> dict[str, Any]:
    """A line of an image with its caption."""
    parts = [{"image": image}, {"text": caption}]
    turns = [{"role": "document", "parts": parts}]
    return {"id": name, "object": name, "category": "", "licence": "CC0-1.0", "provenance": "test", "turns": turns}


def drawn(seed: int) -> bytes:
    """A PNG of coarse random patches, which is near no other one."""
    patches = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), np.uint8)
    out = io.BytesIO()
    Pillow.fromarray(patches).resize((48, 48), Pillow.Resampling.NEAREST).save(out, "PNG")
    return out.getvalue()


def new_objects(run: Run, count: int, *, start: int = 0) -> list[str]:
    """Names of objects in the train split."""
    split = run.recipe.final_suite.mixture.split
    names = (f"thing {number}" for number in range(start, start + 1000))
    return [name for name in names if split_of(name, split) == "train"][:count]


def good(run: Run, policy: RetrainPolicy, name: str, count: int = 10, *, start: int = 0) -> Path:
    """A delivery of new objects."""
    names = new_objects(run, count, start=start)
    records = [record(one, f"{place}.png", f"{one}.") for place, one in enumerate(names)]
    return deliver(policy, name, records, {f"{place}.png": drawn(start + place) for place in range(count)})


def again(run: Run, policy: RetrainPolicy, name: str, *, split: str) -> Path:
    """A delivery of known images, of a split of the committed pairs, under new names."""
    lines = [json.loads(line) for line in (PAIRS / "records.jsonl").read_text().splitlines()]
    rules = run.recipe.final_suite.mixture.split
    known = [line for line in lines if split_of(line["object"], rules) == split][:8]
    names = new_objects(run, len(known), start=5000)
    images = {f"{one['id']}.png": (PAIRS / one["turns"][0]["parts"][0]["image"]).read_bytes() for one in known}
    pairs = zip(names, images, strict=True)
    return deliver(policy, name, [record(one, image, f"{one}.") for one, image in pairs], images)


def _link(source: str, target: str) -> None:
    """A hard link, as a store makes them; a lock or a database is copied."""
    if "/store/" in source and "/leases/" not in source:
        os.link(source, target)
    else:
        shutil.copy2(source, target)
