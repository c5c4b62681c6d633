"""How often bytes are read: S3 sends each once to a machine and no shard for a look; a process hashes a file once."""

import hashlib
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from vila_ops.artifacts import disk
from vila_ops.artifacts.s3_calls import client
from vila_ops.artifacts.store import opened, read_manifest
from vila_ops.config import Run, load
from vila_ops.data.shards import find_rows, index_of
from vila_ops.eval.evaluate import evaluate
from vila_ops.model.assemble import assemble
from vila_ops.pipeline.stages import prepare_named
from vila_ops.plan.plan import plan_run
from vila_ops.train.stage import train_stage

ROOT = Path(__file__).parents[1]


@pytest.fixture
def run_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Run]:
    """The first stage of the tiny recipe, two steps, on a store."""
    monkeypatch.chdir(ROOT)

    def make(store: str) -> Run:
        places = {"store": store, "data": tmp_path / "data", "cache": tmp_path / "cache"}
        settings = ["stages.align.num_steps=2", "resources.train.threads_per_worker=1"]
        settings += [f"resources.storage.{name}={place}" for name, place in places.items()]
        resources = ROOT / "configs/resources/inline.yaml"
        run = load(ROOT / "configs/recipes/tiny.yaml", resources=resources, overrides=tuple(settings))
        recipe = run.recipe.model_dump()
        return Run.model_validate(
            {**run.model_dump(), "recipe": {**recipe, "stages": {"align": recipe["stages"]["align"]}}}
        )

    return make


@contextmanager
def fetched() -> Iterator[Counter[str]]:
    """The number of times that each file of an artifact is read from S3, by its key."""
    read: Counter[str] = Counter()

    def note(params: dict[str, str], **_: object) -> None:
        if "/leases/" not in params["Key"] and not params["Key"].endswith("/manifest.json"):
            read[params["Key"]] += 1

    event = "before-parameter-build.s3.GetObject"
    client().meta.events.register(event, note)
    try:
        yield read
    finally:
        client().meta.events.unregister(event, note)


@contextmanager
def hashes() -> Iterator[Counter[int]]:
    """The number of times that each file is hashed, by its inode."""
    hashed: Counter[int] = Counter()
    own = hashlib.file_digest

    def noted(file: Any, *rest: Any) -> Any:
        hashed[os.fstat(file.fileno()).st_ino] += 1
        return own(file, *rest)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(hashlib, "file_digest", noted)
        yield hashed


@pytest.mark.slow
def test_s3_sends_a_look_the_index_alone_and_training_each_byte_once(
    run_in: Callable[[str], Run], s3_store: str, tmp_path: Path
) -> None:
    run = run_in(s3_store)
    stage, resources = run.recipe.stages["align"], run.resources
    data, init = prepare_named(run, stage.mixture.name), assemble(run.recipe.model, resources)
    keys = index_of(data)["key"].to_pylist()[:2]
    shutil.rmtree(tmp_path / "copies")  # as on another machine
    with fetched() as read:
        plan_run(run)
        assert len(find_rows(data, keys)) == 2
    ((index, count),) = read.items()
    assert (index.rpartition("/")[2], count) == ("index.parquet", 1)
    with fetched() as read:
        trained = train_stage(stage, run.recipe.model, data, init, resources)
    bucket = s3_store.split("/")[2]
    files = [place for one in (data, init) for place, _ in opened(one).places.values()]
    wanted = {place.removeprefix(f"s3://{bucket}/") for place in files} - {index}
    of_artifacts = {key: number for key, number in read.items() if "/resume/" not in key}
    assert of_artifacts == dict.fromkeys(wanted, 1)
    assert read_manifest(trained.uri)["parents"] == [data.digest, init.digest]
    with fetched() as read, hashes() as hashed:  # as the next rank on this machine, which reads a share of it
        opened(data).fetch()
    assert (read, hashed) == ({}, {})


@pytest.mark.slow
def test_a_process_hashes_each_file_of_the_store_once(
    run_in: Callable[[str], Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over all tasks: what one has sealed or compared, the next one knows, unless it changed."""
    monkeypatch.setattr(disk, "SETTLED_SECONDS", -1.0)
    run = run_in(str(tmp_path / "store"))
    stage, resources = run.recipe.stages["align"], run.resources
    with hashes() as hashed:
        data, init = prepare_named(run, stage.mixture.name), assemble(run.recipe.model, resources)
        trained = train_stage(stage, run.recipe.model, data, init, resources)
        held_out = prepare_named(run, run.recipe.final_suite.mixture.name)
        suite = run.recipe.stage_suite.with_changes({"benchmarks": {"caption_loss": {"kind": "caption_loss"}}})
        evaluate(suite, trained, held_out, resources)
    files = {os.stat(place).st_ino for one in (data, init, trained) for place, _ in opened(one).places.values()}
    assert files <= hashed.keys()
    sealed = {path.stat().st_ino for path in (tmp_path / "store").rglob("attempt-*/**/*") if path.is_file()}
    assert {hashed[file] for file in sealed} == {1}
