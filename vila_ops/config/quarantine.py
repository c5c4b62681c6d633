"""The quarantine file of a mixture: add record ids to it, and add a line to the mixture that refers to it."""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from vila_ops.config.load import BASES, Loader, read, resolve

HEAD = """\
# Records that `prepare` leaves out of mixture {mixture}, by source. `vila-ops data quarantine` adds to them;
# remove a line to use its record again.
"""


class YamlSpan(NamedTuple):
    """Where a YAML file describes a mixture."""

    path: Path
    start: int
    """Position of its key `name`, in characters."""
    column: int
    flow: bool
    """Whether the mapping is written in braces."""
    names_quarantine: bool


def add(recipe: Path, mixture: str, records: Mapping[str, Sequence[str]]) -> dict[Path, str | None]:
    """Add record ids by source to the quarantine of a mixture of a recipe; returns the former texts of changed files.

    The ids are written to `quarantine/MIXTURE.yaml` beside the file that describes the mixture. That file gets one line
    that refers to it and keeps everything else, comments included. Raises ValueError if no file describes the mixture.
    """
    spans = list(dict.fromkeys(_spans(recipe.resolve(), mixture)))
    if not spans:
        raise ValueError(f"no file of {recipe} has `name: {mixture}` beside the sources of a mixture")
    target = spans[0].path.parent / "quarantine" / f"{mixture}.yaml"
    before: dict[Path, str | None] = {target: target.read_text(encoding="utf-8") if target.is_file() else None}
    known = read(target) if before[target] is not None else {}
    whole = {name: sorted({*known.get(name, ()), *records.get(name, ())}) for name in sorted({*known, *records})}
    ids = yaml.safe_dump(whole, default_style='"', allow_unicode=True, width=float("inf"))
    target.parent.mkdir(exist_ok=True)
    target.write_text(HEAD.format(mixture=mixture) + ids, encoding="utf-8")
    for span in sorted(spans, key=lambda span: -span.start):  # from the end, so that the positions before it stay valid
        if span.names_quarantine:
            continue
        text = span.path.read_text(encoding="utf-8")
        before.setdefault(span.path, text)
        named = os.path.relpath(target, span.path.parent)
        line = f"quarantine: {{{BASES}: [{named}]}}" + (", " if span.flow else "\n" + " " * span.column)
        span.path.write_text(text[: span.start] + line + text[span.start :], encoding="utf-8")
    return before


def restore(before: Mapping[Path, str | None]) -> None:
    """Undo an `add`, given what it returned."""
    for path, text in before.items():
        if text is None:
            path.unlink()
        else:
            path.write_text(text, encoding="utf-8")


def _spans(path: Path, mixture: str) -> Iterator[YamlSpan]:
    """Every mapping that describes the mixture, in a file and in the files that it extends."""
    text = path.read_text(encoding="utf-8")
    for node in _mappings(yaml.compose(text, Loader)):
        loader = Loader("")
        own = loader.construct_mapping(node, deep=True)
        keys = {key.value: key for key, _ in node.value}
        if own.get("name") == mixture and "sources" in resolve(own, path):
            mark = keys["name"].start_mark
            yield YamlSpan(path, mark.index, mark.column, bool(node.flow_style), "quarantine" in keys)
        for base in own.get(BASES, ()):
            yield from _spans((path.parent / base).resolve(), mixture)


def _mappings(node: Any) -> Iterator[yaml.MappingNode]:
    """All mappings in a node, itself included; a mapping that an alias repeats is yielded again."""
    if isinstance(node, yaml.MappingNode):
        yield node
        for _, value in node.value:
            yield from _mappings(value)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            yield from _mappings(value)
