"""The task `prepare`: a mixture's sources become tokenised, sharded, split samples. Light: the work is in `build`."""

import logging
import time
from pathlib import Path

from vila_ops.artifacts import store
from vila_ops.artifacts.execution import execution
from vila_ops.artifacts.kinds import Dataset
from vila_ops.artifacts.leases import hold
from vila_ops.config import NO_CONTEXT, Mixture, Resources, RunContext, TextFormat
from vila_ops.data.preprocess.identity import SHARD_REVISION, SURVEY_REVISION, digests, mixture_recipe, text_recipe

REVISION = 5
"""Raised if the same shards become another dataset."""
log = logging.getLogger(__name__)


def prepare(mixture: Mixture, text: TextFormat, resources: Resources, context: RunContext = NO_CONTEXT) -> Dataset:
    """The prepared mixture: the sealed one in `data/<mixture>` or the store, or a new one that reuses sealed shards.

    Raises ValueError if more than the mixture's max_bad_share of a source's records are bad.
    """
    at = _address(mixture, text, resources)
    if done := _find(at, mixture, resources):
        return done
    with hold(at, store=resources.storage.store):
        return store.find(Dataset, at, store=resources.storage.store) or _prepare(at, mixture, text, resources)


def prepared(mixture: Mixture, text: TextFormat, resources: Resources) -> Dataset | None:
    """The prepared mixture if it is sealed already, else None; nothing is prepared."""
    return _find(_address(mixture, text, resources), mixture, resources)


def _address(mixture: Mixture, text: TextFormat, resources: Resources) -> store.Address:
    read = digests(mixture, cache=resources.storage.cache_folder())
    made_by = {"shards": SHARD_REVISION, "survey": SURVEY_REVISION}
    recipe = {"mixture": mixture_recipe(mixture), "text": text_recipe(text), "sources": read, "made_by": made_by}
    return store.address(Dataset, revision=REVISION, recipe=recipe, parents=tuple(sorted(set(read.values()))))


def _find(at: store.Address, mixture: Mixture, resources: Resources) -> Dataset | None:
    return store.find(
        Dataset, at, store=resources.storage.store, first=Path(resources.storage.data).resolve() / mixture.name
    )


def _prepare(at: store.Address, mixture: Mixture, text: TextFormat, resources: Resources) -> Dataset:
    from vila_ops.data.preprocess import build  # heavy: Ray, tokenizer, images

    started = time.monotonic()
    attempt = store.begin(at, store=resources.storage.store)
    facts, shards, ran = build.build(mixture, text, resources, folder=attempt)
    dataset = store.seal(
        Dataset,
        at,
        attempt,
        facts={"num_samples": facts["num_samples"], "num_tokens": facts["num_tokens"]},
        execution=execution(launch=resources.launch, seconds=time.monotonic() - started, ran=ran),
        known=shards,
    )
    log.info("prepared %s: %d samples, %d tokens", mixture.name, dataset.num_samples, dataset.num_tokens)
    return dataset
