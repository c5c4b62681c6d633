"""The work of `prepare`: units of source keys become shards, in a loop or as Ray Data tasks."""

from collections import Counter
from functools import lru_cache
from pathlib import Path
from typing import Any

from vila_ops.cluster import connect, whoami
from vila_ops.config import Config, Mixture, Resources, Source, Split, TextFormat
from vila_ops.data import sources
from vila_ops.data.conversation import Tokenizer, tokenise
from vila_ops.data.images import BadImage, square
from vila_ops.data.questions import Names, questions
from vila_ops.data.records import Dropped, Image, Record
from vila_ops.data.shards import Sample, ShardWriter, write_index
from vila_ops.data.split import split_of
from vila_ops.packages.fetch import fetch
from vila_ops.packages.resolve import tokenizer_folder
from vila_ops.packages.tokenizer import build_tokenizer


class Unit(Config):
    """One shard's worth of work: some keys of one source."""

    source: str
    shard: str
    keys: tuple[str, ...]


class Job(Config):
    """What every unit needs to know; small enough to travel to any worker."""

    mixture: Mixture
    text: TextFormat
    cache: str
    folder: str


def build(
    mixture: Mixture, text: TextFormat, resources: Resources, *, folder: Path
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Write shards and index into `folder`; returns the summary, and what each worker said of itself."""
    cache = Path(resources.cache).expanduser()
    tokenizer_folder(text.language_model, cache=cache)  # once, before the workers would race for it
    job = Job(mixture=mixture, text=text, cache=str(cache), folder=str(folder.resolve()))
    units = _units(mixture, cache=cache)
    done = _run_on_ray(job, units, resources) if resources.launch == "ray" else [write_shard(job, u) for u in units]
    done.sort(key=lambda result: result["shard"])
    rows = [row for result in done for row in result["rows"]]
    summary = _summary(mixture, done, rows)
    _refuse_bad_sources(mixture, summary)
    if not rows:
        raise ValueError(f"mixture {mixture.name!r} has no samples at all")
    write_index(rows, folder)
    return summary, [dict(ran) for ran in {tuple(sorted(result["ran"].items())) for result in done}]


def write_shard(job: Job, unit: Unit) -> dict[str, Any]:
    """Read, render, tokenise and write one unit; returns index rows, licences, drops by reason and who did it."""
    source = job.mixture.sources[unit.source]
    folders = _folders(source, cache=Path(job.cache))
    tokenizer = _tokenizer(job.text, Path(job.cache))
    asks = source.render == "questions"
    names = _names(source, job.mixture.split, Path(job.cache), attempt=job.folder) if asks else {}
    writer = ShardWriter(Path(job.folder) / unit.shard)
    drops: Counter[str] = Counter()
    licences: Counter[str] = Counter()
    seen = 0
    for key in unit.keys:
        for record in sources.read(source, folders, key):
            seen += 1
            if isinstance(record, Dropped):
                drops[record.reason] += 1
                continue
            split = split_of(record.object, job.mixture.split)
            reasons: set[str] = set()  # a record counts once, however many samples it is rendered to
            for rendered in _render(record, source, names.get(split), seed=job.mixture.seed):
                made = _samples(rendered, job, unit, tokenizer, first=len(writer.rows))
                if isinstance(made, Dropped):
                    reasons.add(made.reason)
                    continue
                for sample in made:
                    writer.add(sample, split=split)
                    licences[sample.licence] += 1
            drops.update(reasons)
    rows = writer.close()
    found = {"source": unit.source, "shard": unit.shard, "rows": rows, "seen": seen}
    return {**found, "licences": dict(licences), "drops": dict(drops), "ran": whoami()}


def _units(mixture: Mixture, *, cache: Path) -> list[Unit]:
    units: list[Unit] = []
    for name, source in mixture.sources.items():
        keys = sources.keys(source, _folders(source, cache=cache))
        if not keys:
            raise ValueError(f"mixture {mixture.name!r}: source {name!r} has no records")
        for number, start in enumerate(range(0, len(keys), mixture.shard_records)):
            chunk = tuple(keys[start : start + mixture.shard_records])
            units.append(Unit(source=name, shard=f"{name}-{number:05d}.tar", keys=chunk))
    return units


def _run_on_ray(job: Job, units: list[Unit], resources: Resources) -> list[dict[str, Any]]:
    import ray.data

    connect(resources)
    items = [{"job": job.model_dump_json(), "unit": unit.model_dump_json()} for unit in units]
    pool = ray.data.TaskPoolStrategy(size=resources.prepare_workers)
    shards = ray.data.from_items(items, override_num_blocks=len(items)).map(_ray_shard, compute=pool)
    return [row["result"] for row in shards.iter_rows()]


def _ray_shard(row: dict[str, Any]) -> dict[str, Any]:
    result = write_shard(Job.model_validate_json(row["job"]), Unit.model_validate_json(row["unit"]))
    return {"result": result}


def _render(record: Record, source: Source, names: Names | None, *, seed: int) -> list[Record]:
    if source.render != "questions":
        return [record]
    if names is None:
        raise ValueError(f"record {record.id!r}: no names on its side of the split")
    return questions(record, names, seed=seed)


def _samples(record: Record, job: Job, unit: Unit, tokenizer: Tokenizer, *, first: int) -> list[Sample] | Dropped:
    parts = [part for turn in record.turns for part in turn.parts]
    try:
        squares = [square(part.data, size=job.text.image_size) for part in parts if isinstance(part, Image)]
    except BadImage:
        return Dropped(record.id, "unreadable_image")
    split_long = job.mixture.long_documents == "split"
    pieces = tokenise(record, tokenizer, max_tokens=job.text.max_tokens, split=split_long)
    if isinstance(pieces, Dropped):
        return pieces
    text = "\n".join(part for part in parts if isinstance(part, str))
    stem = unit.shard.removesuffix(".tar")
    return [
        Sample(
            key=f"{stem}-{first + number:06d}",
            source=unit.source,
            object=record.object,
            category=record.category,
            text=text,
            licence=record.licence,
            provenance=record.provenance,
            input_ids=piece.input_ids,
            is_target=piece.is_target,
            images=tuple(squares[index] for index in piece.images),
        )
        for number, piece in enumerate(pieces)
    ]


def _folders(source: Source, *, cache: Path) -> dict[str, Path]:
    return {package.name: fetch(package, cache=cache) for package in sources.packages(source)}


@lru_cache(maxsize=4)
def _tokenizer(text: TextFormat, cache: Path) -> Tokenizer:
    fast = build_tokenizer(text.language_model, chat_template=text.chat_template, cache=cache)
    return Tokenizer(fast, image_tokens=text.image_tokens)


@lru_cache(maxsize=4)
def _names(source: Source, split: Split, cache: Path, *, attempt: str) -> dict[str, Names]:
    """Names by split and category of a whole source, read once per process and attempt: files may change between."""
    folders = _folders(source, cache=cache)
    found: dict[str, dict[str, list[str]]] = {}
    for key in sources.keys(source, folders):
        for record in sources.read(source, folders, key):
            if isinstance(record, Record):
                side = found.setdefault(split_of(record.object, split), {})
                side.setdefault(record.category, []).append(record.object)
    return {
        name: Names({category: tuple(sorted(set(names))) for category, names in sorted(side.items())})
        for name, side in found.items()
    }


def _summary(mixture: Mixture, done: list[dict[str, Any]], rows: list[dict[str, Any]]) -> dict[str, Any]:
    per_source: dict[str, Any] = {}
    for name, source in mixture.sources.items():
        results = [result for result in done if result["source"] == name]
        own = [row for row in rows if row["source"] == name]
        per_source[name] = {
            "weight": source.weight,
            "records_seen": sum(result["seen"] for result in results),
            "samples": dict(sorted(Counter(row["split"] for row in own).items())),
            "tokens": sum(row["num_tokens"] for row in own),
            "images": sum(row["num_images"] for row in own),
            "dropped": _total(results, "drops"),
            "licences": _total(results, "licences"),
            "packages": {f"{p.registry}:{p.name}@{p.version}": p.licence for p in sources.packages(source)},
        }
    return {
        "mixture": mixture.name,
        "num_samples": len(rows),
        "num_tokens": sum(row["num_tokens"] for row in rows),
        "num_images": sum(row["num_images"] for row in rows),
        "sources": per_source,
    }


def _total(results: list[dict[str, Any]], counted: str) -> dict[str, int]:
    """The counts of all units, added up."""
    return dict(sorted(sum((Counter(result[counted]) for result in results), Counter[str]()).items()))


def _refuse_bad_sources(mixture: Mixture, summary: dict[str, Any]) -> None:
    for name, source in summary["sources"].items():
        bad = sum(source["dropped"].values())
        if bad > mixture.max_bad_share * source["records_seen"]:
            raise ValueError(
                f"mixture {mixture.name!r}: source {name!r} dropped {bad} of {source['records_seen']} records "
                f"({source['dropped']}), more than max_bad_share {mixture.max_bad_share}; mend the source or raise it"
            )
