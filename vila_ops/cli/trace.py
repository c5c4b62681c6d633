"""`vila-ops trace`: what an artifact was made from, and what was made from it."""

import json
from typing import Annotated

import typer

from vila_ops.cli.options import INLINE, AsJson, ResourcesFile, print_result, say


def trace(
    name: Annotated[
        str,
        typer.Argument(
            help="A digest or its first digits, a sealed folder, an MLflow run, the id of a response, NAME@champion or "
            "models:/NAME/VERSION",
            metavar="ID",
        ),
    ],
    resources: ResourcesFile = INLINE,
    openlineage: Annotated[
        bool, typer.Option("--openlineage", help="Print OpenLineage run events, one JSON object a line")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Print what an artifact was made from, back to the raw files, and all that was made from it."""
    from vila_ops.config import load_resources
    from vila_ops.lineage import openlineage as events_of
    from vila_ops.lineage import trace as tracing

    if openlineage and as_json:
        raise ValueError("give one of --openlineage and --json; each is a form of its own")
    traced, graph = tracing.trace(name, load_resources(resources))
    if openlineage:
        for event in events_of.events(traced, graph):
            say(json.dumps(event))
    elif as_json:
        print_result(traced, as_json)
    else:
        say("\n".join(tracing.tree(traced, graph)))
