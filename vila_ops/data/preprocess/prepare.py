"""The task `prepare`: a mixture's sources become tokenised, sharded, split samples. Light: the work is in `build`."""

import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vila_ops import tracing
from vila_ops.artifacts import attempts, store
from vila_ops.artifacts.execution import execution
from vila_ops.artifacts.kinds import Dataset
from vila_ops.artifacts.leases import Lease, hold
from vila_ops.artifacts.progress import Reporter
from vila_ops.config import NO_CONTEXT, Mixture, Resources, RunContext, TextFormat, fingerprint
from vila_ops.data.preprocess.identity import (
    SHARD_REVISION,
    SURVEY_REVISION,
    RawDigests,
    mixture_recipe,
    raw_digests,
    text_recipe,
)

REVISION = 5
"""Raised if the same shards become another dataset."""
OTHER = {
    "sources": "of other raw data",
    "mixture": "with other settings of the mixture",
    "text": "for another text format or tokenizer",
    "made_by": "by another version of vila-ops",
}
"""Parts of a dataset's recipe, and what it means that one differs."""
SURVEYS = "surveys"
"""Key in the execution of a dataset: the surveys that it was decided on, by the keys of their addresses."""
log = logging.getLogger(__name__)


def prepare(mixture: Mixture, text: TextFormat, resources: Resources, context: RunContext = NO_CONTEXT) -> Dataset:
    """The prepared mixture in the store: the sealed one, a copy of that in `data/<mixture>`, or a new one.

    A new one reuses sealed shards; a copy needs no raw files. Raises ValueError if there is neither a dataset nor raw
    files, and if more than the mixture's max_bad_share of a source's records are bad.
    """
    at, root, folder = address_of(mixture, text, resources), resources.storage.store, _folder(mixture, resources)
    done = store.find(Dataset, at, store=root)
    if done is None:
        with (
            tracing.work("prepare", mixture.name, mixture=mixture.name, address=at.key),
            hold(at, store=root) as lease,
        ):
            reporter = Reporter("prepare", mixture.name, unit="shards", workers=resources.prepare.num_workers)
            lease.report = reporter
            versioned = store.find_in(Dataset, at, str(folder))
            if versioned is not None:
                done = attempts.keep(versioned, at, store=root)
            else:
                done = store.find(Dataset, at, store=root) or _prepare(at, mixture, text, resources, reporter, lease)
    manifest = store.find_manifest(str(folder))
    if manifest and manifest["address"] == f"{at.kind}/{at.key}" and manifest["digest"] != done.digest:
        raise ValueError(
            f"{folder} and {done.uri} were prepared of the same data with the same settings, but they differ (digests "
            f"{manifest['digest'][:12]} and {done.digest[:12]}), so other versions of the libraries made them; move "
            f"the one away that is not to be used, and run again"
        )
    return done


def prepared(mixture: Mixture, text: TextFormat, resources: Resources) -> Dataset | None:
    """The prepared mixture, in `data/<mixture>` or the store; None if it is in neither. Nothing is written."""
    return prepared_at(address_of(mixture, text, resources), mixture, resources)


def prepared_at(at: store.Address, mixture: Mixture, resources: Resources) -> Dataset | None:
    """The prepared mixture of a known address, as by `prepared`."""
    versioned = store.find_in(Dataset, at, str(_folder(mixture, resources)))
    return versioned or store.find(Dataset, at, store=resources.storage.store)


def _folder(mixture: Mixture, resources: Resources) -> Path:
    """DVC's output of a mixture."""
    return Path(resources.storage.data).resolve() / mixture.name


def address_of(mixture: Mixture, text: TextFormat, resources: Resources) -> store.Address:
    """Where the dataset is. Sources whose raw files are not here are taken as `data/<mixture>` records them.

    Raises ValueError where it does not record them for these settings.
    """
    raw = raw_digests(mixture, cache=resources.storage.cache_folder())
    if not raw.missing:
        return _address_of(mixture, text, raw.here)
    folder = _folder(mixture, resources)
    manifest = store.find_manifest(str(folder))
    if manifest is not None:
        recorded = manifest["recipe"].get("sources", {})
        known = {name: recorded[name] for name in raw.missing if name in recorded}
        at = _address_of(mixture, text, {**raw.here, **known})
        if manifest["address"] == f"{at.kind}/{at.key}":
            log.warning("mixture %s: %s; %s is used as it was prepared", mixture.name, _told(raw), folder)
            return at
    if raw.missing.keys() <= raw.here.keys():  # only images are missing: `prepare` says how many
        return _address_of(mixture, text, raw.here)
    raise ValueError(
        f"mixture {mixture.name!r}: {_told(raw)}, and {folder} {_why_not(manifest, mixture, text, raw)}; correct the "
        f"path, or bring the raw files or the dataset that was prepared of them (`dvc pull`, `dvc checkout`)"
    )


def _address_of(mixture: Mixture, text: TextFormat, digests: Mapping[str, str]) -> store.Address:
    made_by = {"shards": SHARD_REVISION, "survey": SURVEY_REVISION}
    recipe = {
        "mixture": mixture_recipe(mixture),
        "text": text_recipe(text),
        "sources": dict(digests),
        "made_by": made_by,
    }
    return store.address(Dataset, revision=REVISION, recipe=recipe, parents=tuple(sorted(set(digests.values()))))


def _told(raw: RawDigests) -> str:
    """Which raw files are not here."""
    return "; ".join(f"raw files of source {name!r} are not here ({why})" for name, why in raw.missing.items())


def _why_not(manifest: dict[str, Any] | None, mixture: Mixture, text: TextFormat, raw: RawDigests) -> str:
    """Why the dataset in `data/<mixture>`, of which this is the manifest, is not the one that is asked for."""
    if manifest is None:
        return "holds no dataset"
    asked, recorded = _address_of(mixture, text, raw.here).recipe, manifest["recipe"]
    asked["sources"] = {**recorded.get("sources", {}), **raw.here}
    differing = [why for part, why in OTHER.items() if fingerprint(recorded.get(part)) != fingerprint(asked[part])]
    return f"was prepared {' and '.join(differing or [OTHER['made_by']])}"


def _prepare(
    at: store.Address, mixture: Mixture, text: TextFormat, resources: Resources, reporter: Reporter, lease: Lease
) -> Dataset:
    from vila_ops.data.preprocess import build  # heavy: Ray, tokenizer, images

    started = time.monotonic()
    with attempts.attempt(at, store=resources.storage.store, lease=lease) as attempt:
        built = build.build(mixture, text, resources, folder=attempt, digests=at.recipe["sources"], reporter=reporter)
    facts = {key: built.summary[key] for key in ("num_samples", "num_tokens")}
    ran = execution(launch=resources.launch, seconds=time.monotonic() - started, ran=built.workers)
    surveys = {SURVEYS: sorted(survey.uri.rpartition("/")[2] for survey in built.surveys)}
    dataset = store.seal(Dataset, at, attempt, facts=facts, execution=ran | surveys, known=built.shards)
    log.info("prepared %s: %d samples, %d tokens", mixture.name, dataset.num_samples, dataset.num_tokens)
    return dataset
