"""The room `prepare`: a mixture's sources become tokenised, sharded, split samples. Light: work is in `shard`."""

import json
import logging
import time
from pathlib import Path
from typing import Any

from vila_ops.artifacts import store
from vila_ops.artifacts.execution import execution
from vila_ops.artifacts.folders import folder_digest
from vila_ops.artifacts.kinds import Dataset
from vila_ops.config import Mixture, Resources, TextFormat
from vila_ops.data import sources

REVISION = 2
log = logging.getLogger(__name__)


def prepare(mixture: Mixture, text: TextFormat, resources: Resources) -> Dataset:
    """The prepared mixture; made only if it is not in `data/<mixture>` or in the store already.

    Raises ValueError when a source drops more than the mixture's max_bad_share of its records.
    """
    parents = _parents(mixture, text)
    recipe = {"mixture": _portable(mixture), "text": _portable_text(text)}
    at = store.address(Dataset, revision=REVISION, recipe=recipe, parents=parents)
    root = Path(resources.store).resolve()
    if done := store.find(Dataset, at, store=root, first=Path(resources.data).resolve() / mixture.name):
        return done
    from vila_ops.data import build  # heavy: Ray, tokenizer, pictures

    started = time.monotonic()
    attempt = store.begin(at, store=root)
    facts, ran = build.build(mixture, text, resources, folder=attempt)
    (attempt / "summary.json").write_text(json.dumps(facts, indent=1, sort_keys=True))
    dataset = store.seal(
        Dataset,
        at,
        attempt,
        facts={"num_samples": facts["num_samples"], "num_tokens": facts["num_tokens"]},
        execution=execution(launch=resources.launch, seconds=time.monotonic() - started, ran=ran),
    )
    log.info("prepared %s: %d samples, %d tokens", mixture.name, dataset.num_samples, dataset.num_tokens)
    return dataset


def export_for_dvc(dataset: Dataset, out: Path) -> None:
    """Copy a dataset to `out`, with its counts beside it: `out`.json for `dvc metrics`, `out`.csv for `dvc plots`."""
    store.export(dataset, out)
    summary = json.loads((store.content(dataset) / "summary.json").read_text())
    out.with_name(f"{out.name}.json").write_text(json.dumps(summary, indent=1, sort_keys=True) + "\n")
    rows = [
        f"{name} {split},{count}"
        for name, source in summary["sources"].items()
        for split, count in source["samples"].items()
    ]
    out.with_name(f"{out.name}.csv").write_text("\n".join(["part,samples", *rows]) + "\n")


def _parents(mixture: Mixture, text: TextFormat) -> tuple[str, ...]:
    """Digests of everything read from outside the config: packages, local folders, a local tokenizer."""
    digests = {package.sha256 for source in mixture.sources.values() for package in sources.packages(source)}
    digests |= {folder_digest(Path(source.path)) for source in mixture.sources.values() if source.kind == "jsonl"}
    match text.language_model.kind:
        case "package":
            digests.add(text.language_model.package.sha256)
        case "random":
            digests.add(folder_digest(Path(text.language_model.tokenizer)))
        case "hub":
            pass  # name and revision stand in the config
    return tuple(sorted(digests))


def _portable(mixture: Mixture) -> dict[str, Any]:
    """The mixture, its local folders named by their content instead of their place."""
    dumped = mixture.model_dump(mode="json")
    for source in dumped["sources"].values():
        if source["kind"] == "jsonl":
            source["path"] = folder_digest(Path(source["path"]))
    return dumped


def _portable_text(text: TextFormat) -> dict[str, Any]:
    """The text format without the place of a local tokenizer, and without what does not change tokens."""
    dumped = text.model_dump(mode="json")
    if dumped["language_model"]["kind"] == "random":
        dumped["language_model"] = {"kind": "random"}
    return dumped
