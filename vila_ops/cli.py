"""`vila-ops`: each room as a command, the whole pipeline, and the servers of one box. Bodies of a few lines."""

import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from vila_ops import demo as demonstration
from vila_ops import doctor as checks
from vila_ops import local, pipeline
from vila_ops.artifacts import store
from vila_ops.config import Config, Resources, Run, load, load_resources
from vila_ops.config.local import load_local
from vila_ops.data.revisions import export_for_dvc
from vila_ops.serve import deploy as serving

app = typer.Typer(
    add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help="Image-text data to a served VLM."
)

data = typer.Typer(no_args_is_help=True, help="Look at data before it is prepared, and after.")
app.add_typer(data, name="data")

RecipeFile = Annotated[Path, typer.Argument(help="A file of configs/recipes")]
ResourcesFile = Annotated[Path, typer.Option("-r", "--resources", help="A file of configs/resources")]
Overrides = Annotated[list[str] | None, typer.Option("-s", "--set", help="KEY=VALUE, e.g. stages.sft.num_steps=20")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON handle and nothing else")]
StageName = Annotated[str, typer.Option("--stage", help="Name of a stage, or `base` for the untrained model")]
Servers = Annotated[Path, typer.Option("--servers", help="Ports and folders of this box's servers")]

INLINE = Path("configs/resources/inline.yaml")
LOCAL = Path("configs/local.yaml")


@app.command()
def show(
    recipe: RecipeFile, resources: ResourcesFile = INLINE, overrides: Overrides = None, as_json: AsJson = False
) -> None:
    """Print the resolved run and its fingerprint, and do nothing."""
    run = _load(recipe, resources, overrides)
    print(f"fingerprint {run.recipe.fingerprint()}", file=sys.stderr)
    _print(run, as_json)


@app.command()
def fetch(
    recipe: RecipeFile, resources: ResourcesFile = INLINE, overrides: Overrides = None, as_json: AsJson = False
) -> None:
    """Fetch every package that a recipe names, and put the untrained model together."""
    run = _load(recipe, resources, overrides)
    _print(pipeline.fetch(run), as_json)


@app.command()
def prepare(
    recipe: RecipeFile,
    mixture: Annotated[str, typer.Option("--mixture", help="Name of a mixture of the recipe")],
    resources: ResourcesFile = INLINE,
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option("--out", help="Copy the dataset here too, for DVC")] = None,
    as_json: AsJson = False,
) -> None:
    """Prepare one mixture."""
    dataset = pipeline.prepare_named(_load(recipe, resources, overrides), mixture)
    if out is not None:
        export_for_dvc(dataset, out)
    _print(dataset, as_json)


