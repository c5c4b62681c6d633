"""The command `metrics`."""

import logging
import os
import sys
import threading
import time
from pathlib import Path
from typing import Annotated

import typer

from vila_ops.cli.options import INLINE, ResourcesFile, say

BEGINS = "# HELP vila_"
"""Each file that `--out` wrote begins so."""
log = logging.getLogger(__name__)


def metrics(
    resources: ResourcesFile = INLINE,
    listen: Annotated[str | None, typer.Option("--listen", help="Serve them at http://HOST:PORT/metrics")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Write them to a file again and again, NAME.prom")] = None,
    every: Annotated[float, typer.Option("--every", min=1.0, help="Seconds between two looks at the store")] = 15.0,
) -> None:
    """Print what tasks, models and retraining of a store do, as metrics of Prometheus; serve them; or write them.

    With --listen on an address that other machines reach, VILA_METRICS_TOKEN has to hold a token.
    """
    from prometheus_client import generate_latest, write_to_textfile

    from vila_ops.artifacts import output
    from vila_ops.config import load_resources
    from vila_ops.config.resources import is_loopback
    from vila_ops.monitoring import exporter

    if listen and out:
        raise ValueError("--listen serves and --out writes; give one of them")
    if out is not None:
        output.check_file(out, begins=BEGINS)
    host, _, port = (listen or "127.0.0.1:0").rpartition(":")
    if not (host and port.isdecimal() and int(port) < 2**16):
        raise ValueError(f"--listen {listen!r} is not HOST:PORT, such as 127.0.0.1:9464")
    token = os.environ.get(exporter.TOKEN)
    if not is_loopback(host) and not token:
        raise ValueError(f"{host} is reached from other machines; set {exporter.TOKEN} to a token, or use 127.0.0.1")
    registry = exporter.registry_of(load_resources(resources).storage)
    if out is not None:
        write_to_textfile(str(out), registry)
        while True:
            time.sleep(every)
            try:
                write_to_textfile(str(out), registry)
            except OSError as error:  # the disk may have space again
                log.warning("%s was not written: %s", out, error)
    if listen is None:
        say(generate_latest(registry).decode().rstrip("\n"))
        return
    snapshot = exporter.Snapshot(registry)
    with exporter.server_of(snapshot, host, int(port), token=token) as server:
        print(f"http://{host}:{server.server_port}/metrics", file=sys.stderr)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            while True:
                snapshot.read()
                time.sleep(every)
        finally:
            server.shutdown()
