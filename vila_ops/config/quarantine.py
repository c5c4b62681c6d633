"""The quarantine of a mixture as a file: records are added to it, and the mixture is made to name it."""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from vila_ops.config.load import BASES, Loader, read, resolve

HEAD = """\
# Records that `prepare` leaves out of mixture {mixture}, by source. `vila-ops data quarantine` adds to them;
# take a line out to have its record back.
"""


class YamlSpan(NamedTuple):
    """Where a file describes a mixture."""

    path: Path
    start: int
    """Of its key `name`, in characters."""
    column: int
    flow: bool
    """Whether it is written in braces."""
    names_quarantine: bool


def add(recipe: Path, mixture: str, records: Mapping[str, Sequence[str]]) -> dict[Path, str | None]:
    """Add record ids by source to the quarantine of a mixture of a recipe; what the changed files held before.

    The ids stand in `quarantine/MIXTURE.yaml` beside the file that describes the mixture, which gets one line that
    names it; nothing else of that file changes, comments included. Raises ValueError where no file describes it.
    """
    places = list(dict.fromkeys(_places(recipe.resolve(), mixture)))
    if not places:
        raise ValueError(f"no file that {recipe} is made of says `name: {mixture}` beside the sources of a mixture")
    target = places[0].path.parent / "quarantine" / f"{mixture}.yaml"
    before: dict[Path, str | None] = {target: target.read_text(encoding="utf-8") if target.is_file() else None}
    known = read(target) if before[target] is not None else {}
    whole = {name: sorted({*known.get(name, ()), *records.get(name, ())}) for name in sorted({*known, *records})}
    ids = yaml.safe_dump(whole, default_style='"', allow_unicode=True, width=float("inf"))
    target.parent.mkdir(exist_ok=True)
    target.write_text(HEAD.format(mixture=mixture) + ids, encoding="utf-8")
    for place in sorted(places, key=lambda place: -place.start):  # from the end, so that the places before it stay
        if place.names_quarantine:
            continue
        text = place.path.read_text(encoding="utf-8")
        before.setdefault(place.path, text)
        named = os.path.relpath(target, place.path.parent)
        line = f"quarantine: {{{BASES}: [{named}]}}" + (", " if place.flow else "\n" + " " * place.column)
        place.path.write_text(text[: place.start] + line + text[place.start :], encoding="utf-8")
    return before


def restore(before: Mapping[Path, str | None]) -> None:
    """Undo an `add` by what it returned."""
    for path, text in before.items():
        if text is None:
            path.unlink()
        else:
            path.write_text(text, encoding="utf-8")


def _places(path: Path, mixture: str) -> Iterator[YamlSpan]:
    """Every mapping of a file, and of those that it extends, that describes the mixture."""
    text = path.read_text(encoding="utf-8")
    for node in _mappings(yaml.compose(text, Loader)):
        loader = Loader("")
        own = loader.construct_mapping(node, deep=True)
        keys = {key.value: key for key, _ in node.value}
        if own.get("name") == mixture and "sources" in resolve(own, path):
            mark = keys["name"].start_mark
            yield YamlSpan(path, mark.index, mark.column, bool(node.flow_style), "quarantine" in keys)
        for base in own.get(BASES, ()):
            yield from _places((path.parent / base).resolve(), mixture)


def _mappings(node: Any) -> Iterator[yaml.MappingNode]:
    """A node and all in it that are mappings; one that an alias repeats comes again."""
    if isinstance(node, yaml.MappingNode):
        yield node
        for _, value in node.value:
            yield from _mappings(value)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            yield from _mappings(value)
