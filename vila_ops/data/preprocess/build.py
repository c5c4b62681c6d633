"""The work of `prepare`: units of raw records become sealed shards, in a loop or as Ray Data tasks, then a dataset."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from vila_ops.artifacts import store
from vila_ops.artifacts.kinds import RawScan, Shard, Survey
from vila_ops.artifacts.progress import Reporter
from vila_ops.config import Mixture, Resources, Source, TextFormat
from vila_ops.data import sources
from vila_ops.data.preprocess.card import CARD, card
from vila_ops.data.preprocess.parallel import at_once, each, files
from vila_ops.data.preprocess.quarantine import Quarantined
from vila_ops.data.preprocess.shard_writer import (
    COUNTS,
    KNOWN,
    ShardJob,
    UnitTask,
    folders_of,
    seal_array,
    shard_address,
    shard_name,
    write_shard,
)
from vila_ops.data.preprocess.summary import SUMMARY, summarise
from vila_ops.data.preprocess.survey import survey
from vila_ops.data.preprocess.units import Unit, plan_units, stored_image_bytes
from vila_ops.data.raw.files import RawFile
from vila_ops.data.raw.known import Known
from vila_ops.data.raw.objects import changed
from vila_ops.data.shards import DROPPED, DROPPED_SCHEMA, INDEX, SCHEMA, SHARD
from vila_ops.packages.resolve import tokenizer_folder
from vila_ops.progress import Progress


class Built(NamedTuple):
    """What the files of a dataset were made from."""

    summary: dict[str, Any]
    shards: dict[str, tuple[Shard, str]]
    """The sealed shard and its file, by the shard's name in the dataset."""
    surveys: Sequence[Survey]
    """What its rules over all records were decided on."""
    workers: list[dict[str, Any]]
    """The workers' descriptions of themselves."""


def build(
    mixture: Mixture,
    text: TextFormat,
    resources: Resources,
    *,
    folder: Path,
    digests: Mapping[str, str],
    reporter: Reporter,
) -> Built:
    """Write every shard that is not sealed yet, and write index, drops, summary and card of the dataset to `folder`.

    `digests` are those of the raw files by which the dataset is addressed (see `identity.raw_digests`). Raises
    RawChanged if a raw file has another content, when it is scanned again here or while it is read.

    After an interruption the next call continues with the units that are not sealed.
    """
    cache = resources.storage.cache_folder()
    tokenizer_folder(text.language_model, cache=cache)  # once, before the workers race to fetch it
    for source in mixture.sources.values():
        sources.check_images(source)
    raw = {name: _scanned(source, digests[name], cache=cache) for name, source in sorted(mixture.sources.items())}
    gate = mixture.contamination.sources if mixture.contamination else {}
    against = {name: _scanned(source, digests[f"against {name}"], cache=cache) for name, source in gate.items()}
    units = [unit for name, files_of in raw.items() for unit in _units(name, files_of, mixture, text)]
    seen = Known.of(file.known for files_of in (*raw.values(), *against.values()) for file in files_of).array
    root = resources.storage.store
    known = seal_array(RawScan, seen, KNOWN, root=root) if len(seen) else None
    job = ShardJob(mixture=mixture, text=text, cache=str(cache), store=root, known=known)
    drops, surveys = survey(job, units, against, resources)
    tasks = [UnitTask(job=job, unit=unit, drops=drops.get(number, ())) for number, unit in enumerate(units)]
    shards = _write(tasks, resources, reporter)
    named = {
        shard_name(task.unit.source, shard.uri.rpartition("/")[2]): (shard, SHARD)
        for task, shard in zip(tasks, shards, strict=True)
        if shard.num_samples
    }
    quarantined = Quarantined(mixture)
    counts = [json.loads(path.read_text()) for path in files(shards, COUNTS)]
    indexes = zip(tasks, files(shards, INDEX), counts, strict=True)
    kept = (quarantined.leave_out(task.unit.source, pq.read_table(path), counted) for task, path, counted in indexes)
    _concatenate(kept, folder / INDEX, schema=SCHEMA)
    dropped = (pq.read_table(path) for path in files(shards, DROPPED))
    _concatenate(chain(dropped, quarantined.dropped()), folder / DROPPED, schema=DROPPED_SCHEMA)
    counted = [(task.unit.source, one) for task, one in zip(tasks, counts, strict=True)]
    summary = summarise(mixture, counted)
    (folder / SUMMARY).write_text(json.dumps(summary, indent=1, sort_keys=True))
    if not summary["num_samples"]:
        raise ValueError(f"mixture {mixture.name!r} has no samples at all: {summary['sources']}")
    (folder / CARD).write_text(card(mixture, summary, folder), encoding="utf-8")
    workers = at_once(lambda shard: store.read_manifest(shard.uri)["execution"]["workers"], shards)
    ran = {json.dumps(one): one for of_shard in workers for one in of_shard}
    return Built(summary, named, surveys, list(ran.values()))


def _scanned(source: Source, digest: str, *, cache: Path) -> list[RawFile]:
    """The raw files of a source. Raises RawChanged if they do not have this digest any more."""
    raw = sources.raw_files(source, folders_of(source, cache=cache), cache=cache)
    if not source.packages() and sources.digest_of(raw) != digest:
        raise changed(f"a raw file of {getattr(source, 'path', source.kind)}")
    return raw


def _units(name: str, raw: list[RawFile], mixture: Mixture, text: TextFormat) -> Iterator[Unit]:
    source = mixture.sources[name]
    if not sum(file.count for file in raw):
        raise ValueError(f"mixture {mixture.name!r}: source {name!r} has no records")
    yield from plan_units(
        name,
        raw,
        shard_bytes=mixture.shard_bytes,
        image_bytes=stored_image_bytes(text.image_size, mixture.images.encoding),
        limit=source.limit,
        share=source.clean.top_share.share if source.clean.top_share else 1.0,
    )


def _write(tasks: list[UnitTask], resources: Resources, reporter: Reporter) -> list[Shard]:
    """The sealed shards, in order; only missing shards are written."""
    sealed = at_once(lambda task: store.find(Shard, shard_address(task), store=task.job.store), tasks)
    missing = [number for number, shard in enumerate(sealed) if shard is None]
    num_sealed = len(tasks) - len(missing)
    progress = Progress(tasks[0].job.mixture.name, len(tasks), unit="shard", done=num_sealed)
    reporter.begin(num_sealed, len(tasks))

    def told(done: int) -> None:
        reporter.advance(num_sealed + done)
        progress.show(num_sealed + done)

    unmade = [tasks[number] for number in missing]
    written = each(write_shard, unmade, makes=Shard, resources=resources, told=told)
    fresh = dict(zip(missing, written, strict=True))
    return [shard or fresh[number] for number, shard in enumerate(sealed)]


def _concatenate(parts: Iterable[pa.Table], target: Path, *, schema: pa.Schema) -> None:
    """One Parquet file of many tables of one schema, with a row group for each, so that only one is in memory."""
    with pq.ParquetWriter(target, schema, compression="zstd") as writer:
        for table in parts:
            if table.num_rows:
                writer.write_table(table)
