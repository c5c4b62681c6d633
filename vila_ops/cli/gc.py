"""`vila-ops gc`: what killed processes left, listed and removed."""

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vila_ops.cli.options import INLINE, AsJson, ResourcesFile, print_result, say
from vila_ops.cli.tables import short

if TYPE_CHECKING:
    from vila_ops.leftovers import Leftover


def gc(
    resources: ResourcesFile = INLINE,
    delete: Annotated[bool, typer.Option("--delete", help="Remove what nothing needs; without it, only list")] = False,
    also: Annotated[
        list[str] | None, typer.Option("--also", help="A place of the list that is removed too, though it says kept")
    ] = None,
    older_than: Annotated[
        float, typer.Option("--older-than", min=1.0, help="Hours for which something must not have changed")
    ] = 24.0,
    keep: Annotated[
        list[Path] | None,
        typer.Option("--keep", help="List sealed artifacts too, without those that this recipe needs"),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List what killed processes left in store, cache and data folder, with size and age; remove it with --delete.

    Sealed artifacts are listed only with --keep, once for each recipe whose results stay. What a live lease holds, and
    what a running task may read, is never removed.
    """
    from vila_ops import leftovers
    from vila_ops.config import load, load_resources

    loaded = load_resources(resources)
    kept = [load(recipe, resources=resources) for recipe in keep or ()]
    listed = leftovers.find(loaded, grace_hours=older_than, keep=kept)
    if unknown := sorted(set(also or ()) - {one.place for one in listed}):
        raise ValueError(f"--also {unknown[0]} is not a place of the list; `vila-ops gc` without --also prints it")
    chosen = [one for one in listed if one.kept is None or one.place in (also or ())]
    if as_json:
        print_result(listed, as_json)
    else:
        for one in listed:
            say("\n".join(_lines(one)))
    if delete:
        for one in chosen:
            leftovers.remove(one, store=loaded.storage.store)
    size = short(sum(one.num_bytes for one in chosen))
    told = "removed" if delete else "would be removed with --delete"
    print(f"{len(chosen)} of {len(listed)}, {size}B: {told}", file=sys.stderr)


def _lines(one: "Leftover") -> list[str]:
    """Size, age and place of a leftover, and below them what it is and why it is kept."""
    hours = (time.time() - one.changed) / 3600
    age = f"{hours / 24:.0f} days" if hours >= 48 else f"{hours:.0f} hours"
    kept = [] if one.kept is None else [f"    kept: {one.kept}"]
    return [f"{short(one.num_bytes)}B  {age}  {one.place}", f"    {one.what}", *kept]
