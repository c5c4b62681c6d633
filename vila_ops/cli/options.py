"""What the commands share: options, a run from its files, and a handle printed."""

import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, TextIO

import typer
import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from vila_ops import local
from vila_ops.config import Config, Run, RunContext, context_of, load
from vila_ops.config.local import load_local

INLINE = Path("configs/resources/inline.yaml")
LOCAL = Path("configs/local.yaml")

RecipeFile = Annotated[Path, typer.Argument(help="A file of configs/recipes")]
StageName = Annotated[str, typer.Option("--stage", help="Name of a stage, or `base` for the untrained model")]
MixtureName = Annotated[str, typer.Option("--mixture", help="Name of a mixture of the recipe")]
ResourcesFile = Annotated[Path, typer.Option("-r", "--resources", help="A file of configs/resources")]
Overrides = Annotated[list[str] | None, typer.Option("-s", "--set", help="KEY=VALUE, e.g. stages.sft.num_steps=20")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON handle and nothing else")]
JsonLines = Annotated[bool, typer.Option("--json", help="Print one JSON object a line and nothing else")]


class _ResultsApart(io.TextIOBase):
    """Standard output that only `say` writes to: Ray prints its workers' lines to sys.stdout, at any moment."""

    def __init__(self, results: TextIO) -> None:
        self.results = results

    def write(self, text: str) -> int:
        """What others print goes to standard error."""
        return sys.stderr.write(text)


def load_run(recipe: Path, resources: Path, overrides: list[str] | None) -> tuple[Run, RunContext]:
    """The run of a recipe on resources, and its context; joins a cluster of this machine's own servers."""
    run = load(recipe, resources=resources, overrides=tuple(overrides or ()))
    if run.resources.launch != "inline" and LOCAL.is_file():
        local.join(load_local(LOCAL), ray_address=run.resources.ray_address)
    if run.resources.launch != "inline" and not isinstance(sys.stdout, _ResultsApart):
        sys.stdout = _ResultsApart(sys.stdout)
    return run, context_of(recipe, resources=resources, overrides=tuple(overrides or ()))


def say(text: str) -> None:
    """Print a line of a command's result."""
    print(text, file=sys.stdout.results if isinstance(sys.stdout, _ResultsApart) else sys.stdout, flush=True)


def faults_of(error: ValidationError) -> str:
    """Each setting that is wrong and why, a line each, without what pydantic adds for programmers."""
    return "\n".join(
        f"{'.'.join(map(str, fault['loc'])) or error.title}: {_told(fault)}"
        for fault in error.errors(include_url=False, include_context=False)
    )


def _told(fault: ErrorDetails) -> str:
    """What is wrong with one setting, the value with it."""
    given = fault["input"]
    match fault["type"]:
        case "value_error":
            return fault["msg"].removeprefix("Value error, ")
        case "extra_forbidden":
            return "there is no such setting; docs/settings.md lists them"
        case "model_attributes_type" | "model_type" | "dict_type":
            return f"a mapping is wanted here, such as {{kind: ...}}, not {given!r}; see docs/settings.md"
        case _ if isinstance(given, str | int | float | None):
            return f"{fault['msg']}; it is {given!r}"
        case _:
            return fault["msg"]


def section(name: str, config: Config) -> str:
    """A config as the section of a YAML file."""
    return yaml.safe_dump({name: config.model_dump(mode="json", exclude_none=True)}, sort_keys=False).rstrip()


def print_handle(made: Config | Sequence[Config], as_json: bool) -> None:
    """What a command made, on one line or for a person."""
    dumped = made.model_dump(mode="json") if isinstance(made, Config) else [one.model_dump(mode="json") for one in made]
    say(json.dumps(dumped, indent=None if as_json else 2))
