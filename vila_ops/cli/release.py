"""Changes of a service: a canary, its promotion, and the way back."""

from typing import Annotated

import typer

from vila_ops.cli.options import INLINE, AsJson, Overrides, RecipeFile, ResourcesFile, load_run, print_result


def canary(
    recipe: RecipeFile,
    version: Annotated[
        str, typer.Option("--version", help="Number of a registered version, or its alias")
    ] = "champion",
    share: Annotated[float | None, typer.Option("--share", help="Share of the conversations")] = None,
    resources: ResourcesFile = INLINE,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Let a registered version answer a share of the conversations; it is taken back by itself if it is worse."""
    from vila_ops.registry.register import version_named
    from vila_ops.release.canary import start_canary

    run, _ = load_run(recipe, resources, overrides)
    chosen = run.resources if share is None else run.resources.with_changes({"serve.canary.share": share})
    named = version_named(run.recipe.gate.model_name, version, chosen)
    print_result(start_canary(run.recipe.service, named, chosen), as_json)


def promote(
    recipe: RecipeFile, resources: ResourcesFile = INLINE, overrides: Overrides = None, as_json: AsJson = False
) -> None:
    """Let the canary answer everything, and make it the champion."""
    from vila_ops.release import canary as release

    run, _ = load_run(recipe, resources, overrides)
    served = release.promote(run.recipe.service, run.resources)
    release.as_champion(run.recipe.gate, served, run.resources)
    print_result(served, as_json)


def rollback(
    recipe: RecipeFile, resources: ResourcesFile = INLINE, overrides: Overrides = None, as_json: AsJson = False
) -> None:
    """End the canary; without one, serve the former version again."""
    from vila_ops.release import canary as release

    run, _ = load_run(recipe, resources, overrides)
    print_result(release.roll_back(run.recipe.service, run.resources), as_json)


COMMANDS = (canary, promote, rollback)
