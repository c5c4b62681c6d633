"""`vila-ops`: each task as a command, the whole pipeline, and the servers of one machine. Bodies of a few lines."""

import json
import logging
import sys
from pathlib import Path
from typing import Annotated

import typer
from pydantic import ValidationError

from vila_ops import demo as demonstration
from vila_ops import doctor as checks
from vila_ops import local
from vila_ops.artifacts import store
from vila_ops.cli.data import data
from vila_ops.cli.model import export, import_model
from vila_ops.cli.options import (
    INLINE,
    LOCAL,
    AsJson,
    MixtureName,
    Overrides,
    RecipeFile,
    ResourcesFile,
    StageName,
    faults_of,
    load_run,
    print_handle,
    say,
)
from vila_ops.cli.plan import plan
from vila_ops.cli.train import train
from vila_ops.config import load_resources
from vila_ops.config.local import load_local
from vila_ops.data.revisions import check_export, export_for_dvc
from vila_ops.pipeline import promotion, stages
from vila_ops.pipeline.run import run_pipeline
from vila_ops.serve import deploy as serving

app = typer.Typer(
    add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help="Image-text data to a served VLM."
)
app.add_typer(data, name="data")
app.add_typer(train, name="train")

Servers = Annotated[Path, typer.Option("--servers", help="Ports and folders of this machine's servers")]


@app.command()
def show(
    recipe: RecipeFile, resources: ResourcesFile = INLINE, overrides: Overrides = None, as_json: AsJson = False
) -> None:
    """Print the resolved run and its fingerprint, what each stage trains and how large the parts are; do nothing."""
    run, _ = load_run(recipe, resources, overrides)
    if as_json:
        print(f"fingerprint {run.recipe.fingerprint()}", file=sys.stderr)
        print_handle(run, as_json)
        return
    from vila_ops.cli.show import summary  # heavy: torch, transformers
    from vila_ops.model.count import count

    lines = summary(run, count(run.recipe.model, cache=run.resources.storage.cache_folder()))
    print_handle(run, as_json)
    say("\n".join(["", *lines]))


@app.command()
def fetch(
    recipe: RecipeFile, resources: ResourcesFile = INLINE, overrides: Overrides = None, as_json: AsJson = False
) -> None:
    """Fetch every package that a recipe names, and put the untrained model together."""
    print_handle(stages.fetch(*load_run(recipe, resources, overrides)), as_json)


@app.command()
def prepare(
    recipe: RecipeFile,
    mixture: MixtureName,
    resources: ResourcesFile = INLINE,
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option("--out", help="Copy the dataset here too, for DVC")] = None,
    as_json: AsJson = False,
) -> None:
    """Prepare one mixture."""
    run, context = load_run(recipe, resources, overrides)
    if out is not None:
        check_export(out, apart=run.resources.storage.folders())
    dataset = stages.prepare_named(run, mixture, context)
    if out is not None:
        export_for_dvc(dataset, out)
    print_handle(dataset, as_json)


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
    run, context = load_run(recipe, resources, overrides)
    print_handle(stages.evaluate_stage(run, stage, final=final, context=context), as_json)


