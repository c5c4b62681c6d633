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
from vila_ops.cli.benchmark import benchmark
from vila_ops.cli.champion import champion
from vila_ops.cli.compare import compare
from vila_ops.cli.data import data
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

INTERRUPTED = 130
"""Exit code after Ctrl-C, as of a shell."""
log = logging.getLogger(__name__)


class _Program(TyperGroup):
    """Says after Ctrl-C how to go on."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            command = shlex.join(["vila-ops", *sys.argv[1:]])
            print(f"\ninterrupted; what was finished is kept, and the same command goes on: {command}", file=sys.stderr)
            raise SystemExit(INTERRUPTED) from None


app = typer.Typer(
    cls=_Program,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Image-text data to a served VLM.",
)
COMMANDS: tuple[Callable[..., None] | typer.Typer, ...] = (
    init.init, run.show, explain, plan.plan, run.fetch, run.prepare, data, model.import_model, train, run.evaluate,
    compare, run.alignment, benchmark, run.register, champion, run.deploy, run.undeploy, *release.COMMANDS, keys,
    run.run, retrain, ablate, model.export, model.generate, run.verify, trace, report, top, metrics, gc,
    servers.doctor, servers.up, servers.down, servers.status, sweep, servers.demo,
)  # fmt: skip
for command in COMMANDS:
    if isinstance(command, typer.Typer):
        app.add_typer(command)
    else:
        app.command("import" if command is model.import_model else None)(command)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"vila-ops {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Entry point: an error is one message, not a traceback."""
    if not sys.stderr.isatty():  # a bar of transformers, redrawn for every percent, is noise in a log
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    over_progress = "\r\x1b[K" if sys.stderr.isatty() else ""  # a stage's progress line is rewritten in place
    try:
        logs.configure(sys.stderr, text=f"{over_progress}%(message)s")
        app(prog_name="vila-ops")
    except Preempted as error:
        _tell(message_of(error))
        raise SystemExit(os.EX_TEMPFAIL) from error
    except (VilaError, ValueError, OSError, RuntimeError) as error:
        _tell(message_of(error))
        raise SystemExit(1) from error
    except Exception as error:
        _tell(unexpected(error))
        raise SystemExit(1) from error


def _tell(error: str) -> None:
    """Print an error, or log it where lines are JSON."""
    if os.environ.get(logs.VARIABLE) == "json":
        log.error("%s", error)
    else:
        print(f"error: {error}", file=sys.stderr)
