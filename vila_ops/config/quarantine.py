"""What a mixture leaves out, in files of their own: add to them, and add a line to the mixture that refers to each.

These are files that people write too: they are replaced whole, and what we did not write in them is kept.
"""

import logging
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import yaml

from vila_ops.config.load import BASES, Loader, read, resolve

Setting = Literal["quarantine", "removed"]
HEADS: dict[Setting, str] = {
    "quarantine": """\
# Records that `prepare` leaves out of mixture {mixture}, by source. `vila-ops data quarantine` adds to them;
# remove a line to use its record again.
""",
    "removed": """\
# What was taken down of mixture {mixture}, by source. `vila-ops data remove` adds to it.
""",
}
FILES: dict[Setting, str] = {"quarantine": "{mixture}.yaml", "removed": "{mixture}.removed.yaml"}
"""Names in the folder `quarantine`, on which a DVC stage depends as a whole."""
COMMENT = re.compile(r"(^|\s)#", re.MULTILINE)
log = logging.getLogger(__name__)


class YamlSpan(NamedTuple):
    """Where a YAML file describes a mixture."""

    path: Path
    start: int
    """Position of its key `name`, in characters."""
    column: int
    flow: bool
    """Whether the mapping is written in braces."""
    names_file: bool
    """Whether it has the setting already."""


class Edit(NamedTuple):
    """What `add` did to one file."""

    before: str | None
    """None: the file did not exist."""
    after: str


def add(
    recipe: Path, mixture: str, records: Mapping[str, Sequence[str]], *, setting: Setting = "quarantine"
) -> dict[Path, Edit]:
    """Add record ids (or removals) by source to a setting of a mixture of a recipe; returns the edit of each file.

    They are written to a file in `quarantine` beside the file that describes the mixture. That file gets one line that
    refers to it and keeps everything else, comments included. Raises ValueError if no file describes the mixture, and
    if the written file has comments among its ids, which would be lost.
    """
    spans = list(dict.fromkeys(_spans(recipe.resolve(), mixture, setting)))
    if not spans:
        raise ValueError(f"no file of {recipe} has `name: {mixture}` beside the sources of a mixture")
    target = spans[0].path.parent / "quarantine" / FILES[setting].format(mixture=mixture)
    before = _text(target) if target.is_file() else None
    texts = {target: _with_ids(target, before, records, head=HEADS[setting].format(mixture=mixture))}
    for span in sorted(spans, key=lambda span: -span.start):  # from the end, so that the positions before it stay valid
        if span.names_file:
            continue
        text = texts.get(span.path) or _text(span.path)
        named = os.path.relpath(target, span.path.parent)
        line = f"{setting}: {{{BASES}: [{named}]}}" + (", " if span.flow else "\n" + " " * span.column)
        texts[span.path] = text[: span.start] + line + text[span.start :]
    target.parent.mkdir(exist_ok=True)
    edits = {}
    for path, text in texts.items():  # the ids first, so that after a kill no line refers to a missing file
        edits[path] = Edit(before if path == target else _text(path), text)
        _replace(path, text)
    return edits


def restore(edits: Mapping[Path, Edit]) -> None:
    """Undo an `add`, given what it returned. A file that was edited since is left as it is, with a warning."""
    for path, edit in edits.items():
        if not path.is_file() or _text(path) != edit.after:
            log.warning(
                "%s was edited meanwhile and is left as it is; remove what it says of quarantine yourself", path
            )
        elif edit.before is None:
            path.unlink()
        else:
            _replace(path, edit.before)


def _with_ids(target: Path, text: str | None, records: Mapping[str, Sequence[str]], *, head: str) -> str:
    """The text of the written file with more ids. The comment at its top is kept."""
    known: dict[str, Any] = {}
    if text is not None:
        known = read(target)
        lines = text.splitlines(keepends=True)
        first = next((number for number, line in enumerate(lines) if not line.startswith("#")), len(lines))
        head, body = "".join(lines[:first]), "".join(lines[first:])
        if COMMENT.search(body) and body != _dumped(known):
            raise ValueError(
                f"{target} has comments among its ids, which would be lost: move them to its top, or add these ids "
                f"to it yourself: {dict(records)}"
            )
    return head + _dumped({name: {*known.get(name, ()), *records.get(name, ())} for name in {*known, *records}})


def _dumped(ids: Mapping[str, Iterable[str]]) -> str:
    whole = {name: sorted(ids[name]) for name in sorted(ids)}
    return yaml.safe_dump(whole, default_style='"', allow_unicode=True, width=float("inf"))


def _text(path: Path) -> str:
    """The text of a file with its own line ends."""
    return path.read_bytes().decode()


def _replace(path: Path, text: str) -> None:
    """Replace a file whole or not at all; it keeps its mode."""
    draft = path.with_name(f".{path.name}-{secrets.token_hex(6)}")
    try:
        draft.write_bytes(text.encode())
        if path.exists():
            shutil.copymode(path, draft)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def _spans(path: Path, mixture: str, setting: Setting) -> Iterator[YamlSpan]:
    """Every mapping that describes the mixture, in a file and in the files that it extends."""
    text = _text(path)
    for node in _mappings(yaml.compose(text, Loader)):
        loader = Loader("")
        own = loader.construct_mapping(node, deep=True)
        keys = {key.value: key for key, _ in node.value}
        if own.get("name") == mixture and "sources" in resolve(own, path):
            mark = keys["name"].start_mark
            yield YamlSpan(path, mark.index, mark.column, bool(node.flow_style), setting in keys)
        for base in own.get(BASES, ()):
            yield from _spans((path.parent / base).resolve(), mixture, setting)


def _mappings(node: Any) -> Iterator[yaml.MappingNode]:
    """All mappings in a node, itself included; a mapping that an alias repeats is yielded again."""
    if isinstance(node, yaml.MappingNode):
        yield node
        for _, value in node.value:
            yield from _mappings(value)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            yield from _mappings(value)
