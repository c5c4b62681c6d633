"""`vila-ops backup` and `vila-ops restore`: store, MLflow and Prefect, copied while they are used and put back."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vila_ops.cli.options import INLINE, LOCAL, AsJson, ResourcesFile, print_result, say
from vila_ops.cli.servers import Servers
from vila_ops.cli.tables import short

if TYPE_CHECKING:
    from vila_ops.backup import BackupResult

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="Folder of the backups, on another disk")]


def backup(
    folder: Folder, resources: ResourcesFile = INLINE, servers: Servers = LOCAL, as_json: AsJson = False
) -> None:
    """Copy the store and the databases of MLflow and Prefect while they are used. A later backup adds what is new."""
    from vila_ops import backup as backups
    from vila_ops.config import load_resources
    from vila_ops.config.local import load_local

    made = backups.backup(load_resources(resources), load_local(servers), folder)
    _tell(made, "not in this backup: ", as_json=as_json)


def restore(
    folder: Folder,
    at: Annotated[str | None, typer.Option("--at", help="Name of a snapshot; default: the newest")] = None,
    resources: ResourcesFile = INLINE,
    servers: Servers = LOCAL,
    as_json: AsJson = False,
) -> None:
    """Put a backup back, into an empty store and where there are no databases. Every byte is compared first."""
    from vila_ops import backup as backups
    from vila_ops.config import load_resources
    from vila_ops.config.local import load_local

    made = backups.restore(folder, load_resources(resources), load_local(servers), at=at)
    _tell(made, "not in the backup, so the next run makes it again: ", as_json=as_json)


def _tell(made: "BackupResult", lacks: str, *, as_json: bool) -> None:
    if as_json:
        print_result(made, as_json)
        return
    databases = ", ".join(made.databases) or "no database"
    say(f"{made.snapshot}: {made.num_artifacts} artifacts ({made.num_copied} copied now) and {made.num_files} other "
        f"files, with {databases}; {short(made.num_bytes)}B written")  # fmt: skip
    for one in made.lacking:
        print(f"{lacks}{one}", file=sys.stderr)
