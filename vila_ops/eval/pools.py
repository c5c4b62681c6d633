"""The pools of demonstrations: items of a train file, or of the suite's prepared mixture, and the choice among them."""

# I images, F features

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np

from vila_ops.artifacts import attempts, store
from vila_ops.artifacts.execution import execution
from vila_ops.artifacts.kinds import Demonstrations, Endpoint
from vila_ops.config import Suite
from vila_ops.config.few_shot import FewShot, MixtureSamples, Nearest
from vila_ops.config.images import Webp
from vila_ops.data.containers import BadImage
from vila_ops.data.images import Fit, square
from vila_ops.data.records import Image
from vila_ops.data.shards import Sample, index_of, runs, samples_of
from vila_ops.data.text.conversation import Tokenizer
from vila_ops.eval.benchmark import Item, Parts, Request, SealedImage, TextPrompt, benchmark_of
from vila_ops.eval.few_shot import (
    REVISION,
    Candidate,
    DigestOf,
    Vectors,
    candidates_of,
    demonstrations,
    with_demonstrations,
)
from vila_ops.eval.job import EvalJob
from vila_ops.eval.prompts import ImageOf, requests_of
from vila_ops.eval.sealed import items_of
from vila_ops.generate.load import tokenizer_of

CHOICE = "demonstrations.json"
"""File of a sealed choice: the ids of the demonstrations of each item."""
FeaturesOf = Callable[[Sequence[Image | SealedImage], ImageOf], Vectors]
"""Features (I, F) of images, by the tower of the model."""


@dataclass(frozen=True)
class FewShotPrompts:
    """The requests of a benchmark after their demonstrations."""

    requests: list[Request]
    answers: Mapping[str, str]
    """What each demonstration answers, by the id under which it is shown."""


