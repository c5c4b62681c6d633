"""What a prepared mixture holds, in numbers: the counts of its shards by source, and what an epoch has of each."""

import logging
from collections import Counter
from collections.abc import Sequence
from typing import Any

from vila_ops.config import Mixture
from vila_ops.data.loading.mixture import Size, compose

SUMMARY = "summary.json"
LEFT_OUT = {"bad": "bad record", "taken_out": "record, by a rule", "images_out": "image of a document, by a rule"}
"""Counts by reason in a source's summary, and what they count."""
EXAMPLES = 3
"""Texts of each source."""
log = logging.getLogger(__name__)


def summarise(mixture: Mixture, counted: Sequence[tuple[str, dict[str, Any]]]) -> dict[str, Any]:
    """The counts of all shards, (source, counts) each, added up by source; refuses a source with too much bad data."""
    per_source: dict[str, Any] = {}
    for name, source in sorted(mixture.sources.items()):
        own = [counts for of, counts in counted if of == name]
        found = {
            "records": sum(counts["records"] for counts in own),
            **{key: _total(own, key) for key in ("samples", "tokens", "images", "licences", *LEFT_OUT)},
            "packages": {f"{p.registry}:{p.name}@{p.version}": p.licence for p in source.packages()},
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
            "fix the source or raise max_bad_share of the mixture"
        )
