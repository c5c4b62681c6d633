"""`vila-ops compare`: two or more evaluated models on the same items."""

import string
import sys
from pathlib import Path
from typing import Annotated

import typer

from vila_ops.cli.options import INLINE, AsJson, ResourcesFile, print_result, say

Shown = Annotated[int, typer.Option("--disagreements", min=0, help="Items to print of each metric")]


def compare(
    references: Annotated[
        list[str],
        typer.Argument(
            help="A report, a recipe (its last report), models:/NAME/VERSION, NAME@ALIAS or an MLflow run; the "
            "first is the baseline",
            metavar="A B [C ...]",
        ),
    ],
    metrics: Annotated[
        list[str] | None,
        typer.Option("--metric", help="A metric of the reports; without it all but corrected ones"),
    ] = None,
    slices: Annotated[bool, typer.Option("--slices", help="Print the slices of each metric, too")] = False,
    disagreements: Shown = 0,
    out: Annotated[Path | None, typer.Option("--out", help="The HTML page to write")] = None,
    resources: ResourcesFile = INLINE,
    as_json: AsJson = False,
) -> None:
    """Compare models item by item: differences with intervals, tests, and what the items can show.

    Nothing is measured: evaluate the models first.
    """
    from vila_ops.artifacts import output
    from vila_ops.cli.comparison import lines
    from vila_ops.eval.compare_reports import compare_reports
    from vila_ops.pipeline.reports import report_named

    if len(references) < 2:
        raise ValueError(f"only {references[0]} is given; a comparison needs a second model")
    if twice := next((one for one in references if references.count(one) > 1), None):
        raise ValueError(f"{twice} is given twice; give each model once")
    if len(references) > len(string.ascii_uppercase):
        raise ValueError(f"{len(references)} models are given; at most {len(string.ascii_uppercase)} have a letter")
    if out is not None:
        output.check_file(out, begins=output.HTML)
    reports = {reference: report_named(reference, resources) for reference in references}
    compared = compare_reports(reports, metrics=tuple(metrics or ()))
    if out is not None:
        from vila_ops.report import comparison  # heavy: Pillow

        page = comparison.render(compared, comparison.images_of(compared))
        output.write_file(out, page, begins=output.HTML)
    if as_json:
        print_result(compared, as_json)
        return
    say("\n".join(lines(compared, slices=slices, disagreements=disagreements)))
    if not slices and (count := len({name for one in compared.comparison.metrics for name in one.slices})):
        print(f"{count} slices are not shown: --slices prints them", file=sys.stderr)