@app.command()
def alignment(
    recipe: RecipeFile,
    out: Annotated[Path, typer.Option("--out", help="The SVG to write")],
    resources: ResourcesFile = INLINE,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Draw how alike images and captions are in each layer, for the base and the model after every stage."""
    from vila_ops.report.summary import draw_layers

    run, context = load_run(recipe, resources, overrides)
    shown = draw_layers(run, out, context)
    if as_json:
        say(json.dumps(shown))
    else:
        say(f"{out}: {len(shown['layers'])} points")


@app.command()
def register(
    recipe: RecipeFile, resources: ResourcesFile, overrides: Overrides = None, as_json: AsJson = False
) -> None:
    """Register the last stage's model and let the gate judge it."""
    print_handle(promotion.register_last(*load_run(recipe, resources, overrides)), as_json)


@app.command()
def deploy(recipe: RecipeFile, resources: ResourcesFile, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Serve the model of a recipe, or the champion where the gate refused it."""
    print_handle(promotion.deploy_champion(*load_run(recipe, resources, overrides)), as_json)


@app.command()
def undeploy(recipe: RecipeFile, resources: ResourcesFile = INLINE, overrides: Overrides = None) -> None:
    """End what serves a recipe's service."""
    loaded, _ = load_run(recipe, resources, overrides)
    serving.undeploy(loaded.recipe.service, loaded.resources)


@app.command()
def run(
    recipe: RecipeFile, resources: ResourcesFile = INLINE, overrides: Overrides = None, as_json: AsJson = False
) -> None:
    """Every task in order, without Prefect; writes the report."""
    from vila_ops.report import summary

    loaded, context = load_run(recipe, resources, overrides)
    summary.check(loaded)
    outcome = run_pipeline(loaded, context=context)
    page = summary.write(loaded, outcome)
    if as_json:
        print_handle(outcome, as_json)
    else:
        say(summary.lines(page.summary))
    if outcome.version is None:
        print("nothing was registered or deployed: these resources have no tracking.uri", file=sys.stderr)
    if outcome.deployment is not None:
        print(f"served at {outcome.deployment.url} until `{context.suggest('undeploy')}`", file=sys.stderr)
    print(f"report: {page.html}", file=sys.stderr)


app.command()(plan)
app.command("import")(import_model)
app.command()(export)


@app.command()
def verify(place: Annotated[str, typer.Argument(help="A sealed folder of the store, or s3://...")]) -> None:
    """Read every byte of a sealed folder and compare it with its manifest."""
    store.verify_folder(place.rstrip("/"))
    print(f"{place} is as it was sealed")


@app.command()
def doctor(servers: Servers = LOCAL, resources: ResourcesFile = INLINE, as_json: AsJson = False) -> None:
    """Check this machine and the store of the resources; each finding says how to fix it."""
    findings = checks.examine(load_local(servers), store=load_resources(resources).storage.store)
    if as_json:
        print_handle(findings, as_json)
    else:
        for finding in findings:
            print(f"{'ok  ' if finding.ok else 'BAD '} {finding.text}")
    if not all(finding.ok for finding in findings):
        raise typer.Exit(1)


@app.command()
def up(servers: Servers = LOCAL, as_json: AsJson = False) -> None:
    """Start this machine's servers, or adopt them where they run."""
    print_handle(local.up(load_local(servers)), as_json)


@app.command()
def down(servers: Servers = LOCAL) -> None:
    """End the servers that `up` started."""
    local.down(load_local(servers))


@app.command()
def status(servers: Servers = LOCAL, as_json: AsJson = False) -> None:
    """Which of this machine's servers run."""
    found = local.status(load_local(servers))
    if as_json:
        print_handle(found, as_json)
    else:
        for one in found:
            print(f"{one.name:8} {one.state:10} {one.url}  pid {one.pid or '-'}  {one.memory_bytes >> 20} MiB")


@app.command()
def demo(recipe: RecipeFile, resources: ResourcesFile, overrides: Overrides = None, servers: Servers = LOCAL) -> None:
    """Bring the servers up and run the flow `vila` on them, with progress."""
    demonstration.demo(load_run(recipe, resources, overrides)[0], load_local(servers), say=say)


def main() -> None:
    """Entry point: an error that a user can answer is one message, not a traceback."""
    over_progress = "\r\x1b[K" if sys.stderr.isatty() else ""  # a stage's line, which is rewritten in place
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format=f"{over_progress}%(message)s")
    logging.getLogger("vila_ops").setLevel(logging.INFO)
    try:
        app()
    except ValidationError as error:
        print(f"error: {faults_of(error)}", file=sys.stderr)
        raise SystemExit(1) from error
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from error
