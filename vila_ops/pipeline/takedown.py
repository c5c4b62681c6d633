"""A new revision of a mixture without what was taken down, of which no byte is in its shards."""

import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow.compute as pc
import pyarrow.parquet as pq

from vila_ops.artifacts import store
from vila_ops.artifacts.kinds import Dataset
from vila_ops.config import Config, Mixture, Run, quarantine
from vila_ops.config.mixture import ALL
from vila_ops.data.shards import DROPPED, INDEX
from vila_ops.errors import did_you_mean
from vila_ops.pipeline.stages import mixture_named, prepare_named


class TakedownRequest(Config):
    """What is to be taken down."""

    ids: tuple[str, ...] = ()
    """Ids of records, of whichever source."""
    sources: tuple[str, ...] = ()
    licences: tuple[str, ...] = ()


class Takedown(Config):
    """A new revision of a mixture, without what was taken down."""

    before: Dataset
    data: Dataset
    removed: dict[str, tuple[str, ...]]
    """By source, as in the mixture's `removed`."""
    files: tuple[str, ...]
    """Config files that were written or changed; empty if all of it was removed before."""


def take_down(recipe: Path, mixture: str, asked: TakedownRequest, *, load: Callable[[], Run]) -> Takedown:
    """Add what is asked to the `removed` of a mixture, and prepare it again.

    `load` reads the run of the recipe file again. If anything fails, the config files are restored. Raises ValueError
    for an id, a source or a licence that the mixture does not have.
    """
    run = load()
    before, chosen = prepare_named(run, mixture), mixture_named(run.recipe, mixture)[0]
    removed = _removals(before, chosen, asked)
    if all(set(removals) <= set(chosen.removed.get(name, ())) for name, removals in removed.items()):
        return Takedown(before=before, data=before, removed=removed, files=())
    edits = quarantine.add(recipe, mixture, removed, setting="removed")
    try:
        now = load()
        left = mixture_named(now.recipe, mixture)[0]
        if missing := [name for name, all_of in removed.items() if not _has(left, name, all_of)]:
            raise ValueError(
                f"mixture {mixture!r} sets its own `removed`, which overrides {next(iter(edits))} for {missing}; move "
                f"it into that file"
            )
        data = prepare_named(now, mixture)
    except BaseException:
        quarantine.restore(edits)
        raise
    return Takedown(before=before, data=data, removed=removed, files=tuple(os.path.relpath(path) for path in edits))


def _has(mixture: Mixture, source: str, removals: Sequence[str]) -> bool:
    return source not in mixture.sources if ALL in removals else set(removals) <= set(mixture.removed.get(source, ()))


def _removals(data: Dataset, mixture: Mixture, asked: TakedownRequest) -> dict[str, tuple[str, ...]]:
    """What is asked, by source."""
    removals: dict[str, list[str]] = defaultdict(list)
    for source in asked.sources:
        if source not in mixture.sources:
            known = list(mixture.sources)
            raise ValueError(
                f"mixture {mixture.name!r} has no source {source!r}; it has {known}{did_you_mean(source, known)}"
            )
        removals[source].append(ALL)
    columns = {"id": asked.ids, "licence": asked.licences}
    for column, wanted in columns.items():
        for one in wanted:
            already = [name for name, removed in mixture.removed.items() if f"{column}={one}" in removed]
            holding = _sources_of(data, column, one) or already
            if not holding:
                raise ValueError(
                    f"mixture {mixture.name!r} has no record of {column} {one!r}; ids and licences are in {INDEX} of "
                    f"{data.uri}"
                )
            for source in holding:
                removals[source].append(f"{column}={one}")
    if not removals:
        raise ValueError("say what to remove: --id, --source or --licence")
    return {source: (ALL,) if ALL in own else tuple(dict.fromkeys(own)) for source, own in removals.items()}


def _sources_of(data: Dataset, column: str, value: str) -> list[str]:
    """The sources with such a record, also one that a rule dropped, whose reason may pass."""
    names: set[str] = set()
    for file in (INDEX, DROPPED) if column == "id" else (INDEX,):
        table = pq.read_table(store.file(data, file), columns=["source"], filters=pc.field(column) == value)
        names |= set(table["source"].unique().to_pylist())
    return sorted(names)
