"""Writes the table of docs/licences.md, the licence of each Python package of the images: `make licences`."""

import re
import tomllib
from collections.abc import Iterator
from importlib.metadata import distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PAGE = Path(__file__).with_name("licences.md")
START, END = "<!-- made by docs/licences.py -->", "<!-- end -->"
READ = {"huey": "MIT", "skops": "MIT"}
"""Licences of packages whose metadata do not name them, read in their files."""
SERVERS = {
    **dict.fromkeys(("flask-wtf", "wtforms"), "BSD-3-Clause"),
    **dict.fromkeys(("psycopg", "psycopg-binary"), "LGPL-3.0-only"),
}
"""What the extra `servers` adds, which is not installed where this runs, by the files of these packages."""


def closure() -> list[str]:
    """Every package that the image installs, by its normalised name."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    waiting = [Requirement(one) for one in project["dependencies"]]
    names: set[tuple[str, frozenset[str]]] = set()
    while waiting:
        wanted = waiting.pop()
        key = canonicalize_name(wanted.name), frozenset(wanted.extras)
        if key not in names:
            names.add(key)
            waiting += needed(wanted)
    return sorted({name for name, _ in names} | SERVERS.keys())


def needed(wanted: Requirement) -> Iterator[Requirement]:
    """What a package with its extras needs on this platform."""
    for one in map(Requirement, distribution(wanted.name).requires or ()):
        if one.marker is None or any(one.marker.evaluate({"extra": extra}) for extra in ("", *wanted.extras)):
            yield one


def licence_of(name: str) -> str:
    """The licence of a package in its own words. Raises ValueError where it names none and READ has none."""
    if known := {**READ, **SERVERS}.get(name):
        return known
    metadata = distribution(name).metadata
    kinds = [one.rpartition(" :: ")[2] for one in metadata.get_all("Classifier", ()) if one.startswith("License :: ")]
    text = " ".join((metadata.get("License") or "").split())
    for said in (metadata.get("License-Expression"), text if len(text) < 60 else None, ", ".join(kinds)):
        if said and said not in ("UNKNOWN", "OSI Approved", "Dual License"):
            return str(said).replace("|", "or")
    raise ValueError(f"{name} does not name its licence; read it and add it to READ")


def table() -> str:
    pins = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if re.match(r"[a-z0-9]", line)
    )
    rows = [f"| {name} | {pins[name]} | {licence_of(name)} |" for name in closure()]
    return "\n".join(["| package | version | licence |", "|---|---|---|", *rows])


def page() -> str:
    """The page with the present table."""
    before, _, rest = PAGE.read_text().partition(START)
    return f"{before}{START}\n{table()}\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    PAGE.write_text(page())
