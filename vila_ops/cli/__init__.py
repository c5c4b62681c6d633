"""`vila-ops`: each task as a command, the whole pipeline, and the servers of one machine.

Bodies are a few lines and import what they need, so that `--help`, `show` and `status` load no heavy library.
"""

import logging
import os
import shlex
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from vila_ops import __version__, logs
from vila_ops.cli import init, model, plan, release, run, servers
from vila_ops.cli.ablate import ablate
from vila_ops.cli.backup import backup, restore
from vila_ops.cli.benchmark import benchmark
from vila_ops.cli.champion import champion
from vila_ops.cli.compare import compare
from vila_ops.cli.data import data
from vila_ops.cli.examples import complete_help, epilog
from vila_ops.cli.exits import ExitCode
from vila_ops.cli.explain import explain
from vila_ops.cli.gc import gc
from vila_ops.cli.keys import keys
from vila_ops.cli.messages import message_of, unexpected
from vila_ops.cli.metrics import metrics
from vila_ops.cli.report import report
from vila_ops.cli.retrain import retrain
from vila_ops.cli.sweep import sweep
from vila_ops.cli.top import top
from vila_ops.cli.trace import trace
from vila_ops.cli.train import train
from vila_ops.errors import Preempted, VilaError

LOGGER = logging.getLogger("vila_ops")
"""The parent of the loggers of all modules."""


class _Program(TyperGroup):
    """Says after Ctrl-C how to go on."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            command = shlex.join(["vila-ops", *sys.argv[1:]])
            print(f"\ninterrupted; what was finished is kept, and the same command goes on: {command}", file=sys.stderr)
            raise SystemExit(ExitCode.INTERRUPTED) from None


app = typer.Typer(
    cls=_Program,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help=f"Image-text data to a served VLM.\n\n{ExitCode.summary()}",
    epilog=epilog(""),
)
COMMANDS: tuple[Callable[..., None] | typer.Typer, ...] = (
    init.init, run.show, explain, plan.plan, run.fetch, run.prepare, data, model.import_model, train, run.evaluate,
    compare, run.alignment, benchmark, run.register, champion, run.deploy, run.undeploy, *release.COMMANDS, keys,
    run.run, retrain, ablate, model.export, model.generate, run.verify, trace, report, top, metrics, gc, backup,
    restore, servers.doctor, servers.up, servers.down, servers.status, servers.logs, sweep, servers.demo,
)  # fmt: skip
for command in COMMANDS:
    if isinstance(command, typer.Typer):
        app.add_typer(command)
    else:
        app.command("import" if command is model.import_model else None)(command)
complete_help(app)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"vila-ops {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Print the traceback of an error, too")] = False,
) -> None:
    if debug:
        LOGGER.setLevel(logging.DEBUG)


def main() -> None:
    """Entry point: an error is one message, not a traceback; with --debug the traceback stands above it."""
    if not sys.stderr.isatty():  # a bar of transformers, redrawn for every percent, is noise in a log
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    over_progress = "\r\x1b[K" if sys.stderr.isatty() else ""  # a stage's progress line is rewritten in place
    try:
        logs.configure(sys.stderr, text=f"{over_progress}%(message)s")
        app(prog_name="vila-ops")
    except (VilaError, ValueError, OSError, RuntimeError) as error:
        _tell(error, message_of(error), over=over_progress)
        raise SystemExit(ExitCode.TRY_AGAIN if isinstance(error, Preempted) else ExitCode.FAILED) from error
    except Exception as error:
        _tell(error, unexpected(error), over=over_progress)
        raise SystemExit(ExitCode.FAILED) from error


def _tell(error: Exception, told: str, *, over: str) -> None:
    """Print what is told of an error, or log it where lines are JSON; with --debug where it was raised, too."""
    LOGGER.debug("where it was raised:", exc_info=error)
    if os.environ.get(logs.VARIABLE) == "json":
        LOGGER.error("%s", told)
    else:
        print(f"{over}error: {told}", file=sys.stderr)
