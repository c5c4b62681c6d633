"""The work of one worker: read, render and tokenise a unit's records, resize their images, and seal a shard."""

import hashlib
import json
import time
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from vila_ops.artifacts import attempts, store
from vila_ops.artifacts.execution import execution
from vila_ops.artifacts.kinds import RawScan, Shard, Survey
from vila_ops.artifacts.store import Address
from vila_ops.cluster import whoami
from vila_ops.config import Config, Mixture, Source, Split, TextFormat, fingerprint
from vila_ops.config.images import ImageStorage
from vila_ops.data import sources
from vila_ops.data.containers import BadImage
from vila_ops.data.filtering.record_rules import filter_record
from vila_ops.data.images import square, suffix
from vila_ops.data.preprocess.identity import SHARD_REVISION, SURVEY_REVISION, fit_of, source_recipe, text_recipe
from vila_ops.data.preprocess.units import Unit
from vila_ops.data.raw.files import Span
from vila_ops.data.raw.known import NOTHING, Known
from vila_ops.data.records import CONTROL_TOKEN, TRUNCATED_IMAGE, Dropped, Image, Record
from vila_ops.data.shards import SHARD, Sample, ShardWriter, write_dropped, write_index
from vila_ops.data.split import split_of
from vila_ops.data.text.conversation import Tokenizer, Tokens, tokenise
from vila_ops.data.text.questions import ObjectNames, questions
from vila_ops.packages.fetch import fetch
from vila_ops.packages.tokenizer import build_tokenizer

COUNTS, KNOWN, REMOVED = "counts.json", "known", "removed"
Array = TypeVar("Array", Survey, RawScan)
EXAMPLES, EXAMPLE_CHARACTERS = 3, 300
"""Texts of a shard that a data card may show."""


class ShardJob(Config):
    """The settings that every unit needs; small enough to be sent to any worker."""

    mixture: Mixture
    text: TextFormat
    cache: str
    store: str
    known: RawScan | None = None
    """What the scan saw of the raw files; None before they were scanned."""


class Drop(Config):
    """A record that a rule over all records drops."""

    span: int
    """Index of the span in its unit."""
    number: int
    """Number of the raw record in its file."""
    part: int
    """Index among the records of the raw record."""
    reason: str
    detail: str


class UnitTask(Config):
    """A unit to write, and the records to drop from it."""

    job: ShardJob
    unit: Unit
    drops: tuple[Drop, ...] = ()


def shard_address(task: UnitTask) -> Address:
    """The address of a shard: content of raw files and settings, without paths and the other sources of the mixture."""
    job, mixture = task.job, task.job.mixture
    source = mixture.sources[task.unit.source]
    recipe = {
        "source": {"name": task.unit.source, **source_recipe(source)},
        "spans": [span.model_dump(mode="json", exclude={"path", "mark"}) for span in task.unit.spans],
        "drops": [drop.model_dump(mode="json") for drop in task.drops],
        "text": text_recipe(job.text),
        "mixture": mixture.model_dump(mode="json", include={"split", "long_documents", "images", "seed"}),
    }
    if removals := mixture.removed.get(task.unit.source):
        recipe["removed"] = sorted(removals)
    digests = {span.digest for span in task.unit.spans}
    if source.render == "questions":  # wrong answers are drawn from the object names of the whole source
        digests.add(sources.digest(source, cache=Path(job.cache)))
    return store.address(Shard, revision=SHARD_REVISION, recipe=recipe, parents=tuple(sorted(digests)))


def is_removed(record: Record | Dropped, removals: Collection[str]) -> bool:
    """Whether a record was taken down by one of the removals of its source."""
    licence = record.licence if isinstance(record, Record) else None
    return f"id={record.id}" in removals or f"licence={licence}" in removals


def shard_name(source: str, key: str) -> str:
    """SOURCE-STEM.tar, with the first digits of the shard's address: the same in every dataset that has the shard."""
    return f"{source}-{key[:12]}.tar"


def write_shard(task: UnitTask) -> Shard:
    """The sealed shard of a unit; written only if it is missing."""
    at = shard_address(task)
    if done := store.find(Shard, at, store=task.job.store):
        return done
    started = time.monotonic()
    with attempts.attempt(at, store=task.job.store) as attempt:
        counts = _Writer(task, attempt, name=shard_name(task.unit.source, at.key)).write()
        (attempt / COUNTS).write_text(json.dumps(counts, indent=1, sort_keys=True))
    facts = {"num_samples": sum(counts["samples"].values())}
    ran = execution(launch=whoami()["launch"], seconds=time.monotonic() - started, ran=[whoami()])
    return store.seal(Shard, at, attempt, facts=facts, execution=ran)


def folders_of(source: Source, *, cache: Path) -> dict[str, Path]:
    """The folders of a source's packages by package name; missing packages are fetched to the cache."""
    return {package.name: fetch(package, cache=cache) for package in source.packages()}


