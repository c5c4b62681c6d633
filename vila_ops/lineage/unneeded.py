"""Sealed artifacts that nothing needs any more, so that their space may be freed.

Needed are, with all that they were made from: the registered versions, what the recipes to keep would reuse, the
datasets that DVC's outputs hold, and what was sealed within a grace time. Reports, scores, answers and cards of a
needed model are needed with it, and surveys with a dataset that was decided on them: they save work when its raw files
change. Scans of raw files are read only while a dataset is made. At least one model of each stage stays, whatever else
is needed.
"""

import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from pathlib import Path

from vila_ops.artifacts.backend import GRACE_SECONDS
from vila_ops.artifacts.kinds import (
    Answers,
    BenchmarkResult,
    Checkpoint,
    Dataset,
    Demonstrations,
    EvalReport,
    ModelCard,
    RawScan,
    Shard,
    Survey,
)
from vila_ops.artifacts.store import KINDS, backend, find_manifest, store_of, verify_folder
from vila_ops.config import Config, Resources, Run
from vila_ops.data.preprocess.prepare import SURVEYS
from vila_ops.errors import CorruptArtifact
from vila_ops.lineage.graph import MAIN, PARTS, Sealed, sealed_of
from vila_ops.pipeline.explain import explain
from vila_ops.registry import alias_register
from vila_ops.registry.mlflow_registry import registered_digests

OF_A_MODEL = tuple(KINDS[kind] for kind in (EvalReport, BenchmarkResult, Answers, Demonstrations, ModelCard))
CHECKPOINT, DATASET, SHARD, SURVEY = KINDS[Checkpoint], KINDS[Dataset], KINDS[Shard], KINDS[Survey]


class Unneeded(Config):
    """A sealed folder that nothing needs."""

    uri: str
    kind: str
    name: str
    num_bytes: int
    """Bytes of its files; those that another artifact shares by a hard link are not freed."""
    sealed: float
    """Time of sealing, in seconds since 1970."""


def unneeded(resources: Resources, keep: Sequence[Run], *, grace_seconds: float = GRACE_SECONDS) -> list[Unneeded]:
    """The sealed folders that nothing needs, the largest first. `keep` are runs whose results stay.

    Raises CorruptArtifact for a damaged manifest, which may be what something needs.
    """
    every = sealed_of((*MAIN, *PARTS, Survey, RawScan), store=resources.storage.store)
    roots = {*_registered(resources), *_in_dvc(resources), *(one for run in keep for one in _of_run(run))}
    latest = time.time() - grace_seconds
    roots |= {one.manifest["digest"] for one in every if _sealed_at(one) > latest}
    last = {one.manifest["digest"] for one in _last_models(every, _closed(every, roots))}
    needed = _closed(every, roots | last)
    lost = (_unneeded(one) for one in every if one.uri not in needed)
    return sorted(lost, key=lambda one: (-one.num_bytes, one.uri))


def remove_sealed(one: Unneeded) -> None:
    """Remove a sealed folder. Raises ValueError where no other model of its stage could be read and compared."""
    if one.kind == CHECKPOINT:
        _check_another(one)
    backend(one.uri).remove(one.uri)


def _registered(resources: Resources) -> Iterator[str]:
    """Digests of all that aliases have pointed to, and of the other versions that MLflow lists."""
    store = resources.storage.store
    for name in alias_register.names(store=store):
        yield from (checkpoint.digest for checkpoint in alias_register.read(name, store=store).checkpoints.values())
    if resources.tracking.uri is not None:
        yield from registered_digests(resources)


def _in_dvc(resources: Resources) -> Iterator[str]:
    for folder in sorted(Path(resources.storage.data).resolve().glob("*/")):
        try:
            manifest = find_manifest(str(folder))
        except CorruptArtifact:  # another program's manifest.json
            continue
        if manifest is not None:
            yield manifest["digest"]


def _of_run(run: Run) -> Iterator[str]:
    for step in explain(run):
        manifest = None if step.uri is None else find_manifest(step.uri)
        if manifest is not None:
            yield manifest["digest"]


def _closed(every: Sequence[Sealed], roots: Iterable[str]) -> set[str]:
    """The folders that are needed if some digests are."""
    by_digest: dict[str, list[Sealed]] = defaultdict(list)
    of_model: dict[str, list[Sealed]] = defaultdict(list)
    shards: dict[str, Sealed] = {}
    for one in every:
        by_digest[one.manifest["digest"]].append(one)
        if one.kind in OF_A_MODEL:
            of_model[one.manifest["facts"]["model"]].append(one)
        if one.kind == SHARD:
            shards[one.uri.rpartition("/")[2][:12]] = one
    by_uri = {one.uri: one for one in every}
    needed: set[str] = set()
    front = [one for digest in roots for one in by_digest[digest]]
    while front:
        one = front.pop()
        if one.uri in needed:
            continue
        needed.add(one.uri)
        manifest = one.manifest
        front += [other for parent in manifest["parents"] for other in by_digest[parent]]
        front += of_model[manifest["digest"]]
        root = store_of(one.uri)
        held = {"/".join([root, *facts["at"].split("/")[:2]]) for facts in manifest["files"].values() if "at" in facts}
        front += [by_uri[uri] for uri in held if uri in by_uri]
        if one.kind == DATASET:
            keys = (name.removesuffix(".tar").rpartition("-")[2] for name in manifest["files"] if name.endswith(".tar"))
            front += [shards[key] for key in keys if key in shards]
            read = (f"{root}/{SURVEY}/{key}" for key in manifest["execution"].get(SURVEYS, ()))
            front += [by_uri[uri] for uri in read if uri in by_uri]
    return needed


def _last_models(every: Sequence[Sealed], needed: set[str]) -> Iterator[Sealed]:
    """The newest model of each stage of which no model is needed."""
    stages: dict[str, list[Sealed]] = defaultdict(list)
    for one in every:
        if one.kind == CHECKPOINT:
            stages[one.manifest["facts"]["stage"]].append(one)
    for models in stages.values():
        if not any(one.uri in needed for one in models):
            yield max(models, key=_sealed_at)


def _check_another(one: Unneeded) -> None:
    """Raise ValueError unless another model of the stage is whole."""
    for other in sealed_of((Checkpoint,), store=store_of(one.uri)):
        if other.uri != one.uri and other.manifest["facts"]["stage"] == one.name:
            try:
                verify_folder(other.uri)
            except CorruptArtifact:
                continue
            return
    raise ValueError(f"{one.uri} is the only model of stage {one.name!r} that is whole, so it is not removed")


def _unneeded(one: Sealed) -> Unneeded:
    facts, recipe = one.manifest["facts"], one.manifest["recipe"]
    name = facts.get("stage") or facts.get("suite") or facts.get("benchmark") or ""
    if one.kind == DATASET:
        name = recipe["mixture"]["name"]
    own = (facts["size"] for facts in one.manifest["files"].values() if "at" not in facts)
    return Unneeded(uri=one.uri, kind=one.kind, name=name, num_bytes=sum(own), sealed=_sealed_at(one))


def _sealed_at(one: Sealed) -> float:
    """0 for a manifest that does not say when."""
    stated = one.manifest["execution"].get("sealed")
    return datetime.fromisoformat(stated).timestamp() if stated else 0.0
