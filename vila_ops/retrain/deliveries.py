"""Deliveries of new data under watched places, and the mixtures in which they are cleaned and trained on.

Each delivery is a source of its own, zz.WATCH.DELIVERY: sources are read in the order of their names, and a near
duplicate is the later record, so that deliveries never push out older data.
"""

import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pyarrow.compute as pc
import pyarrow.parquet as pq

from vila_ops.artifacts.kinds import Dataset
from vila_ops.artifacts.store import backend, file, root_of
from vila_ops.config import Config, Mixture, Recipe, Source
from vila_ops.config.mixture import ByRepeats, ByWeight, Contamination
from vila_ops.config.retrain import Quality, RetrainPolicy
from vila_ops.data import sources
from vila_ops.data.loading.mixture import Size, compose
from vila_ops.data.preprocess.identity import PLACES
from vila_ops.data.preprocess.summary import SUMMARY
from vila_ops.data.shards import DROPPED, index_of

PREFIX = "zz."
"""How the names of deliveries begin as sources, after the names of other sources."""
HELD_OUT = "held_out_objects"
"""The name of the final suite's records among the evaluation sets of a mixture."""
NAME = re.compile(r"[A-Za-z0-9_.-]+")
Status = Literal["new", "trained on", "set aside", "refused"]


class Delivery(Config):
    """A folder of new data."""

    name: str
    """As a source: zz.WATCH.FOLDER."""
    source: Source
    digest: str
    """Digest of its files; empty for one that cannot be read."""
    problem: str = ""
    """Why it cannot be read."""


class DeliveryCounts(Config):
    """What is left of a delivery after cleaning, and whether it is used."""

    name: str
    digest: str
    status: Status
    reason: str = ""
    """Why it is refused or set aside."""
    records: int = 0
    bad: int = 0
    duplicates: int = 0
    leaking: int = 0
    other_left_out: int = 0
    train_samples: int = 0


class Files(NamedTuple):
    """The files of a delivery."""

    num_files: int
    num_bytes: int
    arrived: float
    """Time at which the last one arrived or changed, in seconds since 1970."""


def settled(source: Source, policy: RetrainPolicy, *, now: float) -> dict[str, Files]:
    """The deliveries of a watched source in which nothing has changed for `settle_minutes`, by folder.

    `now` is in seconds since 1970, by the clock of the files. Raises ValueError for a folder that is not there.
    """
    place = root_of(str(source.path))  # type: ignore[union-attr]  # checked by the policy
    if "://" not in place and not Path(place).is_dir():
        raise ValueError(f"no such folder to watch: {place}; make it, or correct the path in the policy")
    folders: dict[str, Files] = {}
    for entry in backend(place).entries(place):
        folder, _, below = entry.name.partition("/")
        if below and not folder.startswith("."):
            count, num_bytes, arrived = folders.get(folder, Files(0, 0, 0.0))
            folders[folder] = Files(count + 1, num_bytes + entry.size, max(arrived, entry.arrived))
    old = now - 60 * policy.settle_minutes
    return {folder: files for folder, files in sorted(folders.items()) if files.arrived <= old}


def listed(policy: RetrainPolicy, *, cache: Path, now: float) -> list[Delivery]:
    """The deliveries that have settled, by name, as `settled`."""
    return [
        _delivery(f"{PREFIX}{watch}.{folder}", of_folder(source, folder), cache)
        for watch, source in sorted(policy.watch.items())
        for folder in settled(source, policy, now=now)
    ]


def of_folder(source: Source, folder: str) -> Source:
    """The source of one delivery of a watched source."""
    places = {key: f"{place}/{folder}" for key in PLACES if (place := getattr(source, key, None)) is not None}
    return source.with_changes(places)