def tokenizer_of(text: TextFormat, *, cache: Path) -> Tokenizer:
    """The tokenizer of a text format, loaded once per process and content of its folder."""
    return _tokenizer(text, cache, content=fingerprint(text_recipe(text)))


@lru_cache(maxsize=4)
def _tokenizer(text: TextFormat, cache: Path, *, content: str) -> Tokenizer:
    fast = build_tokenizer(text.language_model, chat_template=text.chat_template, cache=cache)
    return Tokenizer(fast, image_tokens=text.image_tokens, after_image=text.after_image)


class _Writer:
    """Writes the files of one shard."""

    def __init__(self, task: UnitTask, folder: Path, *, name: str) -> None:
        job = self.job = task.job
        self.task, self.folder = task, folder
        self.source = job.mixture.sources[task.unit.source]
        self.tokenizer = tokenizer_of(job.text, cache=Path(job.cache))
        self.fit = fit_of(job.text)
        self.strict = job.mixture.images.with_changes({"truncated": "drop"})
        self.tar = ShardWriter(folder / SHARD, name=name, suffix=suffix(job.mixture.images.encoding))
        self.names: dict[str, ObjectNames] = {}
        if self.source.render == "questions":
            digest = sources.digest(self.source, cache=Path(self.job.cache))
            self.names = _names(self.source, job.mixture.split, Path(job.cache), digest=digest)
        self.examples: list[str] = []
        self.dropped: list[Dropped] = []
        self.bad: Counter[str] = Counter()
        self.taken_out: Counter[str] = Counter()
        self.images_out: Counter[str] = Counter()
        self.changed: Counter[str] = Counter()
        self.changes: set[str] = set()  # of the record at hand

    def write(self) -> dict[str, Any]:
        """Every record of the unit; returns the counts."""
        seen = 0
        removals = self.job.mixture.removed.get(self.task.unit.source, ())
        for record, drop in self._records():
            seen += 1
            if is_removed(record, removals):
                self._take_out(record, REMOVED, "")
            elif drop is not None:
                self._take_out(record, drop.reason, drop.detail)
            elif isinstance(record, Dropped) and record.is_bad:
                self._drop(record)
            elif isinstance(record, Dropped):
                self._take_out(record, record.reason, record.detail)
            else:
                self._filter(record)
        rows = self.tar.close()
        write_index(rows, self.folder)
        write_dropped(self.dropped, self.task.unit.source, self.folder)
        return {
            "records": seen,
            "samples": dict(Counter(row["split"] for row in rows)),
            "tokens": _sums(rows, "num_tokens"),
            "images": _sums(rows, "num_images"),
            "licences": dict(Counter(row["licence"] for row in rows)),
            "examples": self.examples,
            "bad": dict(self.bad),
            "taken_out": dict(self.taken_out),
            "images_out": dict(self.images_out),
            "changed": dict(self.changed),
        }

    def _records(self) -> Iterator[tuple[Record | Dropped, Drop | None]]:
        drops = {(drop.span, drop.number, drop.part): drop for drop in self.task.drops}
        folders = folders_of(self.source, cache=Path(self.job.cache))
        for place, span in enumerate(self.task.unit.spans):
            for number, part, record in numbered(self.source, folders, span, known=known_of(self.job)):
                yield record, drops.get((place, number, part))

    def _filter(self, record: Record) -> None:
        filtered = filter_record(record, self.source.clean)
        for image in filtered.dropped_images:
            self.images_out[image.reason] += 1
            self.dropped.append(image)
        if isinstance(filtered.record, Dropped):
            self._take_out(filtered.record, filtered.record.reason, filtered.record.detail)
        else:
            self._add(filtered.record)

    def _add(self, record: Record) -> None:
        """Write the samples of a record. If several renderings fail, it is dropped once, for the first reason."""
        split = split_of(record.object, self.job.mixture.split)
        failed: list[Dropped] = []
        self.changes = set(record.notes)
        for rendered in self._render(record, split):
            samples = self._samples(rendered)
            if isinstance(samples, Dropped):
                failed.append(samples)
                continue
            if self.tokenizer.spells_control(rendered):
                self.changes.add(CONTROL_TOKEN)
            for sample in samples:
                self.tar.add(sample, split=split)
                if split == "train" and len(self.examples) < EXAMPLES:
                    self.examples.append(sample.text[:EXAMPLE_CHARACTERS])
        if failed:
            self._drop(replace(failed[0], id=record.id, where=record.provenance))
        else:
            self.changed.update(self.changes)

    def _render(self, record: Record, split: str) -> list[Record]:
        if self.source.render != "questions":
            return [record]
        return questions(record, self.names[split], seed=self.job.mixture.seed)

    def _samples(self, record: Record) -> list[Sample] | Dropped:
        longest = self.job.text.max_tokens
        split_long = self.job.mixture.long_documents == "split"
        pieces = tokenise(record, self.tokenizer, max_tokens=longest, split=split_long)
        if isinstance(pieces, Dropped):
            return pieces
        images = [part for turn in record.turns for part in turn.parts if isinstance(part, Image)]
        kept = sorted({index for piece in pieces for index in piece.images})
        try:
            squares = {index: self._square(images[index].data) for index in kept}
        except BadImage as error:
            return Dropped(record.id, f"bad_image_{error.reason}", detail=str(error))
        text = "\n".join(part for turn in record.turns for part in turn.parts if isinstance(part, str))
        # each piece with its own text: the whole text in every piece would grow with the square of the document
        texts = [text] if len(pieces) == 1 else [self.tokenizer.decode(piece.input_ids) for piece in pieces]
        return [self._sample(record, own, piece, squares) for own, piece in zip(texts, pieces, strict=True)]

    def _square(self, data: bytes) -> bytes:
        images = self.job.mixture.images
        try:
            return self._squared(data, self.strict)
        except BadImage as error:
            if error.reason != "truncated" or images.truncated == "drop":
                raise
        self.changes.add(TRUNCATED_IMAGE)
        return self._squared(data, images)

    def _squared(self, data: bytes, images: ImageStorage) -> bytes:
        size = self.job.text.image_size
        return square(data, size=size, fit=self.fit, encoding=images.encoding, reading=images)

    def _sample(self, record: Record, text: str, piece: Tokens, squares: dict[int, bytes]) -> Sample:
        return Sample(
            id=record.id,
            source=self.task.unit.source,
            object=record.object,
            category=record.category,
            text=text,
            licence=record.licence,
            provenance=record.provenance,
            input_ids=piece.input_ids,
            is_target=piece.is_target,
            images=tuple(squares[index] for index in piece.images),
        )

    def _drop(self, dropped: Dropped) -> None:
        self.bad[dropped.reason] += 1
        self.dropped.append(dropped)

    def _take_out(self, record: Record | Dropped, reason: str, detail: str) -> None:
        self.taken_out[reason] += 1
        where = record.where if isinstance(record, Dropped) else record.provenance
        self.dropped.append(Dropped(record.id, reason, where=where, detail=detail))


