"""`vila-ops top`: what runs now, on which node, how far, and what it costs."""

import sys
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated

import typer

from vila_ops.cli.options import INLINE, AsJson, ResourcesFile, print_result, say
from vila_ops.cli.tables import Row, short, table
from vila_ops.errors import VilaError

if TYPE_CHECKING:
    from rich.table import Table

    from vila_ops.monitoring.tasks import WatchedTask

HEAD: Row = ("task", "state", "node", "done", "time", "left", "cost", "metrics")
DONE_SHOWN = 5
"""The most of those that are done, the newest, without --all."""
COLOURS = {"running": "green", "lost": "bold red", "failed": "red", "stopped": "yellow", "done": "dim"}


def top(
    resources: ResourcesFile = INLINE,
    every: Annotated[float, typer.Option("--every", min=0.5, help="Seconds between two looks")] = 5.0,
    once: Annotated[bool, typer.Option("--once", help="Look once, and print a table")] = False,
    every_done: Annotated[bool, typer.Option("--all", help="Show all that are done, not the last five")] = False,
    as_json: AsJson = False,
) -> None:
    """Show what the tasks of a store do, and how those of the last day ended: node, progress, time left, cost.

    Ctrl-C ends it. A task says how far it is every 15 seconds. Where standard output is no terminal, it prints once.
    """
    from vila_ops.config import load_resources
    from vila_ops.monitoring.tasks import watched

    store = load_resources(resources).storage.store
    if as_json:
        print_result(watched(store), as_json)
        return

    def shown() -> "list[WatchedTask]":
        tasks = watched(store)  # those that are done come last
        others = sum(one.state != "done" for one in tasks)
        return tasks if every_done else tasks[: others + DONE_SHOWN]

    if once or not sys.stdout.isatty():
        say("\n".join(table([HEAD, *map(row, shown())])))
        return
    from rich.live import Live  # heavy

    tasks = shown()
    with suppress(KeyboardInterrupt), Live(page(tasks), screen=True, auto_refresh=False) as live:
        while True:
            time.sleep(every)
            try:
                tasks, fault = shown(), ""
            except (VilaError, OSError) as error:  # the store may be back at the next look
                fault = str(error)
            live.update(page(tasks, fault), refresh=True)


def row(one: "WatchedTask") -> Row:
    """A task as texts under HEAD."""
    counted = "-" if one.total is None else f"{one.done:.0f}/{one.total:.0f} {one.unit}"
    return (
        f"{one.task} {one.name}",
        one.state,
        one.host if one.workers == 1 else f"{one.host} x{one.workers}",
        counted,
        clock(one.seconds),
        "-" if one.seconds_left is None else clock(one.seconds_left),
        "-" if one.cost is None else f"{one.cost:.2f}",
        ", ".join(_measured(one)) or "-",
    )


def _measured(one: "WatchedTask") -> list[str]:
    """The metrics of a stage that say most."""
    newest = one.metrics
    return [
        *([f"loss {newest['loss']:.3f}"] if "loss" in newest else []),
        *([f"{short(newest['train/tokens_per_s']).rstrip()} tokens/s"] if "train/tokens_per_s" in newest else []),
        *([f"MFU {100 * newest['train/mfu']:.0f} %"] if "train/mfu" in newest else []),
    ]


def clock(seconds: float) -> str:
    """Hours, minutes and seconds."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole % 3600 // 60:02d}:{whole % 60:02d}"


def page(tasks: "list[WatchedTask]", fault: str = "") -> "Table":
    """The tasks; with a fault they are those of an earlier look."""
    from rich.table import Table
    from rich.text import Text

    title = Text(f"{time.strftime('%H:%M:%S')}, Ctrl-C ends{f'; NOT RENEWED: {fault}' if fault else ''}")
    shown = Table(*HEAD, box=None, expand=True, title=title, title_justify="left")
    for one in tasks:
        shown.add_row(*map(Text, row(one)), style=COLOURS[one.state])
    return shown