@dataclass(frozen=True)
class FewShotPlan:
    """A benchmark of a job that has a few-shot setting."""

    job: EvalJob
    name: str
    items: Sequence[Item]
    image_of: ImageOf
    """Also reads the images of the pool."""
    features_of: FeaturesOf

    @property
    def config(self) -> Any:
        """The benchmark's own config."""
        return self.job.suite.benchmarks[self.name]

    @property
    def few_shot(self) -> FewShot:
        """Its few-shot setting."""
        setting: FewShot = self.config.few_shot
        return setting

    def prompts(self) -> FewShotPrompts:
        """The requests, with the demonstrations that they show.

        Raises ValueError for a pool that has too few candidates, and where an endpoint is asked for features.
        """
        digest_of = self._digest_of()
        candidates = candidates_of(self._pool(), self.few_shot, digest_of)
        if isinstance(self.few_shot.selection, Nearest):
            shots = self._nearest(candidates, digest_of)
        else:
            shots = demonstrations(self.items, candidates, self.few_shot, digest_of)
        used = {id_ for ids in shots.values() for id_ in ids}
        shown = [candidate.shown for candidate in candidates if candidate.shown.id in used]
        answers, questions = {item.id: item.answer for item in shown}, self._questions(shown)
        turns = {id_: (questions[id_], answer) for id_, answer in answers.items()}
        requests = list(benchmark_of(self.config.kind).requests(self.items, self.config, _no_tokenizer))
        return FewShotPrompts(with_demonstrations(requests, shots, turns), answers)

    def _questions(self, shown: Sequence[Item]) -> dict[str, Parts]:
        """The user's part of each demonstration, by its module; that of a mixture's samples by the prompt alone."""
        if isinstance(self.few_shot.pool, MixtureSamples):
            requests: Sequence[Request] = requests_of(shown, self.config.prompt)
        else:
            requests = list(benchmark_of(self.config.kind).requests(shown, self.config, _no_tokenizer))
        questions: dict[str, Parts] = {}
        for request in requests:
            assert isinstance(request.prompt, TextPrompt)
            questions.setdefault(request.item, request.prompt.turns[-1][1])
        return questions

    def _pool(self) -> Sequence[Item]:
        job, pool = self.job, self.few_shot.pool
        if not isinstance(pool, MixtureSamples):
            return items_of(job.pools[self.name])
        assert isinstance(job.suite, Suite)
        assert job.data is not None
        assert not isinstance(job.model, Endpoint)
        tokenizer, sources = tokenizer_of(job.model), job.suite.mixture.sources
        captions = {source for source in pool.sources if sources[source].render == "caption"}
        index = index_of(job.data).to_pylist()
        rows = [row for row in index if row["source"] in pool.sources and row["split"] == pool.split]
        return [
            _item(sample, tokenizer, is_caption=sample.source in captions, hint=self.config.prompt.hint)
            for sample in samples_of(job.data, rows)
        ]

    def _digest_of(self) -> DigestOf:
        """The content of an image: the bytes of its file, or for a mixture's squares what the model reads."""
        if not isinstance(self.few_shot.pool, MixtureSamples):
            return lambda image: image.key if isinstance(image, SealedImage) else hashlib.sha256(image.data).hexdigest()
        from vila_ops.model.folder import fit_of, normalisation  # heavy: torch
        from vila_ops.model.pixels import levels

        assert not isinstance(self.job.model, Endpoint)
        folder = store.content(self.job.model)
        (kind, side), (mean, _) = fit_of(folder), normalisation(folder)

        @cache
        def of_file(image: SealedImage) -> str:
            try:
                data = square(self.image_of(image), size=side, fit=Fit(kind, mean), encoding=Webp())
            except BadImage:  # the target says so of each item that shows it
                return image.key
            return hashlib.sha256(levels(data).tobytes()).hexdigest()

        def digest(image: Image | SealedImage) -> str:
            if isinstance(image, SealedImage):
                return of_file(image)
            return hashlib.sha256(levels(image.data).tobytes()).hexdigest()

        return digest

    def _nearest(self, candidates: Sequence[Candidate], digest_of: DigestOf) -> Mapping[str, Sequence[str]]:
        """The sealed choice of the nearest demonstrations; the tower is asked only if there is none."""
        job = self.job
        if isinstance(job.model, Endpoint):
            raise ValueError(
                f"benchmark {self.name!r} selects demonstrations by features of the model's tower, which an endpoint "
                f"does not give; set few_shot.selection to kind seed, or measure it on a checkpoint"
            )
        started, root = time.monotonic(), job.resources.storage.store
        ids = hashlib.sha256(json.dumps([item.id for item in self.items]).encode()).hexdigest()
        at = store.address(
            Demonstrations,
            revision=REVISION,
            recipe={"few_shot": self.few_shot.model_dump(mode="json"), "items": ids},
            parents=(job.model.digest, job.files[self.name].digest, job.pool_digest(self.name)),
        )
        sealed = store.find(Demonstrations, at, store=root)
        if sealed is None:
            vectors = partial(self._vectors, {}, digest_of)
            choice = demonstrations(self.items, candidates, self.few_shot, digest_of, vectors)
            with attempts.attempt(at, store=root) as attempt:
                (attempt / CHOICE).write_text(json.dumps(choice, indent=0, sort_keys=True))
            ran = execution(launch=job.resources.launch, seconds=time.monotonic() - started, ran=[])
            sealed = store.seal(Demonstrations, at, attempt, facts={"model": job.model.digest}, execution=ran)
        shots: dict[str, list[str]] = json.loads(store.file(sealed, CHOICE).read_text())
        return shots

    def _vectors(self, known: dict[str, Vectors], digest_of: DigestOf, items: Sequence[Item]) -> Vectors:
        """Features (N, F) of the first images of items; those in `known`, by digest, are not computed again."""
        if bare := [item.id for item in items if not item.readable_images()]:
            raise ValueError(
                f"benchmark {self.name!r} selects the nearest images, and {bare[0]!r} has none; set few_shot.selection "
                f"to kind seed"
            )
        first = {digest_of(item.readable_images()[0]): item.readable_images()[0] for item in items}
        missing = {digest: image for digest, image in first.items() if digest not in known}
        if missing:
            known.update(zip(missing, self.features_of(list(missing.values()), self.image_of), strict=True))
        return np.array([known[digest_of(item.readable_images()[0])] for item in items])


def _no_tokenizer() -> Tokenizer:
    raise TypeError("benchmarks on official files are written without a tokenizer")


def _item(sample: Sample, tokenizer: Tokenizer, *, is_caption: bool, hint: str) -> Item:
    """A sample of a mixture as an item: its caption, or its question and answer; without an answer if it has several.

    A question that ends in the hint of the prompt, which is written after it again, loses it.
    """
    text, spans = sample.text.strip(), runs(sample.is_target)
    answer = text if is_caption else tokenizer.decode(sample.input_ids[slice(*spans[0])]).strip()
    if not is_caption and (len(spans) != 1 or not text.endswith(answer)):
        answer = ""
    question = text.removesuffix(answer).strip().removesuffix(hint).strip()
    parts: dict[str, Parts] = {"image": tuple(map(Image, sample.images)) or ("",), "question": (question,)}
    return Item(id=sample.key, group=sample.object, parts=parts, answer=answer)
