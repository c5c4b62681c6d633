"""The counts of a prepared mixture by source, and each source's share of an epoch."""

import logging
from collections import Counter
from collections.abc import Sequence
from typing import Any

from vila_ops.config import Mixture
from vila_ops.data.loading.mixture import Size, compose
from vila_ops.errors import counted

SUMMARY = "summary.json"
LEFT_OUT = {"bad": "bad record", "taken_out": "record, by a rule", "images_out": "image of a document, by a rule"}
"""Keys of counts by reason in a source's summary, with what they count."""
EXAMPLES = 3
"""Number of example texts of each source."""
log = logging.getLogger(__name__)


def summarise(mixture: Mixture, counted: Sequence[tuple[str, dict[str, Any]]]) -> dict[str, Any]:
    """The counts of all shards, given as (source, counts), added up by source.

    Raises ValueError if more than max_bad_share of a source's records are bad.
    """
    per_source: dict[str, Any] = {}
    for name, source in sorted(mixture.sources.items()):
        own = [counts for of, counts in counted if of == name]
        totals = {
            "records": sum(counts["records"] for counts in own),
            **{key: _total(own, key) for key in ("samples", "tokens", "images", "licences", *LEFT_OUT, "changed")},
            "packages": {f"{p.registry}:{p.name}@{p.version}": p.licence for p in source.packages()},
            "examples": [text for counts in own for text in counts["examples"]][:EXAMPLES],
        }
        _refuse_bad(mixture, name, totals)
        per_source[name] = totals
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
    """Add each source's share of an epoch to its counts; returns warnings."""
    sizes = {
        name: Size(samples=totals["samples"].get("train", 0), tokens=totals["tokens"].get("train", 0))
        for name, totals in per_source.items()
    }
    if idle := [name for name, size in sizes.items() if not size.samples]:  # such a mixture can be evaluated on
        return [f"sources {idle} have no training sample, so this mixture has no epoch"]
    composed = compose(mixture, sizes)
    for name, share in composed.shares.items():
        per_source[name]["epoch"] = share.model_dump(mode="json")
    return list(composed.notes)


def _whole(per_source: dict[str, Any], key: str) -> int:
    return sum(sum(totals[key].values()) for totals in per_source.values())


def _total(counts: list[dict[str, Any]], key: str) -> dict[str, int]:
    """One mapping of counts added up over all shards, with sorted keys."""
    return dict(sorted(sum((Counter(one[key]) for one in counts), Counter[str]()).items()))


def _refuse_bad(mixture: Mixture, name: str, totals: dict[str, Any]) -> None:
    bad = sum(totals["bad"].values())
    if bad > mixture.max_bad_share * totals["records"]:
        raise ValueError(
            f"mixture {mixture.name!r}: {bad:,} of {counted(totals['records'], 'record')} of source {name!r} are bad "
            f"({totals['bad']}), more than max_bad_share {mixture.max_bad_share}; see them with `vila-ops data lint`, "
            "fix the source or raise max_bad_share of the mixture"
        )
