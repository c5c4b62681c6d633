"""`vila-ops`: each task as a command, the whole pipeline, and the servers of one machine.

Bodies are a few lines and import what they need, so that `--help`, `show` and `status` load no heavy library.
"""

import logging
import sys
from collections.abc import Callable

import typer

from vila_ops.cli import model, plan, run, servers
from vila_ops.cli.data import data
from vila_ops.cli.options import message_of
from vila_ops.cli.train import train
from vila_ops.errors import VilaError

app = typer.Typer(
    add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help="Image-text data to a served VLM."
)
COMMANDS: tuple[Callable[..., None] | typer.Typer, ...] = (
    run.show, plan.plan, run.fetch, run.prepare, data, model.import_model, train, run.evaluate, run.alignment,
    run.register, run.deploy, run.undeploy, run.run, model.export, run.verify,
    servers.doctor, servers.up, servers.down, servers.status, servers.demo,
)  # fmt: skip
for command in COMMANDS:
    if isinstance(command, typer.Typer):
        app.add_typer(command)
    else:
        app.command("import" if command is model.import_model else None)(command)


def main() -> None:
    """Entry point: an error that a user can answer is one message, not a traceback."""
    over_progress = "\r\x1b[K" if sys.stderr.isatty() else ""  # a stage's progress line is rewritten in place
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format=f"{over_progress}%(message)s")
    logging.getLogger("vila_ops").setLevel(logging.INFO)
    try:
        app(prog_name="vila-ops")
    except (VilaError, ValueError, OSError, RuntimeError) as error:
        print(f"error: {message_of(error)}", file=sys.stderr)
        raise SystemExit(1) from error
