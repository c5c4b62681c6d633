"""What the commands share: options, loading a run, and printing a result."""

import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TextIO

import typer

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

    from vila_ops.config import Config, Run, RunContext

INLINE = Path("configs/resources/inline.yaml")
LOCAL = Path("configs/local.yaml")

RecipeFile = Annotated[Path, typer.Argument(help="A file of configs/recipes")]
StageName = Annotated[str, typer.Option("--stage", help="Name of a stage, or `base` for the untrained model")]
MixtureName = Annotated[str, typer.Option("--mixture", help="Name of a mixture of the recipe")]
ResourcesFile = Annotated[Path, typer.Option("-r", "--resources", help="A file of configs/resources")]
Overrides = Annotated[list[str] | None, typer.Option("-s", "--set", help="KEY=VALUE, e.g. stages.sft.num_steps=20")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else")]
JsonLines = Annotated[bool, typer.Option("--json", help="Print one JSON object a line and nothing else")]


class _ResultsApart(io.TextIOBase):
    """Standard output that only `say` writes to: Ray prints its workers' lines to sys.stdout, at any moment."""

    def __init__(self, results: TextIO) -> None:
        self.results = results

    def write(self, text: str) -> int:
        """What others print goes to standard error."""
        return sys.stderr.write(text)


def load_run(recipe: Path, resources: Path, overrides: list[str] | None) -> "tuple[Run, RunContext]":
    """The run of a recipe on resources, and its context; joins a cluster of this machine's own servers."""
    from vila_ops.config import context_of, load

    run = load(recipe, resources=resources, overrides=tuple(overrides or ()))
    if run.resources.launch != "inline":
        _join_cluster(run)
    return run, context_of(recipe, resources=resources, overrides=tuple(overrides or ()))


def _join_cluster(run: "Run") -> None:
    from vila_ops import local
    from vila_ops.config.local import load_local

    if LOCAL.is_file():
        local.join(load_local(LOCAL), ray_address=run.resources.ray_address)
    if not isinstance(sys.stdout, _ResultsApart):
        sys.stdout = _ResultsApart(sys.stdout)


def say(text: str) -> None:
    """Print a line of a command's result."""
    print(text, file=sys.stdout.results if isinstance(sys.stdout, _ResultsApart) else sys.stdout, flush=True)


def message_of(error: Exception) -> str:
    """What an error says; for a config, a line for each setting that is wrong, without pydantic's own words."""
    from pydantic import ValidationError

    if not isinstance(error, ValidationError):
        return str(error)
    return "\n".join(
        f"{'.'.join(map(str, fault['loc'])) or error.title}: {_reason(fault)}"
        for fault in error.errors(include_url=False, include_context=False)
    )


def _reason(fault: "ErrorDetails") -> str:
    """What is wrong with one setting, and its value."""
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


def section(name: str, config: "Config") -> str:
    """A config as the section of a YAML file."""
    import yaml

    return yaml.safe_dump({name: config.model_dump(mode="json", exclude_none=True)}, sort_keys=False).rstrip()


def print_result(made: "Config | Sequence[Config]", as_json: bool) -> None:
    """Print what a command made as JSON, on one line or indented for a person."""
    from vila_ops.config import Config

    dumped = made.model_dump(mode="json") if isinstance(made, Config) else [one.model_dump(mode="json") for one in made]
    say(json.dumps(dumped, indent=None if as_json else 2))
