"""`vila-ops train`: train a recipe up to a stage, and prove that it resumes exactly."""

import random
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from vila_ops.cli.explain import print_steps
from vila_ops.cli.options import (
    INLINE,
    AsJson,
    DryRun,
    Overrides,
    RecipeFile,
    ResourcesFile,
    StageName,
    load_run,
    print_result,
    say,
)


class _RecipeOrCommand(TyperGroup):
    """`train RECIPE ...` is `train stage RECIPE ...`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """The command's name first, also where only its arguments were given."""
        named = not args or args[0] in self.commands or args[0] in ctx.help_option_names
        return super().parse_args(ctx, args if named else ["stage", *args])


train = typer.Typer(
    name="train",
    cls=_RecipeOrCommand,
    no_args_is_help=True,
    help="Train a recipe up to a stage: `vila-ops train RECIPE --stage NAME`, which is `train stage`; see its --help.",
)


@train.command("stage")
def up_to(
    recipe: RecipeFile,
    stage: StageName,
    profile: Annotated[
        int, typer.Option("--profile", min=0, help="Optimizer steps to profile; their trace and table are logged")
    ] = 0,
    resources: ResourcesFile = INLINE,
    overrides: Overrides = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Train up to a stage; finished stages are reused."""
    from vila_ops.pipeline import explain as explaining
    from vila_ops.pipeline import stages

    asked = [f"resources.train.profile_steps={profile}"] if profile else []
    run, context = load_run(recipe, resources, [*(overrides or []), *asked])
    if dry_run:
        print_steps(explaining.explain_train(run, stage), as_json)
    else:
        print_result(stages.model_after(run, stage, context), as_json)


@train.command("verify-resume")
def verify_resume(
    recipe: RecipeFile,
    kills: Annotated[int, typer.Option("--kills", min=1, help="How often the stage is killed")] = 20,
    stage: Annotated[str | None, typer.Option("--stage", help="Name of a stage; else the first")] = None,
    steps: Annotated[int, typer.Option("--steps", min=2, help="Optimizer steps of the stage during the proof")] = 60,
    resources: ResourcesFile = INLINE,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Prove on your recipe and resources that a stage resumes exactly after SIGKILL.

    A variant of the stage, with --steps steps and frequent saves, is trained once without a kill and then with SIGKILL
    at random moments. The loss curve, the samples of each step and the bytes of the model are compared each time the
    stage ends. The kill hits the process group that drives the stage: with launch inline that is the training itself,
    with Ray the cluster then ends the ranks. The store only gains what the stage needs and lacks (data, earlier
    stages); the trials lie in STORE/verify-resume and are removed. The exit code is 1 if anything differs.
    """
    from vila_ops.pipeline import stages

    run, context = load_run(recipe, resources, overrides)
    chosen = stage or next(iter(run.recipe.stages), "")
    data, init = stages.inputs_of(run, chosen, context)
    from vila_ops.train import verify_resume as proof  # heavy: torch, which no error about arguments waits for

    trial = proof.ResumeTrial(
        stage=proof.shortened(run.recipe.stages[chosen], steps=steps),
        model=run.recipe.model_of(chosen),
        data=data,
        init=init,
        resources=run.resources,
    )
    variant = proof.describe_changes(run.recipe.stages[chosen], trial.stage)
    saves = f"a checkpoint every {trial.stage.save_every} steps, nothing logged to MLflow"
    print(f"stage {chosen} of {run.recipe.name}, with {variant}; {saves}", file=sys.stderr)
    verdict = proof.verify_resume(
        trial, kills=kills, report=lambda line: print(line, file=sys.stderr, flush=True), draw=random.Random()
    )
    if as_json:
        print_result(verdict, as_json)
    else:
        say("\n".join(proof.summary(verdict)))
    if verdict.compared_steps and not verdict.resumed:
        print("no kill came after the first checkpoint; use more --kills or --steps", file=sys.stderr)
    if verdict.differences:
        raise typer.Exit(1)
