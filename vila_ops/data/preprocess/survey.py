"""The pass over all records, before shards are written, that top share, contamination and near duplicates need."""

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vila_ops.artifacts import attempts, store
from vila_ops.artifacts.execution import execution
from vila_ops.artifacts.kinds import Survey
from vila_ops.artifacts.store import Address
from vila_ops.cluster import whoami
from vila_ops.config import Config, Resources, Source
from vila_ops.config.clean import TopShare
from vila_ops.data.decontamination.contamination import known_ngrams
from vila_ops.data.dedup.signatures import Signature, SignatureRules, ranking_signature, signature, table
from vila_ops.data.preprocess.decide import decide
from vila_ops.data.preprocess.identity import SURVEY_REVISION, source_recipe
from vila_ops.data.preprocess.parallel import each, files
from vila_ops.data.preprocess.shard_writer import (
    Drop,
    ShardJob,
    folders_of,
    is_removed,
    known_of,
    load_array,
    numbered,
    seal_array,
)
from vila_ops.data.preprocess.units import Unit, plan_units
from vila_ops.data.raw.files import RawFile
from vila_ops.data.records import Dropped
from vila_ops.progress import Progress

SIGNATURES, PLACES, NGRAMS = "signatures.parquet", "places.parquet", "ngrams"
PLACES_SCHEMA = pa.schema(
    [("span", pa.int32()), ("number", pa.int64()), ("part", pa.int32()), ("id", pa.string()), ("where", pa.string())]
)
EVALUATION_BYTES = 2**30
"""Size of the raw records of an evaluation set that one task surveys, as the size of their shards would be."""


class SurveyTask(Config):
    """A unit to be surveyed."""

    job: ShardJob
    unit: Unit
    source: Source
    ngrams: Survey | None = None
    """The n-grams of the evaluation sets, which are looked for in training records; None for an evaluation set."""
    removed: tuple[str, ...] = ()
    """What was taken down of the source."""


class Surveyed(NamedTuple):
    """What a survey says of the units of a mixture."""

    drops: Mapping[int, tuple[Drop, ...]]
    """The records to drop from each unit, by its number."""
    surveys: Sequence[Survey]
    """What it was decided on."""


def survey(job: ShardJob, units: list[Unit], against: Mapping[str, list[RawFile]], resources: Resources) -> Surveyed:
    """The records to drop from each unit. Records are read only if a rule needs it.

    `against` are the raw files of the evaluation sets, by name.
    """
    mixture = job.mixture
    shares = {name: source.clean.top_share for name, source in mixture.sources.items()}
    if not (mixture.near_duplicates or mixture.contamination or any(shares.values())):
        return Surveyed({}, ())
    surveys: list[Survey] = []
    evaluation, ngrams, twins = None, None, pa.table({name: [] for name in PLACES_SCHEMA.names}, PLACES_SCHEMA)
    if mixture.contamination:
        tasks = list(_evaluation(job, against))
        progress = Progress(f"{mixture.name}: evaluation sets", len(tasks), unit="survey")
        surveys = each(survey_unit, tasks, makes=Survey, resources=resources, told=progress.show)
        evaluation, twins, _ = _gather(surveys, tasks)
        ngrams = seal_array(Survey, known_ngrams(evaluation), NGRAMS, root=job.store)
        surveys.append(ngrams)
    whole = mixture.near_duplicates or mixture.contamination
    chosen = [number for number, unit in enumerate(units) if whole or shares[unit.source]]
    tasks = [_training(job, units[number], ngrams) for number in chosen]
    progress = Progress(mixture.name, len(tasks), unit="survey")
    own = each(survey_unit, tasks, makes=Survey, resources=resources, told=progress.show)
    signatures, places, numbers = _gather(own, tasks)
    drops = decide(
        signatures,
        shares=_shares(shares, numbers),
        evaluation=evaluation,
        contamination=mixture.contamination,
        duplicates=mixture.near_duplicates,
    )
    by_unit: dict[int, list[Drop]] = defaultdict(list)
    for number, drop in _placed(drops, places, twins):
        by_unit[chosen[number]].append(drop)
    return Surveyed({number: tuple(of_unit) for number, of_unit in by_unit.items()}, (*surveys, *own))


