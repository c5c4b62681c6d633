"""`vila-ops benchmark`: the official files of benchmarks, where they come from and what is wrong with them."""

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vila_ops.cli.options import JsonLines, say

if TYPE_CHECKING:
    from vila_ops.eval.downloads import PlannedFile

benchmark = typer.Typer(name="benchmark", no_args_is_help=True, help="The official files of benchmarks.")

Settings = Annotated[
    list[str] | None, typer.Option("-s", "--set", help="A setting of the benchmark, e.g. split=test-dev2015")
]
FILES = Path("data/benchmarks")


@benchmark.command("list")
def list_files(as_json: JsonLines = False) -> None:
    """Say where the official files of each benchmark come from, their size and licence, and whether a server lives."""
    from vila_ops.eval.origins import official_kinds, origins_of

    for kind in official_kinds():
        origins = origins_of(kind)
        if as_json:
            about = {"benchmark": kind, "server": origins.server, "revision": origins.revision}
            for file in origins.files:
                say(json.dumps({**about, **asdict(file)}))
            continue
        say(f"{kind}\n  server: {origins.server}")
        if any(file.hub for file in origins.files):
            say(f"  commit on the hub: {origins.revision or 'not known; `benchmark get` needs --revision'}")
        for file in origins.files:
            only = "".join(f", {name}={value}" for name, value in file.only.items())
            only += ", for demonstrations" if file.is_train else ""
            facts = f"{_stated('size', file.size)}, {_stated('licence', file.licence)}{only}"
            say(f"  {file.path}\n    {facts}\n    {file.url}")


def _stated(name: str, value: str) -> str:
    return value.replace("?", f"{name} not stated", 1) if value.startswith("?") else value


@benchmark.command("check")
def check_files(
    folder: Annotated[Path, typer.Argument(help="The folder that has one of each benchmark", metavar="DIR")] = FILES,
    only: Annotated[str | None, typer.Option("--only", help="One benchmark", metavar="KIND")] = None,
    settings: Settings = None,
    as_json: JsonLines = False,
) -> None:
    """Say which official files are missing, of another version or damaged; the exit code is 1 if there are any.

    Every file is read. Settings need --only.
    """
    from vila_ops.config.load import key_and_value
    from vila_ops.eval.origins import check, default_config, official_kinds

    if settings and only is None:
        raise ValueError("settings are of one benchmark; name it with --only")
    kinds = [only] if only else [kind for kind in official_kinds() if (folder / kind).is_dir()]
    if not kinds:
        raise ValueError(f"{folder} has no folder of a benchmark; these are known: {', '.join(official_kinds())}")
    faulty = False
    for kind in kinds:
        config = default_config(kind, dict(map(key_and_value, settings or ())))
        findings = list(check(folder / kind, config))
        faulty |= bool(findings)
        for one in findings:
            say(json.dumps({"benchmark": kind, **asdict(one)}) if as_json else f"{kind}: {one.file}: {one.problem}")
        if not findings and not as_json:
            say(f"{kind}: no fault")
    if faulty:
        raise typer.Exit(1)


@benchmark.command("get")
def get_files(
    kind: Annotated[str, typer.Argument(help="The benchmark", metavar="KIND")],
    out: Annotated[Path, typer.Option("--out", help="The folder that has one of each benchmark")] = FILES,
    repository: Annotated[
        str | None,
        typer.Option("--repo", help="A data set on the hub with the files under their official paths, OWNER/NAME"),
    ] = None,
    revision: Annotated[
        str | None,
        typer.Option("--revision", help="A commit, tag or branch of it; needed where `list` states no commit"),
    ] = None,
    settings: Settings = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List what would be fetched, with sizes, and what is here; fetch nothing")
    ] = False,
    as_json: JsonLines = False,
) -> None:
    """Fetch the official files of a benchmark from the hub, by default from a data set of its authors if they have one.

    Without --revision it is the commit that `vila-ops benchmark list` states. A file that is there as it was fetched is
    not fetched again, and one with another content is not replaced. `vila-ops benchmark check` compares each file with
    its recorded sha256.
    """
    from vila_ops.config.load import key_and_value
    from vila_ops.eval.downloads import from_hub, planned
    from vila_ops.eval.origins import default_config, origins_of

    config = default_config(kind, dict(map(key_and_value, settings or ())))
    origins = origins_of(kind)
    files = [file for file in origins.files if file.is_read(config)]
    revision = revision or (origins.revision if repository is None else None)
    if dry_run:
        plans = planned(out / kind, files, repository=repository, revision=revision)
        if as_json:
            for one in plans:
                say(json.dumps({"benchmark": kind, **asdict(one)}))
        else:
            say("\n".join(_planned_lines(kind, plans)))
        return
    for name in from_hub(out / kind, files, repository=repository, revision=revision):
        place = str(out / kind / name)
        say(json.dumps({"benchmark": kind, "file": place}) if as_json else place)


def _planned_lines(kind: str, plans: "list[PlannedFile]") -> Iterator[str]:
    """What would be fetched, a file at a time."""
    yield f"{kind}, from data set {plans[0].repository} at {plans[0].revision}"
    for one in plans:
        inside = f" for {one.download}" if one.download != one.file and not one.by_hand else ""
        state = "here" if one.here else "by hand" if one.by_hand else "to fetch"
        yield f"  {one.file}\n    {_stated('size', one.size)}{inside}, {state}"
        if one.by_hand and not one.here:
            yield f"    {one.download}"
