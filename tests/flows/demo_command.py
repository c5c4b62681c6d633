"""The command of `make demo` on the servers of a test, with secrets in its environment."""

import contextlib
import secrets
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil

from tests.flows.flow_runs import ROOT, Json

PROGRAM = str(Path(sys.executable).parent / "vila-ops")
CANARY = "vila-canary"
SECRETS = {
    name: f"{CANARY}-{number}-{secrets.token_hex(6)}"
    for number, name in enumerate(
        (
            *("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "HF_TOKEN", "OPENAI_API_KEY"),
            *("VILA_API_KEY", "MLFLOW_TRACKING_TOKEN", "PREFECT_API_AUTH_STRING", "PGPASSWORD", "DATABASE_URL"),
        )
    )
}
"""What the environment of servers, flow runs and workers may hold."""


def command(servers: Json, *overrides: str) -> list[str]:
    """The demo on this test's own servers."""
    files = ["-r", str(servers["folder"] / "resources.yaml"), "--servers", str(servers["folder"] / "local.yaml")]
    sets = [word for override in overrides for word in ("-s", override)]
    return [PROGRAM, "demo", str(servers["folder"] / "recipe.yaml"), *files, *sets]


def kill_once_started(servers: Json, *overrides: str) -> str:
    """SIGKILL to a demo as soon as its flow run is there; returns the flow run's id."""
    with subprocess.Popen(command(servers, *overrides), cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        said = next(line for line in process.stdout if line.startswith("flow run "))
        process.kill()
    return said.strip().rpartition("/")[2]


def command_lines() -> Iterator[list[str]]:
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            yield process.cmdline()


def environment(process: psutil.Process) -> dict[str, str]:
    with contextlib.suppress(psutil.Error):
        return process.environ()
    return {}