def survey_unit(task: SurveyTask) -> Survey:
    """The sealed signatures of a unit's records; computed only if they are missing."""
    at = _address(task)
    if done := store.find(Survey, at, store=task.job.store):
        return done
    started = time.monotonic()
    known = None if task.ngrams is None else load_array(task.ngrams, NGRAMS)
    mixture = task.job.mixture
    rules = SignatureRules(task.source.clean, mixture.near_duplicates, mixture.contamination, known, mixture.images)
    signatures: list[Signature] = []
    places: list[dict[str, object]] = []
    folders = folders_of(task.source, cache=Path(task.job.cache))
    for place, span in enumerate(task.unit.spans):
        for number, part, record in numbered(task.source, folders, span, known=known_of(task.job)):
            if isinstance(record, Dropped) and not record.scores:
                continue  # counted when its shard is written
            if is_removed(record, task.removed):
                continue  # what stays is no duplicate of what was taken down
            total = len(signatures)
            if isinstance(record, Dropped):
                where, own = record.where, ranking_signature(record, rules, number=total, file=place)
            else:
                where, own = record.provenance, signature(record, rules, number=total, file=place)
            places.append({"span": place, "number": number, "part": part, "id": record.id, "where": where})
            signatures.append(own)
    with attempts.attempt(at, store=task.job.store) as attempt:
        pq.write_table(table(signatures), attempt / SIGNATURES, compression="zstd")
        pq.write_table(pa.Table.from_pylist(places, schema=PLACES_SCHEMA), attempt / PLACES, compression="zstd")
    ran = execution(launch=whoami()["launch"], seconds=time.monotonic() - started, ran=[whoami()])
    return store.seal(Survey, at, attempt, facts={"num_records": len(signatures)}, execution=ran)


def _training(job: ShardJob, unit: Unit, ngrams: Survey | None) -> SurveyTask:
    source, removed = job.mixture.sources[unit.source], job.mixture.removed.get(unit.source, ())
    return SurveyTask(job=job, unit=unit, source=source, ngrams=ngrams, removed=removed)


def _address(task: SurveyTask) -> Address:
    mixture = task.job.mixture
    gate = mixture.contamination
    recipe: dict[str, Any] = {
        "source": source_recipe(task.source),
        "spans": [span.model_dump(mode="json", exclude={"path", "mark"}) for span in task.unit.spans],
        "near_duplicates": mixture.near_duplicates and mixture.near_duplicates.model_dump(mode="json"),
        "contamination": gate and gate.model_dump(mode="json", exclude={"sources"}),
        "against": task.ngrams and task.ngrams.digest,
        "images": mixture.images.model_dump(mode="json", include={"max_pixels", "max_side", "truncated"}),
    }
    if task.removed:
        recipe["removed"] = sorted(task.removed)
    parents = tuple(sorted({span.digest for span in task.unit.spans}))
    return store.address(Survey, revision=SURVEY_REVISION, recipe=recipe, parents=parents)


def _evaluation(job: ShardJob, against: Mapping[str, list[RawFile]]) -> Iterator[SurveyTask]:
    assert job.mixture.contamination
    for name, source in sorted(job.mixture.contamination.sources.items()):
        raw = against[name]
        if not sum(file.count for file in raw):
            raise ValueError(f"mixture {job.mixture.name!r}: evaluation set {name!r} has no records to compare with")
        for unit in plan_units(name, raw, shard_bytes=EVALUATION_BYTES, image_bytes=10**5, limit=source.limit):
            yield SurveyTask(job=job, unit=unit, source=source)


def _gather(surveys: list[Survey], tasks: list[SurveyTask]) -> tuple[pa.Table, pa.Table, dict[tuple[str, str], int]]:
    """All signatures, with consecutive numbers of records and files; the places of records; the numbers of files."""
    numbers: dict[tuple[str, str], int] = {}
    signatures, places = [], []
    first = 0
    parts = zip(files(surveys, SIGNATURES), files(surveys, PLACES), tasks, strict=True)
    for number, (signatures_of, places_of, task) in enumerate(parts):
        own = pq.read_table(signatures_of)
        of_spans = [numbers.setdefault((task.unit.source, span.name), len(numbers)) for span in task.unit.spans]
        file = np.asarray(of_spans, np.int64)[own["file"].to_numpy()]
        own = own.set_column(own.schema.get_field_index("file"), "file", pa.array(file))
        own = own.set_column(
            own.schema.get_field_index("record"), "record", pa.array(own["record"].to_numpy() + first, pa.int64())
        )
        signatures.append(own)
        where = pq.read_table(places_of)
        places.append(where.append_column("task", pa.array(np.full(len(where), number, np.int64))))
        first += len(own)
    return pa.concat_tables(signatures), pa.concat_tables(places), numbers


def _shares(shares: Mapping[str, TopShare | None], numbers: Mapping[tuple[str, str], int]) -> dict[int, TopShare]:
    return {number: rule for (source, _), number in numbers.items() if (rule := shares[source])}


def _placed(drops: pa.Table, places: pa.Table, against: pa.Table) -> Iterator[tuple[int, Drop]]:
    """Each drop with the number of its survey task; its detail names the record that it duplicates."""
    for row in drops.to_pylist():
        place = places.slice(row["record"], 1).to_pylist()[0]
        twins = against if row["reason"].startswith("contaminated") else places
        twin = None if row["twin"] is None else twins.slice(row["twin"], 1).to_pylist()[0]
        detail = f"as {twin['id']!r} ({twin['where']})" if twin else ""
        yield (
            place["task"],
            Drop(span=place["span"], number=place["number"], part=place["part"], reason=row["reason"], detail=detail),
        )
