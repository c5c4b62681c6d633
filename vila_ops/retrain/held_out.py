"""The held-out records of a recipe's final suite as an evaluation set, so that deliveries which leak them are told.

Training data and suite may share a source, which is split by object. So the records of the suite's split are copied,
as they are in the raw files, into a folder of the scratch space, once for each content.
"""

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from vila_ops.config import Config, Recipe, Resources, fingerprint
from vila_ops.config.sources import JsonLines
from vila_ops.data import sources
from vila_ops.data.preprocess.identity import source_recipe
from vila_ops.data.preprocess.shard_writer import folders_of, numbered
from vila_ops.data.raw.files import Span
from vila_ops.data.raw.known import Known
from vila_ops.data.records import Image, Record
from vila_ops.data.sources.jsonl import RECORDS
from vila_ops.data.split import split_of

REVISION = 1
"""Raised if other records are copied for the same settings."""


class HeldOutRecords(Config):
    """The copied records."""

    source: JsonLines
    records: int


def held_out_records(recipe: Recipe, resources: Resources) -> HeldOutRecords:
    """The records of the final suite's split, copied if they are not yet.

    Raises ValueError where there are none, as nothing could be compared with them.
    """
    suite, cache = recipe.final_suite, resources.storage.cache_folder()
    read = {name: sources.digest(source, cache=cache) for name, source in suite.mixture.sources.items()}
    settings = {name: source_recipe(source) for name, source in suite.mixture.sources.items()}
    key = fingerprint([REVISION, read, settings, suite.mixture.split.model_dump(mode="json"), suite.split])[:32]
    folder = resources.storage.scratch() / "retrain" / "held_out" / key
    if not (folder / RECORDS).is_file():
        folder.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{key}-"))
        try:
            _copy(recipe, cache, draft)
            if not folder.exists():
                os.rename(draft, folder)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    with (folder / RECORDS).open("rb") as lines:
        records = sum(1 for _ in lines)
    if not records:
        raise ValueError(f"suite {suite.name!r} holds out no record, so nothing shows whether new data leak its test")
    return HeldOutRecords(source=JsonLines(path=str(folder), render="document"), records=records)


def _copy(recipe: Recipe, cache: Path, folder: Path) -> None:
    suite = recipe.final_suite
    with (folder / RECORDS).open("w", encoding="utf-8") as out:
        for name, source in suite.mixture.sources.items():
            folders = folders_of(source, cache=cache)
            raw = sources.raw_files(source, folders, cache=cache)
            known = Known.of(file.known for file in raw)
            for file in raw:
                whole = Span(name=file.name, path=file.path, digest=file.digest, start=0, stop=file.count, mark=0)
                for number, part, record in numbered(source, folders, whole, known=known):
                    if isinstance(record, Record) and split_of(record.object, suite.mixture.split) == suite.split:
                        stem = f"{name}-{fingerprint([file.name, number, part])[:16]}"
                        out.write(json.dumps(_line(record, folder, stem, id_=f"{name}/{record.id}")) + "\n")


def _line(record: Record, folder: Path, stem: str, *, id_: str) -> dict[str, Any]:
    """A record in our own layout, its images written beside it."""
    turns, images = [], 0
    for turn in record.turns:
        parts: list[dict[str, str]] = []
        for part in turn.parts:
            if isinstance(part, Image):
                name = f"{stem}-{images}.image"
                (folder / name).write_bytes(part.data)
                parts.append({"image": name})
                images += 1
            else:
                parts.append({"text": part})
        turns.append({"role": turn.role, "parts": parts})
    facts = {"object": record.object, "category": record.category, "licence": record.licence}
    return {"id": id_, **facts, "provenance": record.provenance, "turns": turns}