def numbered(
    source: Source, folders: dict[str, Path], span: Span, *, known: Known
) -> Iterator[tuple[int, int, Record | Dropped]]:
    """(number of the raw record in its file, index of the record in it, record) for all records that a span takes.

    Raises RawChanged if a raw file is not the one that `known` saw.
    """
    taken = (number for number in range(span.start, span.stop) if span.takes(number))
    for number, records in zip(taken, sources.read(source, folders, span, known=known), strict=True):
        for part, record in enumerate(records):
            yield number, part, record


def seal_array(kind: type[Array], numbers: NDArray[np.uint64], name: str, *, root: str) -> Array:
    """Numbers that every worker needs, as an artifact of the store `root` with the file NAME.npy."""
    digest = hashlib.sha256(numbers.tobytes()).hexdigest()
    at = store.address(kind, revision=SURVEY_REVISION, recipe={name: digest}, parents=())
    if done := store.find(kind, at, store=root):
        return done
    with attempts.attempt(at, store=root) as attempt:
        np.save(attempt / f"{name}.npy", numbers, allow_pickle=False)
    ran = execution(launch="inline", seconds=0.0, ran=[])
    return store.seal(kind, at, attempt, facts={"num_records": len(numbers)}, execution=ran)


def load_array(sealed: Survey | RawScan, name: str) -> NDArray[np.uint64]:
    """The numbers that `seal_array` sealed."""
    return _load(str(store.file(sealed, f"{name}.npy")))


def known_of(job: ShardJob) -> Known:
    """What the scan saw of the raw files."""
    return NOTHING if job.known is None else Known(load_array(job.known, KNOWN))


@lru_cache(maxsize=2)
def _load(path: str) -> NDArray[np.uint64]:
    loaded: NDArray[np.uint64] = np.load(path, allow_pickle=False)
    return loaded


def _sums(rows: list[dict[str, Any]], column: str) -> dict[str, int]:
    """A column summed by split."""
    total: Counter[str] = Counter()
    for row in rows:
        total[row["split"]] += row[column]
    return dict(total)


@lru_cache(maxsize=4)
def _names(source: Source, split: Split, cache: Path, *, digest: str) -> dict[str, ObjectNames]:
    """Object names of a whole source by split and category, read once per process and content of the source."""
    folders = folders_of(source, cache=cache)
    by_split: dict[str, dict[str, list[str]]] = {}
    raw = sources.raw_files(source, folders, cache=cache)
    known = Known.of(file.known for file in raw)
    for file in raw:
        whole = Span(name=file.name, path=file.path, digest=file.digest, start=0, stop=file.count, mark=0)
        for _, _, record in numbered(source, folders, whole, known=known):
            if isinstance(record, Record):
                side = by_split.setdefault(split_of(record.object, split), {})
                side.setdefault(record.category, []).append(record.object)
    return {
        name: ObjectNames({category: tuple(sorted(set(names))) for category, names in sorted(side.items())})
        for name, side in by_split.items()
    }
