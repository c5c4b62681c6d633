"""A new revision of a mixture without some records, which are added to its quarantine file."""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from vila_ops.artifacts.kinds import Dataset
from vila_ops.config import Config, Run, quarantine
from vila_ops.data.shards import INDEX, find_rows
from vila_ops.pipeline.stages import mixture_named, prepare_named


class QuarantineResult(Config):
    """A new revision of a mixture, without some records."""

    before: Dataset
    data: Dataset
    files: tuple[str, ...]
    """Config files that were written or changed."""


def leave_out(
    recipe: Path, mixture: str, records: Mapping[str, Sequence[str]], *, keys: Sequence[str], load: Callable[[], Run]
) -> QuarantineResult:
    """Add records to the quarantine of a mixture, and prepare it again.

    `records` are ids by source; `keys` are keys of samples, whose records are added too. `load` reads the run of the
    recipe file again. If anything fails, the config files are restored.
    """
    before = prepare_named(load(), mixture)
    wanted = {name: list(ids) for name, ids in records.items()}
    rows = {row["key"]: row for row in find_rows(before, keys)}
    if unknown := [key for key in keys if key not in rows]:
        raise ValueError(
            f"mixture {mixture!r} has no samples {unknown}: data {before.digest[:12]} in {before.uri}; "
            f"the keys of a dataset are in its {INDEX}, and change with its shards"
        )
    for row in rows.values():
        wanted.setdefault(row["source"], []).append(row["id"])
    changed = quarantine.add(recipe, mixture, wanted)
    try:
        run = load()
        has = mixture_named(run.recipe, mixture)[0].quarantine
        if missing := {name: ids for name, ids in wanted.items() if not set(ids) <= set(has.get(name, ()))}:
            raise ValueError(
                f"mixture {mixture!r} sets its own quarantine, which overrides the file that would name {missing}; "
                f"write them into it, or move it into {next(iter(changed))}"
            )
        data = prepare_named(run, mixture)
    except BaseException:
        quarantine.restore(changed)
        raise
    return QuarantineResult(before=before, data=data, files=tuple(os.path.relpath(path) for path in changed))
