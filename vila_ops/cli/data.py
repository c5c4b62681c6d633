"""`vila-ops data`: raw data checked, downloaded and watched, prepared data shown."""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from vila_ops.cli.options import (
    INLINE,
    AsJson,
    JsonLines,
    MixtureName,
    Overrides,
    RecipeFile,
    ResourcesFile,
    load_run,
    print_result,
    say,
)
from vila_ops.errors import counted

data = typer.Typer(name="data", no_args_is_help=True, help="Look at data before it is prepared, and after.")


@data.command("lint")
def lint(
    uri: Annotated[str, typer.Argument(help="A file or folder of raw data")],
    kind: Annotated[str | None, typer.Option("--format", help="Its format; default: detected from its content")] = None,
    images: Annotated[str | None, typer.Option("--images", help="Folder of the images that the records name")] = None,
    own: Annotated[
        list[str] | None, typer.Option("-s", "--set", help="A setting of the source, e.g. image=file or question=q")
    ] = None,
    as_json: JsonLines = False,
) -> None:
    """List every fault of raw data with its file and line; the exit code is 1 if there is any."""
    from vila_ops.config import Resources
    from vila_ops.config.load import key_and_value
    from vila_ops.data.inspect.guess import guess
    from vila_ops.data.inspect.lint import LintFault, lines
    from vila_ops.data.inspect.lint import lint as check

    source = guess(uri, kind=kind, images=images, own=dict(map(key_and_value, own or ())))
    settings = source.model_dump(mode="json", exclude_defaults=True, exclude={"kind", "path", "licence"})
    read_as = ", ".join(f"{key}: {value}" for key, value in settings.items())
    print(f"format {source.kind}, read with {read_as}", file=sys.stderr)
    faulty = False
    for found in check(source, cache=Resources(launch="inline").storage.cache_folder()):
        print(found.model_dump_json() if as_json else lines(found), flush=True)
        faulty |= isinstance(found, LintFault)
    if faulty:
        raise typer.Exit(1)


