"""The command `sweep`."""

import json
from typing import Annotated

import typer

from vila_ops.cli.options import JsonLines, say


def sweep(
    prefect: Annotated[str, typer.Option("--prefect", envvar="PREFECT_API_URL", help="URL of Prefect's API")],
    every: Annotated[float, typer.Option("--every", min=0.1, help="Seconds between two looks")] = 5.0,
    once: Annotated[bool, typer.Option("--once", help="Look once, and print the ids of the lost flow runs")] = False,
    as_json: JsonLines = False,
) -> None:
    """Tell Prefect which flow runs have lost their process; `vila-ops up` runs this beside Prefect.

    Credentials are Prefect's own: PREFECT_API_AUTH_STRING or PREFECT_API_KEY.
    """
    from vila_ops.pipeline.sweeper import Sweeper, client_of

    with client_of(prefect) as api:
        sweeper = Sweeper(api)
        if not once:
            sweeper.run(every_seconds=every)
        for flow_run in sweeper.sweep():
            say(json.dumps({"flow_run": flow_run}) if as_json else flow_run)
