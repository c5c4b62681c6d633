"""The data card of a prepared mixture, for people: its summary in Markdown."""

import re
from pathlib import Path
from typing import Any, assert_never

import pyarrow.compute as pc
import pyarrow.parquet as pq

from vila_ops.config import Mixture
from vila_ops.config.mixture import ByRepeats, BySize, ByWeight
from vila_ops.data.preprocess.summary import LEFT_OUT
from vila_ops.data.records import CHANGES
from vila_ops.data.shards import DROPPED
from vila_ops.data.split import SPLITS

CARD = "README.md"
CHARACTERS = 240
"""Longest text in a card."""
_ENTITIES = str.maketrans(
    {character: f"&#{ord(character)};" for character in "&<>|`"} | {mark: f"\\{mark}" for mark in "\\*_[]~#$"}
)
_LIST = re.compile(r"^(\d*)([-+=.)])")
"""The start of a line that would make it an item or a heading."""


def card(mixture: Mixture, summary: dict[str, Any], folder: Path) -> str:
    """The data card in Markdown: sources, counts, wanted and reached shares, licences, drops, changes, examples.

    `folder` has the list of dropped records. Texts of the data are escaped, so that the card shows them literally.
    """
    lines = [
        f"# {mixture.name}",
        "",
        f"{summary['num_samples']:,} samples, {summary['num_tokens']:,} tokens, {summary['num_images']:,} images. "
        f"Split by object: {mixture.split.validation:.0%} for validation, {mixture.split.test:.0%} for test.",
        "",
        "## Sources",
        "",
        *_sources(mixture, summary),
        "",
        "## An epoch",
        "",
        *_epoch(mixture, summary),
        "",
        "## Licences",
        "",
        *licences(summary),
        "",
        "## Left out",
        "",
        *_left_out(summary, folder),
        "",
        "## Changed",
        "",
        *_changed(summary),
        "",
        "## Examples",
    ]
    for name, counts in summary["sources"].items():
        lines += ["", f"### {name}", *(line for text in counts["examples"] for line in ("", *_quoted(text)))]
    return "\n".join(lines) + "\n"


def _sources(mixture: Mixture, summary: dict[str, Any]) -> list[str]:
    rows = [
        [
            name,
            f"{mixture.sources[name].kind}, {mixture.sources[name].render}",
            f"{counts['records']:,}",
            f"{sum(counts['samples'].values()):,}",
            *(f"{counts['samples'].get(side, 0):,}" for side in SPLITS),
            f"{sum(counts['tokens'].values()):,}",
            f"{sum(counts['images'].values()):,}",
        ]
        for name, counts in summary["sources"].items()
    ]
    sides = [f">{side}" for side in SPLITS]
    return table(["source", "format, read as", ">records", ">samples", *sides, ">tokens", ">images"], rows)


def _epoch(mixture: Mixture, summary: dict[str, Any]) -> list[str]:
    epochs = {name: counts["epoch"] for name, counts in summary["sources"].items() if "epoch" in counts}
    notes = [f"- {note}" for note in summary["notes"]]
    if not epochs:
        return notes
    match mixture.blend:
        case ByWeight(unit=unit):
            blend = f"Blended by the sources' weights, in {unit}."
        case BySize(unit=unit, temperature=temperature):
            blend = f"Blended by the sources' sizes to the power 1 / {temperature:g}, in {unit}."
        case ByRepeats():
            unit, blend = "samples", "Each source is seen as often as its `repeats` says."
        case _:
            assert_never(mixture.blend)
    rows = [
        [
            name,
            f"{epoch['wanted']:.2%}",
            f"{epoch['sample_share']:.2%}",
            f"{epoch['token_share']:.2%}",
            f"{epoch['samples_per_epoch']:,}",
            f"{epoch['samples']:,}",
            f"{epoch['repeats']:.2f}",
        ]
        for name, epoch in epochs.items()
    ]
    head = [f">wanted of {unit}", ">reached of samples", ">of tokens", ">samples drawn", ">of", ">times seen"]
    return [blend, "", *table(["source", *head], rows), *([""] if notes else []), *notes]


def licences(summary: dict[str, Any]) -> list[str]:
    """The licences of a dataset's samples by source, and of the packages that it was made from."""
    rows = [
        [name, inline(licence), f"{count:,}"]
        for name, counts in summary["sources"].items()
        for licence, count in counts["licences"].items()
    ]
    packages = {
        f"- {inline(package)}: {inline(licence)}": None
        for counts in summary["sources"].values()
        for package, licence in counts["packages"].items()
    }
    made_from = ["", "Made from these packages:", "", *packages] if packages else []
    return [*table(["source", "licence", ">samples"], rows), *made_from]


def _left_out(summary: dict[str, Any], folder: Path) -> list[str]:
    rows = [
        [name, kind, f"`{reason}`", f"{count:,}", _first(folder, name, reason)]
        for name, counts in summary["sources"].items()
        for key, kind in LEFT_OUT.items()
        for reason, count in counts[key].items()
    ]
    if not rows:
        return ["Nothing."]
    return [
        *table(["source", "what", "reason", ">count", "the first"], rows),
        "",
        f"Each of them, with its place: `{DROPPED}` of the dataset.",
    ]


def _changed(summary: dict[str, Any]) -> list[str]:
    rows = [
        [name, f"`{reason}`", CHANGES[reason], f"{count:,}"]
        for name, counts in summary["sources"].items()
        for reason, count in counts["changed"].items()
    ]
    return table(["source", "reason", "what", ">records"], rows) if rows else ["Nothing."]


def _first(folder: Path, source: str, reason: str) -> str:
    rule = (pc.field("source") == source) & (pc.field("reason") == reason)
    row = pq.read_table(folder / DROPPED, filters=rule).slice(0, 1).to_pylist()[0]
    return inline(f"{row['where'] or row['id']}: {row['detail']}".removesuffix(": "))


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    """A Markdown table; columns whose head begins with `>` are numeric."""
    rule = ["--:" if name.startswith(">") else "---" for name in head]
    return [f"| {' | '.join(cells)} |" for cells in ([name.removeprefix(">") for name in head], rule, *rows)]


def _quoted(text: str) -> list[str]:
    """Text as a block quotation with its line breaks."""
    lines = [inline(line) for line in _short(text).splitlines() if line.strip()]
    return [f"> {line}{'' if number == len(lines) else '  '}" for number, line in enumerate(lines, start=1)]


def inline(text: str) -> str:
    """Text as one line of Markdown that is shown literally, also in a table."""
    line = " ".join("".join(c if c.isprintable() else " " for c in _short(text)).split())
    return _LIST.sub(r"\1\\\2", line.translate(_ENTITIES))


def _short(text: str) -> str:
    return text if len(text) <= CHARACTERS else f"{text[:CHARACTERS]}…"