@data.command("show")
def show(
    recipe: RecipeFile,
    mixture: MixtureName,
    out: Annotated[Path, typer.Option("--out", help="The HTML page to write")],
    per_source: Annotated[int, typer.Option("--per-source", min=1, help="Samples of each source and split")] = 5,
    resources: ResourcesFile = INLINE,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Write a page of samples as the model will see them; prepares the mixture first where needed."""
    from vila_ops.artifacts import output
    from vila_ops.data.inspect.show import show as write
    from vila_ops.data.preprocess.prepare import prepared
    from vila_ops.data.preprocess.shard_writer import tokenizer_of
    from vila_ops.pipeline import stages

    output.check_file(out, begins=output.HTML)
    run, context = load_run(recipe, resources, overrides)
    chosen, text = stages.mixture_named(run.recipe, mixture)
    dataset = prepared(chosen, text, run.resources) or stages.prepare_named(run, mixture, context)
    tokenizer = tokenizer_of(text, cache=run.resources.storage.cache_folder())
    page = write(dataset, tokenizer, out, per_source=per_source)
    print(f"page: {page}", file=sys.stderr)
    print_result(dataset, as_json)


@data.command("download")
def download(
    kind: Annotated[
        str, typer.Argument(help="Kind of the source: mmc4, coyo, interleaved, table or a plugin's", metavar="KIND")
    ],
    path: Annotated[str, typer.Argument(help="A raw file, or a folder of them")],
    out: Annotated[str, typer.Option("--out", help="Folder for a tar of images and a table for each raw file")],
    own: Annotated[
        list[str] | None, typer.Option("-s", "--set", help="A setting of the source, e.g. clean.top_share.share=0.2")
    ] = None,
    settings: Annotated[
        Path | None, typer.Option("--settings", help="A YAML file of DownloadSettings, for settings without an option")
    ] = None,
    concurrency: Annotated[int | None, typer.Option("--concurrency", help="URLs in flight, all hosts together")] = None,
    per_host_per_second: Annotated[
        float | None,
        typer.Option("--per-host-per-second", help="URLs of one host begun in a second"),
    ] = None,
    attempts: Annotated[int | None, typer.Option("--attempts", help="Attempts at one URL")] = None,
    max_bytes: Annotated[int | None, typer.Option("--max-bytes", help="Largest image, in bytes")] = None,
    retry: Annotated[
        list[str] | None,
        typer.Option("--retry", help="Retry URLs with this outcome; may be given several times", metavar="OUTCOME"),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say how many URLs would be fetched, and what they take; fetch nothing")
    ] = False,
    as_json: JsonLines = False,
) -> None:
    """Download the images that raw files name by URL, and print the outcomes.

    The same command resumes a download that was interrupted, and fetches what is new in raw files that grew. With the
    settings of the source (-s), such as its rules on scores, only images that they leave are fetched. OUTCOME is a word
    of the printed table.
    """
    from pydantic import TypeAdapter

    from vila_ops.config import Resources
    from vila_ops.config.download import DownloadSettings
    from vila_ops.config.load import key_and_value, read
    from vila_ops.data.download import Outcome, download_source, planned, summary, table, url_module
    from vila_ops.data.inspect.guess import guess
    from vila_ops.data.raw.objects import raw_path

    given = {
        "concurrency": concurrency,
        "per_host_per_second": per_host_per_second,
        "attempts": attempts,
        "max_bytes": max_bytes,
    }
    chosen = DownloadSettings.model_validate(
        (read(settings) if settings else {}) | {key: value for key, value in given.items() if value is not None}
    )
    outcomes = TypeAdapter(list[Outcome]).validate_python(retry or [])
    url_module(kind)
    source = guess(path, kind=kind, images=out, own=dict(map(key_and_value, own or ())))
    cache = Resources(launch="inline").storage.cache_folder()
    if dry_run:
        plans = planned(source, raw_path(out), settings=chosen, cache=cache, retry=outcomes)
        told, every = summary(plans, chosen), [asdict(plan) for plan in plans]
    else:
        finished = download_source(source, raw_path(out), settings=chosen, cache=cache, retry=outcomes)
        told, every = table(finished), [asdict(one) for one in finished]
    print("\n".join(map(json.dumps, every) if as_json else told))


@data.command("watch")
def watch(
    recipe: RecipeFile,
    mixture: MixtureName,
    every: Annotated[float, typer.Option("--every", min=0, help="Seconds between two checks")] = 60,
    settle: Annotated[
        float, typer.Option("--settle", min=0, help="Seconds without a change after which raw files count as complete")
    ] = 10,
    once: Annotated[bool, typer.Option("--once", help="Check once and end")] = False,
    commit: Annotated[bool, typer.Option("--commit", help="Record each revision in git")] = False,
    as_json: JsonLines = False,
) -> None:
    """Make a new revision of a mixture, DVC's stage `prepare@MIXTURE`, whenever its raw files have changed.

    Run it where dvc.yaml lies. Shards whose raw records are unchanged are reused. Files that end in .part, .tmp,
    .partial or .crdownload are ignored: copy under such a name, then rename.
    """
    from vila_ops.data import revisions
    from vila_ops.pipeline import stages

    chosen, _ = stages.mixture_named(load_run(recipe, INLINE, None)[0].recipe, mixture)
    looks = revisions.watch(chosen, folder=Path.cwd(), every_seconds=every, settle_seconds=settle, commit=commit)
    for revision in looks:
        if revision is not None:
            numbers = f"{counted(revision.num_samples, 'sample')}, {counted(revision.num_tokens, 'token')}"
            line = f"{revision.stage}: {numbers}, data {revision.digest[:12]}"
            say(revision.model_dump_json() if as_json else line)
        elif once:
            print("nothing has changed", file=sys.stderr)
        if once:
            break


@data.command("quarantine")
def quarantine(
    recipe: RecipeFile,
    mixture: Annotated[str | None, typer.Option("--mixture", help="Its name; not needed with --from")] = None,
    samples: Annotated[
        list[str] | None, typer.Option("--sample", help="Key of a sample; may be given several times", metavar="KEY")
    ] = None,
    stopped_file: Annotated[Path | None, typer.Option("--from", help="File that a stopped stage wrote")] = None,
    resources: ResourcesFile = INLINE,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Make a new revision of a mixture without the records of some samples.

    Their ids go into quarantine/MIXTURE.yaml beside the file that describes the mixture, which names it from then on.
    No shard is rebuilt, and every other sample stays as it is.
    """
    from vila_ops.pipeline.quarantine import leave_out
    from vila_ops.train.job import BadSampleReport

    stopped = BadSampleReport.read(stopped_file) if stopped_file else None
    name = stopped.mixture if stopped and mixture is None else mixture
    if name is None or not (samples or stopped):
        raise ValueError("say which samples: --from FILE of a stage that stopped, or --mixture NAME and --sample KEY")
    if stopped and stopped.mixture != name:
        raise ValueError(f"{stopped_file} is of mixture {stopped.mixture!r}, not {name!r}")
    records: dict[str, list[str]] = {}
    for one in stopped.samples if stopped else ():
        records.setdefault(one.source, []).append(one.id)
    made = leave_out(recipe, name, records, keys=samples or [], load=lambda: load_run(recipe, resources, overrides)[0])
    print_result(made.data if as_json else made, as_json)
    for source, ids in made.already.items():
        print(f"{name}: already quarantined: {source} {', '.join(ids)}", file=sys.stderr)
    if made.files and not as_json:
        gone = counted(made.before.num_samples - made.data.num_samples, "sample")
        print(
            f"{name}: {gone} fewer, data {made.before.digest[:12]} -> {made.data.digest[:12]}; the same "
            f"command as before trains on it. To keep it: `dvc repro prepare@{name}` where DVC versions it, then "
            f"`git add {' '.join(made.files)}` and commit",
            file=sys.stderr,
        )


@data.command("remove")
def remove(
    recipe: RecipeFile,
    mixture: MixtureName,
    ids: Annotated[
        list[str] | None, typer.Option("--id", help="Id of a record; may be given several times", metavar="ID")
    ] = None,
    sources: Annotated[list[str] | None, typer.Option("--source", help="A whole source", metavar="NAME")] = None,
    licences: Annotated[
        list[str] | None, typer.Option("--licence", help="All records of a licence", metavar="LICENCE")
    ] = None,
    resources: ResourcesFile = INLINE,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Take records down: make a new revision of a mixture without them, and list what holds them.

    The removals go into quarantine/MIXTURE.removed.yaml beside the file that describes the mixture, which names it from
    then on. The shards of their sources are rebuilt without them. What was made before is not changed.
    """
    from vila_ops.lineage.holders import holders
    from vila_ops.pipeline.takedown import TakedownRequest, take_down

    asked = TakedownRequest(ids=tuple(ids or ()), sources=tuple(sources or ()), licences=tuple(licences or ()))
    made = take_down(recipe, mixture, asked, load=lambda: load_run(recipe, resources, overrides)[0])
    root = load_run(recipe, resources, overrides)[0].resources.storage.store
    holding = holders(made.removed, made.before, root=root)
    if as_json:
        say(json.dumps({**made.model_dump(mode="json"), "holders": [one.model_dump(mode="json") for one in holding]}))
        return
    say(f"{mixture}: data {made.before.digest[:12]} -> {made.data.digest[:12]}, {_removed(made.removed)}")
    for one in holding:
        count = f", {counted(one.samples, 'sample')} of it" if one.samples else ""
        versions = "".join(f" = {version}" for version in one.node.versions)
        say(f"held by {one.node.kind} {one.node.name} {one.node.digest[:12]}{versions}{count}")
    if holding:
        way = "train again from the new revision, then free what is held with `vila-ops gc --keep RECIPE --delete`"
        files = f"; in git: {' '.join(made.files)}" if made.files else ""
        print(f"{way}{files}", file=sys.stderr)


def _removed(removed: Mapping[str, Sequence[str]]) -> str:
    return "without " + "; ".join(f"{source}: {', '.join(removals)}" for source, removals in removed.items())
