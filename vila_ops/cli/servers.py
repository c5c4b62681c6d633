"""The servers of this machine: checked, started, ended and listed; and the demo that runs on them."""

import json
import os
import re
import sys
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from vila_ops.cli.options import (
    INLINE,
    LOCAL,
    AsJson,
    JsonLines,
    Overrides,
    RecipeFile,
    ResourcesFile,
    load_run,
    print_result,
    say,
)

Servers = Annotated[Path, typer.Option("--servers", help="Ports and folders of this machine's servers")]
COLOUR = re.compile(r"\x1b\[[0-9;]*m")
"""What colours text on a terminal. Ray puts it around the name of the process whose line it forwards."""


def doctor(
    servers: Servers = LOCAL,
    resources: ResourcesFile = INLINE,
    cluster: Annotated[bool, typer.Option("--cluster", help="Measure every node of the resources' cluster")] = False,
    as_json: AsJson = False,
) -> None:
    """Check this machine and the store of the resources, or a cluster; each finding says how to fix it."""
    from vila_ops import doctor as checks
    from vila_ops import local
    from vila_ops.config import load_resources
    from vila_ops.config.local import load_local

    settings, loaded = load_local(servers), load_resources(resources)
    if loaded.launch != "inline":
        local.join(settings, ray_address=loaded.ray_address)
    if cluster:
        from vila_ops.doctor.cluster import examine_cluster

        findings = examine_cluster(loaded)
    else:
        findings = checks.examine(settings, loaded)
    if as_json:
        print_result(findings, as_json)
    else:
        for finding in findings:
            say(f"{'ok  ' if finding.ok else 'BAD '} {finding.text}")
    if not all(finding.ok for finding in findings):
        raise typer.Exit(1)


def up(servers: Servers = LOCAL, as_json: AsJson = False) -> None:
    """Start this machine's servers, or adopt them where they run."""
    from vila_ops import local
    from vila_ops.config.local import load_local

    print_result(local.up(load_local(servers)), as_json)


def down(servers: Servers = LOCAL) -> None:
    """End the servers that `up` started."""
    from vila_ops import local
    from vila_ops.config.local import load_local

    local.down(load_local(servers))


def status(servers: Servers = LOCAL, as_json: AsJson = False) -> None:
    """List this machine's servers and whether they run."""
    from vila_ops import local
    from vila_ops.config.local import load_local

    states = local.status(load_local(servers))
    if as_json:
        print_result(states, as_json)
    else:
        for one in states:
            say(f"{one.name:8} {one.state:10} {one.url}  pid {one.pid or '-'}  {one.memory_bytes >> 20} MiB")


def logs(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[SERVER]...", help="Of mlflow, prefect, ray, worker, sweeper")
    ] = None,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Go on with new lines, until Ctrl-C")] = False,
    lines: Annotated[int, typer.Option("-n", "--lines", min=0, help="Last lines of each log")] = 20,
    servers: Servers = LOCAL,
    as_json: JsonLines = False,
) -> None:
    """Print the last lines of the servers' logs."""
    from vila_ops import local
    from vila_ops.config.local import load_local

    wanted = local.logs_of(local.root_of(load_local(servers)), names or ())
    width = max(map(len, wanted)) if len(wanted) > 1 else 0
    coloured = sys.stdout.isatty() and not os.environ.get("NO_COLOR") and not as_json

    def tell(name: str, line: str) -> None:
        shown = line if coloured else COLOUR.sub("", line)
        if as_json:
            print(json.dumps({"server": name, "line": shown}), flush=True)
        else:
            print(f"{name:{width}} | {shown}" if width else shown, flush=True)

    if follow:
        with suppress(KeyboardInterrupt):
            for name, line in local.follow(wanted, last=lines):
                tell(name, line)
        return
    for name, log in wanted.items():
        for line in local.last_lines(log, lines):
            tell(name, line)


def demo(recipe: RecipeFile, resources: ResourcesFile, overrides: Overrides = None, servers: Servers = LOCAL) -> None:
    """Start the servers and run the flow `vila` on them, with progress."""
    from vila_ops import demo as demonstration
    from vila_ops.config.local import load_local

    demonstration.demo(load_run(recipe, resources, overrides)[0], load_local(servers), say=say)