def _delivery(name: str, source: Source, cache: Path) -> Delivery:
    if not NAME.fullmatch(name):
        problem = "its name has other characters than letters, digits, '_', '.' and '-'; rename it"
        return Delivery(name=name, source=source, digest="", problem=problem)
    try:
        digest, missing = sources.digest_and_missing(source, cache=cache)
        records = sum(file.count for file in sources.raw_files(source, {}, cache=cache))
    except (ValueError, OSError) as error:  # of a format or a disk: the others are still good
        told = str(error).replace(str(source.path), name)  # type: ignore[union-attr]  # nothing sealed names a place
        return Delivery(name=name, source=source, digest="", problem=told)
    return Delivery(name=name, source=source, digest=digest, problem=missing or ("" if records else "no records"))


def plain(recipe: Recipe, policy: RetrainPolicy, deliveries: Sequence[Delivery]) -> Mixture:
    """The stage's data and all readable deliveries, by the rules of the stage's mixture alone.

    Raises ValueError for a source whose name comes after those of deliveries.
    """
    base = recipe.stages[policy.stage].mixture
    if late := [name for name in base.sources if name >= PREFIX]:
        raise ValueError(
            f"source {late[0]!r} of mixture {base.name!r} has a name after {PREFIX!r}, so deliveries would push its "
            f"records out as duplicates; rename it"
        )
    unweighted = {name: one.with_changes({"weight": None, "repeats": None}) for name, one in base.sources.items()}
    added = {one.name: one.source for one in deliveries if not one.problem}
    changes = {"name": f"{base.name}.plain", "sources": {**unweighted, **added}, "blend": ByWeight()}
    return base.with_changes({**changes, "max_bad_share": 1.0})


def candidates(mixture: Mixture, policy: RetrainPolicy, held_out: Source) -> Mixture:
    """The plain mixture without near duplicates and without what overlaps with held-out records.

    It says what is new in a delivery. Nothing is trained on it, since the rules also take out of the older data.
    """
    own = mixture.contamination.sources if mixture.contamination else {}
    rules = mixture.contamination or Contamination(sources={HELD_OUT: held_out})
    return mixture.with_changes(
        {
            "name": f"{mixture.name.removesuffix('.plain')}.candidates",
            "near_duplicates": policy.near_duplicates,
            "contamination": rules.with_changes({"sources": {**own, HELD_OUT: held_out}}),
        }
    )


def unread(delivery: Delivery, aside: set[str]) -> DeliveryCounts:
    """A delivery that is not cleaned: it cannot be read, or a gate or a canary refused a model of it. Pure.

    `aside` has the digests of the latter.
    """
    name, digest = delivery.name, delivery.digest
    if digest in aside:
        reason = "a model trained on it was refused; remove it, deliver it corrected, or change how the policy trains"
        return DeliveryCounts(name=name, digest=digest, status="set aside", reason=reason)
    return DeliveryCounts(name=name, digest=digest, status="refused", reason=f"broken: {delivery.problem}")


def counts_of(
    delivery: Delivery, summary: Mapping[str, Any], quality: Quality, *, trained: Mapping[str, str]
) -> DeliveryCounts:
    """What the candidates' summary says of a delivery. `trained` has the digests of the champion's by name. Pure."""
    name, digest = delivery.name, delivery.digest
    counts = summary["sources"][name]
    out: Mapping[str, int] = counts["taken_out"]
    duplicates = sum(count for reason, count in out.items() if reason.startswith("duplicate"))
    leaking = sum(count for reason, count in out.items() if reason.startswith("contaminated"))
    made = DeliveryCounts(
        name=name,
        digest=digest,
        status="new",
        records=counts["records"],
        bad=sum(counts["bad"].values()),
        duplicates=duplicates,
        leaking=leaking,
        other_left_out=sum(out.values()) - duplicates - leaking,
        train_samples=counts["samples"].get("train", 0),
    )
    if trained.get(name) == digest:
        return made.with_changes({"status": "trained on"})
    if reason := refusal(made, quality):
        return made.with_changes({"status": "refused", "reason": reason})
    return made


