"""The tasks of a recipe as commands, and all of them in order."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from vila_ops.artifacts.kinds import EvalReport
from vila_ops.cli.explain import print_steps
from vila_ops.cli.options import (
    INLINE,
    AsJson,
    DryRun,
    MixtureName,
    Overrides,
    RecipeFile,
    ResourcesFile,
    as_yaml,
    load_run,
    names_in,
    print_result,
    say,
)
from vila_ops.cli.tables import table


def show(
    recipe: RecipeFile,
    resources: ResourcesFile = INLINE,
    overrides: Overrides = None,
    full: Annotated[bool, typer.Option("--full", help="Print every setting as YAML, too")] = False,
    as_json: AsJson = False,
) -> None:
    """Print a run's fingerprint and what each stage trains, after its static checks; do nothing."""
    from vila_ops.cli.show import summary

    run, _ = load_run(recipe, resources, overrides)
    if as_json:
        print_result(run, as_json)
        print(f"fingerprint {run.recipe.fingerprint()}", file=sys.stderr)
        return
    say("\n".join(summary(run)))
    if full:
        say(f"\n{as_yaml(run.model_dump(mode='json'))}")


def fetch(
    recipe: RecipeFile,
    resources: ResourcesFile = INLINE,
    overrides: Overrides = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List what would be fetched, and what is here; fetch nothing")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Fetch every package that a recipe names, and assemble the untrained model."""
    from vila_ops.pipeline import stages

    run, context = load_run(recipe, resources, overrides)
    if not dry_run:
        print_result(stages.fetch(run, context), as_json)
        return
    parts = stages.to_fetch(run)
    if as_json:
        print_result(parts, as_json)
    elif parts:
        rows = [(one.place, one.name, one.version, "here" if one.cached else "to fetch") for one in parts]
        say("\n".join(table([("place", "name", "version", "state"), *rows])))


def prepare(
    recipe: RecipeFile,
    mixture: MixtureName,
    resources: ResourcesFile = INLINE,
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option("--out", help="Copy the dataset here too, for DVC")] = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Prepare one mixture."""
    from vila_ops.data.raw.objects import raw_path
    from vila_ops.data.revisions import check_export, export_for_dvc, raw_roots
    from vila_ops.pipeline import explain as explaining
    from vila_ops.pipeline import stages

    run, context = load_run(recipe, resources, overrides)
    if dry_run:
        print_steps(explaining.explain_prepare(run, mixture), as_json)
        return
    if out is not None:
        raw = [raw_path(root) for root in raw_roots(stages.mixture_named(run.recipe, mixture)[0])]
        check_export(out, apart=run.resources.storage.folders(), outside=raw)
    dataset = stages.prepare_named(run, mixture, context)
    if out is not None:
        export_for_dvc(dataset, out)
    print_result(dataset, as_json)


def evaluate(
    recipe: Annotated[
        Path,
        typer.Argument(
            help="A name in configs/recipes, or a file; with --endpoint, a suite", autocompletion=names_in("recipes")
        ),
    ],
    stage: Annotated[str, typer.Option("--stage", help="Name of a stage, or `base` for the untrained model")] = "",
    endpoint: Annotated[str, typer.Option("--endpoint", help="NAME@URL of a model behind an OpenAI API")] = "",
    final: Annotated[bool, typer.Option("--final", help="The final suite instead of the stage suite")] = False,
    suite: Annotated[
        Path | None,
        typer.Option("--suite", help="A name in configs/suites, or a file, instead", autocompletion=names_in("suites")),
    ] = None,
    rescore: Annotated[bool, typer.Option("--rescore", help="Score the sealed answers again, without a model")] = False,
    every: Annotated[
        int | None, typer.Option("--every", min=1, help="While another process trains the stage, after so many steps")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="The HTML page to write")] = None,
    dry_run: DryRun = False,
    resources: ResourcesFile = INLINE,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Evaluate the model after a stage, or behind an endpoint; prints its scores with 95 % intervals."""
    from vila_ops.artifacts import output
    from vila_ops.config import NO_CONTEXT, load_resources, load_suite
    from vila_ops.pipeline import explain as explaining
    from vila_ops.pipeline import stages

    of_a_stage = final or suite or every or dry_run
    if bool(stage) == bool(endpoint) or (final and suite is not None) or (endpoint and of_a_stage):
        raise ValueError(
            "give --stage with a recipe, and --final or --suite if the stage suite is not meant; or --endpoint with a "
            "file of official benchmarks in place of the recipe, and none of these, --every and --dry-run"
        )
    if dry_run and (suite is not None or rescore or every is not None or out is not None):
        raise ValueError("--dry-run tells of the recipe's own suites; leave out --suite, --rescore, --every and --out")
    if every is not None and (rescore or out):
        raise ValueError(
            "--every waits for models, --rescore scores what is sealed, and --out writes one page; give --every alone"
        )
    if out is not None:
        output.check_file(out, begins=output.HTML)
    if endpoint:
        name, _, url = endpoint.partition("@")
        loaded = load_resources(resources, overrides=tuple(overrides or ()))
        job, context = stages.job_of_endpoint(load_suite(recipe), name, url, loaded), NO_CONTEXT
    else:
        run, context = load_run(recipe, resources, overrides)
        own = run.recipe.final_suite if final else run.recipe.stage_suite
        if dry_run:
            print_steps(explaining.explain_evaluate(run, stage, own), as_json)
            return
        chosen = own if suite is None else load_suite(suite)
        if every is not None:
            for step, report in stages.evaluate_in_training(run, stage, chosen, every=every, context=context):
                print(f"{stage} after step {step}", file=sys.stderr)
                _print_report(report, as_json)
            return
        job = stages.job_of_stage(run, stage, chosen, context)
    report = stages.evaluate_job(job, again=rescore, context=context)
    if out is not None:
        from vila_ops.report import evaluation  # heavy: Pillow

        output.write_file(out, evaluation.render(evaluation.gather(job, report)), begins=output.HTML)
    _print_report(report, as_json)


def _print_report(report: EvalReport, as_json: bool) -> None:
    from vila_ops.cli.scores import scores
    from vila_ops.eval.report import read_report

    if as_json:
        print_result(report, as_json)
    else:
        say("\n".join(scores(read_report(report))))
        print(f"report: {report.uri}", file=sys.stderr)


def alignment(
    recipe: RecipeFile,
    out: Annotated[Path, typer.Option("--out", help="The SVG to write")],
    resources: ResourcesFile = INLINE,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Draw how similar images and captions are in each layer, for the base and the model after every stage."""
    from vila_ops.report.summary import draw_layers

    run, context = load_run(recipe, resources, overrides)
    shown = draw_layers(run, out, context)
    say(json.dumps(shown) if as_json else f"{out}: {len(shown['layers'])} points")


def register(
    recipe: RecipeFile, resources: ResourcesFile = INLINE, overrides: Overrides = None, as_json: AsJson = False
) -> None:
    """Register the last stage's model and let the gate judge it."""
    from vila_ops.pipeline import promotion

    print_result(promotion.register_last(*load_run(recipe, resources, overrides)), as_json)


def deploy(
    recipe: RecipeFile,
    resources: ResourcesFile = INLINE,
    overrides: Overrides = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say which tasks would work, and what is served now; change nothing")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Serve the model of a recipe, or the champion where the gate refused it."""
    from vila_ops.pipeline import promotion
    from vila_ops.pipeline.explain_deploy import explain_deploy

    run, context = load_run(recipe, resources, overrides)
    if dry_run:
        print_steps(explain_deploy(run), as_json)
    else:
        print_result(promotion.deploy_champion(run, context), as_json)


def undeploy(recipe: RecipeFile, resources: ResourcesFile = INLINE, overrides: Overrides = None) -> None:
    """End what serves a recipe's service."""
    from vila_ops.serve import deploy as serving

    loaded, _ = load_run(recipe, resources, overrides)
    serving.undeploy(loaded.recipe.service, loaded.resources)


def run(
    recipe: RecipeFile,
    resources: ResourcesFile = INLINE,
    overrides: Overrides = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Run every task in order, without Prefect, and write the report."""
    from vila_ops.cli.scores import scores
    from vila_ops.eval.report import read_report
    from vila_ops.pipeline import explain as explaining
    from vila_ops.pipeline.run import run_pipeline
    from vila_ops.report import summary

    loaded, context = load_run(recipe, resources, overrides)
    if dry_run:
        print_steps(explaining.explain(loaded), as_json)
        return
    summary.check(loaded)
    outcome = run_pipeline(loaded, context=context)
    page = summary.write(loaded, outcome, summary.gather(loaded, outcome))
    if as_json:
        print_result(outcome, as_json)
    else:
        say("\n".join(scores(read_report(outcome.report))))
    if outcome.version is None:
        print("nothing was registered or deployed: these resources have no tracking.uri", file=sys.stderr)
    if outcome.deployment is not None:
        print(f"served at {outcome.deployment.url} until `{context.suggest('undeploy')}`", file=sys.stderr)
    print(f"report: {page.html}", file=sys.stderr)


def verify(
    place: Annotated[str, typer.Argument(help="A sealed folder of the store, or s3://...")], as_json: AsJson = False
) -> None:
    """Read every byte of a sealed folder and compare it with its manifest."""
    from vila_ops.artifacts import store

    store.verify_folder(place.rstrip("/"))
    digest = store.read_manifest(place.rstrip("/"))["digest"]
    say(json.dumps({"uri": place, "digest": digest}) if as_json else f"{place} is as it was sealed")