@app.command()
def train(
    recipe: RecipeFile,
    stage: StageName,
    resources: ResourcesFile = INLINE,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Train up to a stage; what is sealed already is not made again."""
    _print(pipeline.model_after(_load(recipe, resources, overrides), stage), as_json)


@app.command()
def evaluate(
    recipe: RecipeFile,
    stage: StageName,
    final: Annotated[bool, typer.Option("--final", help="The suite that decides, instead of the probe")] = False,
    resources: ResourcesFile = INLINE,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Evaluate the model after a stage."""
    _print(pipeline.evaluate_stage(_load(recipe, resources, overrides), stage, final=final), as_json)


@app.command()
def register(
    recipe: RecipeFile, resources: ResourcesFile, overrides: Overrides = None, as_json: AsJson = False
) -> None:
    """Register the last stage's model and let the gate judge it."""
    _print(pipeline.register_last(_load(recipe, resources, overrides)), as_json)


@app.command()
def deploy(recipe: RecipeFile, resources: ResourcesFile, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Serve the model of a recipe, or the champion where the gate refused it."""
    _print(pipeline.deploy_champion(_load(recipe, resources, overrides)), as_json)


@app.command()
def undeploy(recipe: RecipeFile, resources: ResourcesFile, overrides: Overrides = None) -> None:
    """End what serves a recipe's service."""
    loaded = _load(recipe, resources, overrides)
    serving.undeploy(loaded.recipe.service, loaded.resources)


@app.command()
def run(
    recipe: RecipeFile, resources: ResourcesFile = INLINE, overrides: Overrides = None, as_json: AsJson = False
) -> None:
    """Every room in order, without Prefect; writes the report."""
    from vila_ops.report import summary

    loaded = _load(recipe, resources, overrides)
    outcome = pipeline.run_pipeline(loaded, pipeline.Rooms())
    page = summary.write(loaded, outcome)
    if as_json:
        _print(outcome, as_json)
    else:
        print(summary.lines(page.summary))
    if outcome.version is None:
        print("nothing was registered or deployed: these resources have no tracking_uri", file=sys.stderr)
    print(f"report: {page.html}", file=sys.stderr)


@data.command("lint")
def data_lint(
    uri: Annotated[str, typer.Argument(help="A file or folder of raw data")],
    kind: Annotated[str | None, typer.Option("--format", help="Its format; else told by its content")] = None,
    images: Annotated[str | None, typer.Option("--images", help="Folder of the pictures that its records name")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a line")] = False,
) -> None:
    """List every fault of raw data with its file and line; ends with 1 if there is any."""
    from vila_ops.data.guess import guess
    from vila_ops.data.lint import Fault, lines, lint

    source = guess(uri, kind=kind, images=images)
    print(f"format {source.kind}", file=sys.stderr)
    faulty = False
    for found in lint(source, cache=Path(Resources(launch="inline").cache).expanduser()):
        print(found.model_dump_json() if as_json else lines(found), flush=True)
        faulty |= isinstance(found, Fault)
    if faulty:
        raise typer.Exit(1)


@app.command()
def verify(place: Annotated[str, typer.Argument(help="A sealed folder of the store, or s3://...")]) -> None:
    """Read every byte of a sealed folder and compare it with its manifest."""
    store.verify_folder(place.rstrip("/"))
    print(f"{place} is as it was sealed")


@app.command()
def doctor(servers: Servers = LOCAL, resources: ResourcesFile = INLINE, as_json: AsJson = False) -> None:
    """Check this machine and the store of the resources; each finding says how to mend it."""
    findings = checks.examine(load_local(servers), store=load_resources(resources).store)
    if as_json:
        _print(findings, as_json)
    else:
        for finding in findings:
            print(f"{'ok  ' if finding.ok else 'BAD '} {finding.text}")
    if not all(finding.ok for finding in findings):
        raise typer.Exit(1)


@app.command()
def up(servers: Servers = LOCAL, as_json: AsJson = False) -> None:
    """Start this box's servers, or adopt them where they run."""
    _print(local.up(load_local(servers)), as_json)


@app.command()
def down(servers: Servers = LOCAL) -> None:
    """End the servers that `up` started."""
    local.down(load_local(servers))


@app.command()
def status(servers: Servers = LOCAL, as_json: AsJson = False) -> None:
    """Which of this box's servers run."""
    found = local.status(load_local(servers))
    if as_json:
        _print(found, as_json)
    else:
        for one in found:
            print(f"{one.name:8} {one.state:10} {one.url}  pid {one.pid or '-'}  {one.memory_bytes >> 20} MiB")


@app.command()
def demo(recipe: RecipeFile, resources: ResourcesFile, overrides: Overrides = None, servers: Servers = LOCAL) -> None:
    """Bring the servers up and run the flow `vila` on them, with progress."""
    demonstration.demo(_load(recipe, resources, overrides), load_local(servers), say=print)


def main() -> None:
    """Entry point: an error that a user can answer is one message, not a traceback."""
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(message)s")
    logging.getLogger("vila_ops").setLevel(logging.INFO)
    try:
        app()
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from error


def _load(recipe: Path, resources: Path, overrides: list[str] | None) -> Run:
    run = load(recipe, resources=resources, overrides=tuple(overrides or ()))
    if run.resources.launch == "ray" and LOCAL.is_file():
        local.join(load_local(LOCAL), ray_address=run.resources.ray_address)
    return run


def _print(made: Config | Sequence[Config], as_json: bool) -> None:
    dumped = made.model_dump(mode="json") if isinstance(made, Config) else [one.model_dump(mode="json") for one in made]
    print(json.dumps(dumped, indent=None if as_json else 2))
