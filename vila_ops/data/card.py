"""What a prepared mixture holds: the summary for programs, and the data card for people."""

import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq

from vila_ops.config import Mixture
from vila_ops.data import sources
from vila_ops.data.mixture import Size, compose
from vila_ops.data.shards import DROPPED
from vila_ops.data.split import SPLITS

SUMMARY, CARD = "summary.json", "README.md"
LEFT_OUT = {"bad": "bad record", "taken_out": "record, by a rule", "pictures_out": "picture of a document, by a rule"}
EXAMPLES = 3
"""Texts of each source in a card."""
EXAMPLE_CHARACTERS = 200
log = logging.getLogger(__name__)


def summarise(mixture: Mixture, counted: Sequence[tuple[str, dict[str, Any]]]) -> dict[str, Any]:
    """The counts of all shards, (source, counts) each, added up by source; refuses a source with too much bad data."""
    per_source: dict[str, Any] = {}
    for name, source in sorted(mixture.sources.items()):
        own = [counts for of, counts in counted if of == name]
        found = {
            "records": sum(counts["records"] for counts in own),
            **{key: _total(own, key) for key in ("samples", "tokens", "images", "licences", *LEFT_OUT)},
            "packages": {f"{p.registry}:{p.name}@{p.version}": p.licence for p in sources.packages(source)},
            "examples": [text for counts in own for text in counts["examples"]][:EXAMPLES],
        }
        _refuse_bad(mixture, name, found)
        per_source[name] = found
    notes = _epoch(mixture, per_source)
    for note in notes:
        log.warning("mixture %s: %s", mixture.name, note)
    return {
        "mixture": mixture.name,
        **{f"num_{key}": _whole(per_source, key) for key in ("samples", "tokens", "images")},
        "sources": per_source,
        "notes": notes,
    }


def _epoch(mixture: Mixture, per_source: dict[str, Any]) -> list[str]:
    """Note beside each source its share of an epoch; returns what a reader may not expect."""
    sizes = {
        name: Size(samples=found["samples"].get("train", 0), tokens=found["tokens"].get("train", 0))
        for name, found in per_source.items()
    }
    if idle := [name for name, size in sizes.items() if not size.samples]:  # good to evaluate on, not to train on
        return [f"sources {idle} have no training sample, so this mixture has no epoch"]
    composed = compose(mixture, sizes)
    for name, share in composed.shares.items():
        per_source[name]["epoch"] = share.model_dump(mode="json")
    return list(composed.notes)


def card(mixture: Mixture, summary: dict[str, Any], folder: Path) -> str:
    """The data card in Markdown: sources, licences, counts, shares, what was left out and why, and examples."""
    lines = [
        f"# {mixture.name}",
        "",
        f"{summary['num_samples']:,} samples, {summary['num_tokens']:,} tokens, {summary['num_images']:,} pictures, "
        f"split by object: {mixture.split.validation:.0%} validation, {mixture.split.test:.0%} test.",
        "",
        "| source | format | records | train | validation | test | tokens | pictures "
        "| epoch: samples | tokens | repeats |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
        *(_row(name, mixture, found) for name, found in summary["sources"].items()),
        "",
        *(f"**Note.** {note}" for note in summary["notes"]),
        "",
        "## Licences",
        "",
        *_licences(summary),
        "",
        "## Left out",
        "",
        *_left_out(summary, folder),
        "",
        "## Examples",
        "",
    ]
    for name, found in summary["sources"].items():
        lines += [f"### {name}", "", *(f"> {_one_line(text)}\n" for text in found["examples"])]
    return "\n".join(lines) + "\n"


def _row(name: str, mixture: Mixture, found: dict[str, Any]) -> str:
    split = [f"{found['samples'].get(side, 0):,}" for side in SPLITS]
    epoch = found.get("epoch")
    shares = ["", "", ""]
    if epoch:
        shares = [f"{epoch['sample_share']:.1%}", f"{epoch['token_share']:.1%}", f"{epoch['repeats']:.2f}"]
    cells = [
        name,
        mixture.sources[name].kind,
        f"{found['records']:,}",
        *split,
        f"{sum(found['tokens'].values()):,}",
        f"{sum(found['images'].values()):,}",
        *shares,
    ]
    return f"| {' | '.join(cells)} |"


def _licences(summary: dict[str, Any]) -> list[str]:
    rows = [
        f"| {name} | {licence} | {count:,} |"
        for name, found in summary["sources"].items()
        for licence, count in found["licences"].items()
    ]
    packages = [
        f"- {package}: {licence}"
        for found in summary["sources"].values()
        for package, licence in found["packages"].items()
    ]
    return ["| source | licence | samples |", "|---|---|--:|", *rows, "", *dict.fromkeys(packages)]


def _left_out(summary: dict[str, Any], folder: Path) -> list[str]:
    rows = [
        f"| {name} | {kind} | {reason} | {count:,} | {_first(folder, name, reason)} |"
        for name, found in summary["sources"].items()
        for key, kind in LEFT_OUT.items()
        for reason, count in found[key].items()
    ]
    if not rows:
        return ["Nothing."]
    return ["| source | what | reason | count | first |", "|---|---|---|--:|---|", *rows, "", f"Each one: `{DROPPED}`."]


def _first(folder: Path, source: str, reason: str) -> str:
    rule = (pc.field("source") == source) & (pc.field("reason") == reason)
    row = pq.read_table(folder / DROPPED, filters=rule).slice(0, 1).to_pylist()[0]
    return _one_line(f"{row['where'] or row['id']}: {row['detail']}")


def _one_line(text: str) -> str:
    """Text as a table or a quotation can hold it."""
    line = " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;").replace("`", "'")
    return line if len(line) <= EXAMPLE_CHARACTERS else f"{line[:EXAMPLE_CHARACTERS]}…"


def _whole(per_source: dict[str, Any], key: str) -> int:
    return sum(sum(found[key].values()) for found in per_source.values())


def _total(counts: list[dict[str, Any]], key: str) -> dict[str, int]:
    """One mapping of counts of all shards, added up, its keys sorted."""
    return dict(sorted(sum((Counter(one[key]) for one in counts), Counter[str]()).items()))


def _refuse_bad(mixture: Mixture, name: str, found: dict[str, Any]) -> None:
    bad = sum(found["bad"].values())
    if bad > mixture.max_bad_share * found["records"]:
        raise ValueError(
            f"mixture {mixture.name!r}: {bad} of {found['records']} records of source {name!r} are bad "
            f"({found['bad']}), more than max_bad_share {mixture.max_bad_share}; see them with `vila-ops data lint`, "
            f"mend the source or raise max_bad_share"
        )
