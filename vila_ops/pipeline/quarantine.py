"""A new revision of a mixture without some records, which are added to its quarantine file."""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from vila_ops.artifacts.kinds import Dataset
from vila_ops.config import Config, Run, quarantine
from vila_ops.data.preprocess.quarantine import left_out
from vila_ops.data.shards import INDEX, find_rows
from vila_ops.pipeline.stages import mixture_named, prepare_named


class QuarantineResult(Config):
    """A new revision of a mixture, without some records."""

    before: Dataset
    data: Dataset
    already: dict[str, tuple[str, ...]]
    """By source, those of the records that were in quarantine before."""
    files: tuple[str, ...]
    """Config files that were written or changed."""


def leave_out(
    recipe: Path, mixture: str, records: Mapping[str, Sequence[str]], *, keys: Sequence[str], load: Callable[[], Run]
) -> QuarantineResult:
    """Add records to the quarantine of a mixture, and prepare it again.

    `records` are ids by source; `keys` are keys of samples, whose records are added too. `load` reads the run of the
    recipe file again. If anything fails, the config files are restored; after a kill the same call goes on.
    """
    run = load()
    before = prepare_named(run, mixture)
    known = mixture_named(run.recipe, mixture)[0].quarantine
    wanted = _records(before, mixture, records, keys)
    already = {name: tuple(one for one in ids if one in known.get(name, ())) for name, ids in wanted.items()}
    already = {name: ids for name, ids in already.items() if ids}
    if all(set(ids) <= set(known.get(name, ())) for name, ids in wanted.items()):
        return QuarantineResult(before=before, data=before, already=already, files=())
    edits = quarantine.add(recipe, mixture, wanted)
    try:
        data = _prepare_without(wanted, mixture, load(), edited=next(iter(edits)))
    except BaseException:
        quarantine.restore(edits)
        raise
    files = tuple(os.path.relpath(path) for path in edits)
    return QuarantineResult(before=before, data=data, already=already, files=files)


def _records(
    data: Dataset, mixture: str, records: Mapping[str, Sequence[str]], keys: Sequence[str]
) -> dict[str, list[str]]:
    """Ids of records by source, with those of the samples of some keys, which may have been left out before."""
    wanted = {name: list(ids) for name, ids in records.items()}
    of_key = {row["key"]: (row["source"], row["id"]) for row in find_rows(data, keys)}
    if keys:
        of_key |= {key: record for key, record in left_out(data).items() if key in keys}
    if unknown := [key for key in keys if key not in of_key]:
        raise ValueError(
            f"mixture {mixture!r} has no samples {unknown}: data {data.digest[:12]} in {data.uri}; the keys of a "
            f"dataset are in its {INDEX}, and change with its shards"
        )
    for source, one in of_key.values():
        wanted.setdefault(source, []).append(one)
    return wanted


def _prepare_without(wanted: Mapping[str, Sequence[str]], mixture: str, run: Run, *, edited: Path) -> Dataset:
    """The mixture of a run that was loaded again. Raises ValueError where it does not read the edited file."""
    has = mixture_named(run.recipe, mixture)[0].quarantine
    if missing := {name: ids for name, ids in wanted.items() if not set(ids) <= set(has.get(name, ()))}:
        raise ValueError(
            f"mixture {mixture!r} sets its own quarantine, which overrides the file that would name {missing}; "
            f"write them into it, or move it into {edited}"
        )
    return prepare_named(run, mixture)
