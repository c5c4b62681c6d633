"""What the commands share: options, loading a run, and printing a result."""

import io
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

if TYPE_CHECKING:
    from vila_ops.config import Config, Run, RunContext

INLINE = Path("inline")
LOCAL = Path("local")


def names_in(folder: str) -> Callable[[str], list[str]]:
    """What a shell completes a word to: names of a folder of `configs/`. Where none begins so, it takes files."""

    def complete(incomplete: str) -> list[str]:
        from vila_ops.config.named import names

        return [name for name in names(folder) if name.startswith(incomplete)]

    return complete


RecipeFile = Annotated[
    Path, typer.Argument(help="A name in configs/recipes, or a file", autocompletion=names_in("recipes"))
]
StageName = Annotated[str, typer.Option("--stage", help="Name of a stage, or `base` for the untrained model")]
MixtureName = Annotated[str, typer.Option("--mixture", help="Name of a mixture of the recipe")]
ResourcesFile = Annotated[
    Path,
    typer.Option(
        "-r",
        "--resources",
        help="A name in configs/resources, or a file",
        autocompletion=names_in("resources"),
    ),
]
Overrides = Annotated[list[str] | None, typer.Option("-s", "--set", help="KEY=VALUE, e.g. stages.sft.num_steps=20")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else")]
JsonLines = Annotated[bool, typer.Option("--json", help="Print one JSON object a line and nothing else")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say which tasks would work, and why; do nothing")]


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

    local.join(load_local(LOCAL), ray_address=run.resources.ray_address)
    if not isinstance(sys.stdout, _ResultsApart):
        sys.stdout = _ResultsApart(sys.stdout)


def say(text: str) -> None:
    """Print a line of a command's result."""
    print(text, file=sys.stdout.results if isinstance(sys.stdout, _ResultsApart) else sys.stdout, flush=True)


def as_yaml(value: dict[str, Any] | list[Any]) -> str:
    """Settings as the text of a YAML file."""
    import yaml

    return yaml.safe_dump(value, sort_keys=False).rstrip()


def print_result(made: "Config | Sequence[Config]", as_json: bool) -> None:
    """Print what a command made as JSON, on one line or indented for a person."""
    from vila_ops.config import Config

    dumped = made.model_dump(mode="json") if isinstance(made, Config) else [one.model_dump(mode="json") for one in made]
    say(json.dumps(dumped, indent=None if as_json else 2))