def refusal(counts: DeliveryCounts, quality: Quality) -> str:
    """Why a delivery is refused as a whole; empty if it is not. Pure."""
    shares = (
        ("broken", "cannot be read", counts.bad, quality.max_bad_share, "max_bad_share"),
        ("leaking", "overlap with held-out objects", counts.leaking, quality.max_leaking_share, "max_leaking_share"),
        ("duplicated", "repeat earlier ones", counts.duplicates, quality.max_duplicate_share, "max_duplicate_share"),
    )
    for word, what, count, most, rule in shares:
        if count > most * counts.records:
            return f"{word}: {count} of {counts.records} records {what}, more than quality.{rule} {most:g}"
    return "" if counts.train_samples else "empty: nothing is left to train on after cleaning"


class Prepared(Config):
    """The plain mixture as it was prepared."""

    summary: dict[str, Any]
    taken_out: dict[str, tuple[str, ...]]
    """By source, the ids of the records that have samples here, and which the candidates leave out."""


def training_mixture(
    base: Mixture, policy: RetrainPolicy, mixture: Mixture, judged: Sequence[DeliveryCounts], data: Prepared
) -> Mixture:
    """What a retraining reads: `replay` of an epoch is what the champion was trained on, the rest new deliveries.

    Within the former, the sources of the stage's mixture `base` keep their proportions, and deliveries count by their
    size. What repeats or leaks in deliveries is in quarantine; the older data stays as it was. `mixture` is the plain
    one of the deliveries that are used.
    """
    status = {one.name: one.status for one in judged}
    used = mixture.sources
    unit = "samples" if isinstance(base.blend, ByRepeats) else base.blend.unit
    sizes = {name: _size(data.summary, name) for name in used}
    shares = compose(base, {name: sizes[name] for name in base.sources}).shares
    whole = sum(getattr(sizes[name], unit) for name in base.sources)
    mass = {name: float(getattr(size, unit)) for name, size in sizes.items()}
    mass |= {name: whole * (one.token_share if unit == "tokens" else one.sample_share) for name, one in shares.items()}
    weights: dict[str, float] = {}
    for share, is_new in ((policy.replay, False), (1 - policy.replay, True)):
        group = [name for name in used if (status.get(name) == "new") is is_new]
        weights |= {name: share * mass[name] / sum(mass[one] for one in group) for name in group}
    out = {name: ids for name, ids in data.taken_out.items() if name in status and name in used}
    return mixture.with_changes(
        {
            "name": f"{base.name}.retrain",
            "sources": {name: one.with_changes({"weight": weights[name]}) for name, one in used.items()},
            "blend": ByWeight(unit=unit),
            "quarantine": {**base.quarantine, **out},
            "max_bad_share": max(base.max_bad_share, policy.quality.max_bad_share),
        }
    )


def prepared(plain_data: Dataset, clean_data: Dataset) -> Prepared:
    """Read the plain mixture, and which of its records the candidates leave out."""
    reason = pc.field("reason")
    rules = pc.starts_with(reason, "duplicate") | pc.starts_with(reason, "contaminated")
    dropped = pq.read_table(file(clean_data, DROPPED), columns=["source", "id"], filters=rules)
    there = {(row["source"], row["id"]) for row in index_of(plain_data).select(["source", "id"]).to_pylist()}
    ids: dict[str, set[str]] = defaultdict(set)
    for row in dropped.to_pylist():
        if (row["source"], row["id"]) in there:
            ids[row["source"]].add(row["id"])
    summary = json.loads(file(plain_data, SUMMARY).read_text())
    return Prepared(summary=summary, taken_out={name: tuple(sorted(of)) for name, of in sorted(ids.items())})


def _size(summary: Mapping[str, Any], name: str) -> Size:
    counts = summary["sources"][name]
    return Size(samples=counts["samples"].get("train", 0), tokens=counts["tokens"].get("train", 0))
