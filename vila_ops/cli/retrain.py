"""`vila-ops retrain`: whether a champion is trained on, by the rules of a policy, and doing so."""

from pathlib import Path
from typing import Annotated

import typer

from vila_ops.cli.options import (
    INLINE,
    AsJson,
    Overrides,
    RecipeFile,
    ResourcesFile,
    load_run,
    names_in,
    print_result,
    say,
)

PolicyFile = Annotated[
    Path,
    typer.Option("-p", "--policy", help="A name in configs/retrain, or a file", autocompletion=names_in("retrain")),
]


def retrain(
    recipe: RecipeFile,
    policy: PolicyFile,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the decision; seal and train nothing")] = False,
    decide_only: Annotated[bool, typer.Option("--decide", help="Seal the decision, and train nothing")] = False,
    resources: ResourcesFile = INLINE,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Decide whether the champion is trained on, do it, and print the last decision with its numbers."""
    from vila_ops.config.load import load_policy
    from vila_ops.pipeline.retrain import Retraining, look, step
    from vila_ops.retrain.decisions import page

    run, context = load_run(recipe, resources, overrides)
    rules = load_policy(policy)
    if dry_run or decide_only:
        record = look(run, rules, trigger="command", dry_run=dry_run, context=context)
    else:
        record = step(Retraining(run, rules, "command", context=context))
    if as_json:
        print_result(record, as_json)
    else:
        say(page(record).rstrip())
