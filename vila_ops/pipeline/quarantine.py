"""A new revision of a mixture without some records: they go into its quarantine file, and it is prepared again."""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from vila_ops.artifacts.kinds import Dataset
from vila_ops.config import Config, Run, quarantine
from vila_ops.data.shards import INDEX, find_rows
from vila_ops.pipeline.stages import mixture_named, prepare_named


class LeftOut(Config):
    """A new revision of a mixture, without some records."""

    before: Dataset
    data: Dataset
    files: tuple[str, ...]
    """Of the config, that were written or got a line."""


def leave_out(
    recipe: Path, mixture: str, records: Mapping[str, Sequence[str]], *, keys: Sequence[str], load: Callable[[], Run]
) -> LeftOut:
    """Put records, by source, and those of samples, by key, into the quarantine of a mixture, and prepare it anew.

    `load` reads the run, whose recipe is the file. Where anything fails, the files of the config are as they were.
    """
    before = prepare_named(load(), mixture)
    wanted = {name: list(ids) for name, ids in records.items()}
    found = {row["key"]: row for row in find_rows(before, keys)}
    if unknown := [key for key in keys if key not in found]:
        raise ValueError(
            f"mixture {mixture!r} has no samples {unknown}: data {before.digest[:12]} in {before.uri}; "
            f"keys stand in {INDEX} of a dataset, and are of one revision's shards"
        )
    for row in found.values():
        wanted.setdefault(row["source"], []).append(row["id"])
    changed = quarantine.add(recipe, mixture, wanted)
    try:
        run = load()
        has = mixture_named(run.recipe, mixture)[0].quarantine
        if missing := {name: ids for name, ids in wanted.items() if not set(ids) <= set(has.get(name, ()))}:
            raise ValueError(
                f"mixture {mixture!r} has a quarantine of its own, which overrides the file that would name {missing}; "
                f"write them into it, or move it into {next(iter(changed))}"
            )
        data = prepare_named(run, mixture)
    except BaseException:
        quarantine.restore(changed)
        raise
    return LeftOut(before=before, data=data, files=tuple(os.path.relpath(path) for path in changed))
