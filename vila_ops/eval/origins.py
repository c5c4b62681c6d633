"""Where the official files of a benchmark come from, and what is wrong with those in a folder.

Each module of a benchmark on official files has `ORIGINS`. Sizes are those of the downloads, and about right: no
publisher states them as bytes. What a folder holds is checked by reading it, as an evaluation does.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, cast, get_args

from pydantic import Field, TypeAdapter

from vila_ops.artifacts.disk import sha256
from vila_ops.config.benchmarks import Official, OfficialBenchmark, PromptTemplate
from vila_ops.eval.benchmark import benchmark_of

DOWNLOADED = ".downloaded.json"
"""What `vila-ops benchmark get` left in a folder: repository, commit, and sha256 of each file."""
NAMES_AT_ONCE = 3
"""Images that a finding names."""


@dataclass(frozen=True)
class OfficialFile:
    """A file that `read` opens, or many with one pattern."""

    path: str
    """In the benchmark's folder; `*` stands for many files of one download, such as images."""
    url: str
    """Where it is published, or the archive that has it."""
    size: str
    """Of the download, such as `6 GB`; `?` where nobody states it."""
    licence: str
    """`?` where nobody states it."""
    items: int | None = None
    """Number of items in its official version; None where it is not the file of items."""
    only: Mapping[str, str] = field(default_factory=dict)
    """Settings of the config under which it is read, such as {"split": "val2014"}, or its kind."""
    hub: str = ""
    """OWNER/NAME/PATH of the file, or of a zip with it, in a data set of its authors on the hub; empty: in none.

    ZIP!FOLDER: all of the zip is in that folder, which is left out.
    """

    is_train: bool = False
    """Whether it is of the train split, which demonstrations are taken from."""

    def is_read(self, config: OfficialBenchmark) -> bool:
        """Whether a config reads it for its items."""
        return not self.is_train and all(getattr(config, name) == value for name, value in self.only.items())


@dataclass(frozen=True)
class Origins:
    """The files of a benchmark and the server that scores them."""

    files: tuple[OfficialFile, ...]
    server: str
    """Whether a server scores uploads, and whether it still lives."""
    revision: str | None = None
    """Commit of the authors' data set on the hub that has these files; None: not known to us."""


@dataclass(frozen=True)
class FileProblem:
    """Something that is wrong with the files of a benchmark."""

    file: str
    """Its path in the benchmark's folder, or the folder's name."""
    problem: str
    """missing, another version, damaged, or changed since it was downloaded; with the way out."""


def official_kinds() -> list[str]:
    """The kinds of our benchmarks that read official files, by name."""
    return sorted(config.model_fields["kind"].default for config in get_args(Official))


def origins_of(kind: str) -> Origins:
    """Where the files of a kind of benchmark come from. Raises ValueError for one that reads none."""
    if kind not in official_kinds():
        raise ValueError(f"no benchmark {kind!r} reads official files; these do: {', '.join(official_kinds())}")
    origins = cast("Origins", benchmark_of(kind).ORIGINS)  # type: ignore[attr-defined]  # held-out benchmarks have none
    return replace(origins, files=tuple(file for file in origins.files if file.only.get("kind", kind) == kind))


def check(folder: Path, config: OfficialBenchmark) -> Iterator[FileProblem]:
    """What is missing, of another version or damaged among the files of a benchmark. Reads every file."""
    kind: str = config.kind  # type: ignore[attr-defined]
    files = [file for file in origins_of(kind).files if file.is_read(config)]
    missing = [file for file in files if next(folder.glob(file.path), None) is None]
    for file in missing:
        yield FileProblem(file.path, f"missing; it is in {file.url}")
    yield from _changed(folder)
    if all("*" in file.path for file in missing):
        yield from _content(folder, config, [file for file in files if file.items is not None])


def _changed(folder: Path) -> Iterator[FileProblem]:
    """Files that are not as they were downloaded."""
    listing = folder / DOWNLOADED
    if not listing.is_file():
        return
    content = json.loads(listing.read_text(encoding="utf-8"))
    origin = f"{content['repository']} at {content['commit']}"
    for name, digest in content["sha256"].items():
        if not (folder / name).is_file():
            yield FileProblem(name, f"missing since it was downloaded from {origin}; get it again")
        elif sha256(folder / name) != digest:
            yield FileProblem(name, f"changed since it was downloaded from {origin}; move it away and get it again")


def _content(folder: Path, config: OfficialBenchmark, files: list[OfficialFile]) -> Iterator[FileProblem]:
    """What reading the files tells: faults, another number of items, and images that cannot be read."""
    kind: str = config.kind  # type: ignore[attr-defined]
    number, problems = 0, list[str]()
    try:
        for item in benchmark_of(kind).read(folder, config):
            number += 1
            problems += [problem] if (problem := item.problem()) else []
    except ValueError as error:
        yield FileProblem(folder.name, str(error))
        return
    for file in files:
        if file.items != number:
            yield FileProblem(file.path, f"another version: {number:,} items, and the official one has {file.items:,}")
    if problems:
        named = ", ".join(dict.fromkeys(problems[:NAMES_AT_ONCE]))
        yield FileProblem(folder.name, f"{len(problems):,} of {number:,} items have no image that can be read: {named}")


def default_config(kind: str, settings: Mapping[str, Any]) -> OfficialBenchmark:
    """A config of a kind for reading its files alone, whatever the prompts. Raises ValueError."""
    origins_of(kind)
    (of_kind,) = (config for config in get_args(Official) if config.model_fields["kind"].default == kind)
    prompt = {"user": "{image}", "answer": {"kind": "generate", "max_new_tokens": 1}}
    prompts = {name: prompt for name, field in of_kind.model_fields.items() if field.annotation is PromptTemplate}
    adapter: TypeAdapter[OfficialBenchmark] = TypeAdapter(Annotated[Official, Field(discriminator="kind")])
    return adapter.validate_python({**prompts, **settings, "kind": kind})
