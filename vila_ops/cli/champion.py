"""`vila-ops champion`: the aliases of a registered model, their history, and the moves that a person makes."""

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated

import typer

from vila_ops.cli.options import INLINE, AsJson, ResourcesFile, print_result, say
from vila_ops.cli.tables import Row, table

if TYPE_CHECKING:
    from vila_ops.registry.aliases import Alias, AliasRecord


def champion(
    name: Annotated[str, typer.Argument(help="Name of a registered model, a gate's model_name")],
    back: Annotated[bool, typer.Option("--back", help="Make the previous champion the champion again")] = False,
    version: Annotated[
        int | None, typer.Option("--version", min=1, help="Make this version the champion, whatever the gate said")
    ] = None,
    remove: Annotated[bool, typer.Option("--remove", help="Have no champion, challenger and previous one")] = False,
    reason: Annotated[str, typer.Option("--reason", help="What the history says of the move")] = "",
    resources: ResourcesFile = INLINE,
    as_json: AsJson = False,
) -> None:
    """Print where the aliases of a model point and every move so far; or move the champion, back with --back."""
    from vila_ops.config import load_resources
    from vila_ops.registry import alias_register
    from vila_ops.registry.register import set_champion, shown_in_mlflow

    if [back, version is not None, remove].count(True) > 1:
        raise ValueError("give one of --back, --version and --remove; each is one move")
    loaded = load_resources(resources)
    store, asked = loaded.storage.store, f"`vila-ops champion`{f': {reason}' if reason else ''}"
    if version is not None:
        record = set_champion(name, version, loaded, reason=asked)
    elif back or remove:
        moves = alias_register.go_back if back else alias_register.remove
        record = moves(name, reason=asked, store=store)
        if loaded.tracking.uri is not None:
            record = shown_in_mlflow(name, loaded)
    else:
        record = alias_register.read(name, store=store)
    if as_json:
        print_result(record, as_json)
        return
    if not record.history:
        others = ", ".join(alias_register.names(store=store)) or "none"
        print(f"{name!r} has no champion in {store}, and had none; models with one: {others}", file=sys.stderr)
        return
    say("\n".join(_lines(record)))


def _lines(record: "AliasRecord") -> list[str]:
    """The aliases, and below them the moves, the newest first."""
    from vila_ops.registry.aliases import ALIASES

    now: list[Row] = [("alias", "version", "model", "stage")]
    for alias in ALIASES:
        version = record.version(alias)
        if version is not None:
            checkpoint = record.checkpoints[version]
            now.append((alias, str(version), checkpoint.digest[:12], checkpoint.stage))
    moves = [
        f"{move.number}  {move.when}  {_pointers(move.aliases)}\n    {move.reason}" for move in reversed(record.history)
    ]
    return [*table(now), "", *moves]


def _pointers(aliases: "Mapping[Alias, int]") -> str:
    return ", ".join(f"{alias} {version}" for alias, version in aliases.items()) or "no alias"
