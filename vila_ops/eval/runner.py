"""A suite's benchmarks on one target in this process: plan the shards, answer them one by one, score and seal."""

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from vila_ops.artifacts import attempts, store
from vila_ops.artifacts.execution import execution
from vila_ops.artifacts.kinds import Answers, BenchmarkResult, Endpoint
from vila_ops.cluster import whoami
from vila_ops.config.benchmarks import JudgedBenchmark, OfficialBenchmark
from vila_ops.data.records import Image
from vila_ops.device import describe, device_of
from vila_ops.eval import report
from vila_ops.eval.benchmark import Item, Request, SealedImage, benchmark_of
from vila_ops.eval.benchmarks.held_out.items import HeldOut
from vila_ops.eval.endpoint_target import EndpointTarget, check_answerable
from vila_ops.eval.engine_target import EngineTarget, check_context
from vila_ops.eval.job import EvalJob
from vila_ops.eval.judge import judged
from vila_ops.eval.pools import FewShotPlan
from vila_ops.eval.prompts import ImageOf, reference_hash, request_hash, unreadable
from vila_ops.eval.rows import ItemRow, Response, read_responses, write_responses
from vila_ops.eval.scoring import Scored, metric_values, score
from vila_ops.eval.sealed import SealedImages, items_of
from vila_ops.eval.shards import shards_of
from vila_ops.eval.shown import ShownRow, item_scores, shown_rows
from vila_ops.generate.engine import EngineOptions
from vila_ops.generate.load import context_of, engine_facts, tokenizer_of

if TYPE_CHECKING:
    from vila_ops.data.text.conversation import Tokenizer

RESPONSES = "answers.parquet"
"""File of a sealed shard."""
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Planned:
    """A benchmark for one target: its items, its requests in shards, and how an image of them is read."""

    items: Sequence[Item]
    shards: list[list[Request]]
    image_of: ImageOf
    shown: Mapping[str, str]
    """What each demonstration answers, by its id in the requests."""

    @property
    def requests(self) -> list[Request]:
        """All requests, shard after shard."""
        return [request for shard in self.shards for request in shard]


class Target(Protocol):
    """What answers requests: a model in this process, or an endpoint."""

    def answer(self, requests: Sequence[Request], image_of: ImageOf) -> list[Response]:
        """The responses in the order of the requests."""

    def close(self) -> None:
        """Release what was opened."""


class Runner:
    """Plans, answers and concludes the benchmarks of a job. The target's weights are loaded with the first shard."""

    def __init__(self, job: EvalJob) -> None:
        self.job = job
        self.target = _target(job)
        self._planned: dict[str, Planned] = {}

    def close(self) -> None:
        """Release the target."""
        self.target.close()

    def plan(self, name: str) -> list[int]:
        """The number of requests of each shard of a benchmark, by the suite's name of it.

        Raises ValueError for a few-shot prompt that does not fit the model's context.
        """
        planned, model = self.planned(name), self.job.model
        if planned.shown and not isinstance(model, Endpoint):
            check_context(name, planned.requests, tokenizer_of(model), context_of(model))
        return [len(shard) for shard in planned.shards]

    def answer(self, name: str, shard: int) -> dict[str, Any]:
        """Answer and seal a shard; returns which process did it."""
        planned = self.planned(name)
        return self._seal_answers(self._address(name, shard), planned.shards[shard], planned.image_of)

    def ask_again(self, name: str) -> dict[str, Any]:
        """Ask once more what timed out, and seal the result with these answers; returns which process did it."""
        planned = self.planned(name)
        late = _timed_out(planned, self._responses(name, planned))
        at = self._again_address(late)
        if late and store.find(Answers, at, store=self._store) is None:
            self._seal_answers(at, late, planned.image_of)
        return self.conclude(name, again=True)

    def _seal_answers(self, at: store.Address, requests: Sequence[Request], image_of: ImageOf) -> dict[str, Any]:
        started = time.monotonic()
        responses = answered(self.target, requests, image_of)
        with attempts.attempt(at, store=self._store) as attempt:
            write_responses(attempt / RESPONSES, responses)
        ran, seconds = whoami(), {key: round(one.seconds, 4) for key, one in responses.items()}
        store.seal(
            Answers,
            at,
            attempt,
            facts={"model": self.job.model.digest},
            execution=self._execution(time.monotonic() - started, [ran]) | {"seconds_of": seconds},
        )
        return ran

    def pending(self, name: str) -> list[int]:
        """The shards of a benchmark that are not sealed."""
        return [shard for shard in range(len(self.planned(name).shards)) if not self._is_sealed(name, shard)]

    def answer_all(self, name: str, shards: Sequence[int]) -> Iterator[int]:
        """Answer shards; yields the number of each as soon as it is sealed."""
        for shard in shards:
            self.answer(name, shard)
            yield shard

    def conclude(self, name: str, *, asks: bool = True, again: bool = False) -> dict[str, Any]:
        """Score the answers of all shards, and seal the result of a benchmark; returns which process did it.

        `again`: with the second answers to what timed out. A judge is asked first, if the benchmark has one and `asks`
        is true. Raises ValueError where it is false and the judge was not asked yet.
        """
        started = time.monotonic()
        planned, config, at = self.planned(name), self.job.suite.benchmarks[name], self.job.address(name, again=again)
        responses = self._responses(name, planned)
        if again and (late := _timed_out(planned, responses)):
            second = self._sealed(self._again_address(late))
            responses = [
                second[request_hash(request)] if first.status == "timeout" else first
                for request, first in zip(planned.requests, responses, strict=True)
            ]
        rows = _rows(planned, responses)
        if isinstance(config, JudgedBenchmark):
            rows = judged(planned.items, rows, config, self.job.resources, asks=asks, again=again)
        scored = score(planned.items, rows, config, self.job.settings(), shown=planned.shown)
        if scored.measurement.failed:
            log.warning("%s: requests without an answer: %s", name, scored.measurement.failed)
        if scored.measurement.undefined:
            log.warning("%s: metrics without a number: %s", name, scored.measurement.undefined)
        with attempts.attempt(at, store=self._store) as attempt:
            report.write_result(attempt, scored.measurement, scored.rows, _official(planned.items, scored.rows, config))
        ran = whoami()
        store.seal(
            BenchmarkResult,
            at,
            attempt,
            facts={"benchmark": config.kind, "model": self.job.model.digest},
            execution=self._execution(time.monotonic() - started, [ran])
            | {"seconds_of": [row.response.seconds for row in rows]},
        )
        return ran

    def rescore(self, name: str) -> None:
        """Score sealed answers again. Raises ValueError for missing answers, and for other scores of one revision."""
        result = self.job.result(name)
        if result is None:
            if pending := self.pending(name):
                raise ValueError(f"{len(pending)} shards of {name!r} were not answered; evaluate it without --rescore")
            self.conclude(name, asks=False)
            return
        planned, config, rows = self.planned(name), self.job.suite.benchmarks[name], report.read_items(result)
        scored = score(planned.items, rows, config, self.job.settings(), shown=planned.shown)
        if scored != Scored(report.read_result(result), rows):
            raise ValueError(
                f"benchmark {name!r} gives the answers of {result.uri} other scores than are sealed there; raise the "
                f"REVISION of its module ({config.kind})"
            )

    def shown(self, name: str) -> list[ShownRow]:
        """The rows of a benchmark's sealed result, with what the target was shown."""
        result = self.job.result(name)
        assert result is not None
        rows, planned, config = report.read_items(result), self.planned(name), self.job.suite.benchmarks[name]
        scores = item_scores(metric_values(planned.items, rows, config))
        return shown_rows(planned.requests, planned.items, rows, scores, partial(_tokenizer, self.job, name))

    def _is_sealed(self, name: str, shard: int) -> bool:
        return store.find(Answers, self._address(name, shard), store=self._store) is not None

    @property
    def _store(self) -> str:
        return self.job.resources.storage.store

    def _execution(self, seconds: float, ran: list[dict[str, Any]]) -> dict[str, Any]:
        facts = execution(launch=self.job.resources.launch, seconds=seconds, ran=ran)
        if isinstance(self.job.model, Endpoint):
            return facts
        device = describe(device_of(self.job.resources.device))
        return facts | {"engine": engine_facts(self.job.resources.evaluate.engine), "device": device}

    def planned(self, name: str) -> Planned:
        """The items and requests of a benchmark. Raises ValueError where the target cannot be asked them."""
        if name not in self._planned:
            config = self.job.suite.benchmarks[name]
            items, image_of = read_items(self.job, name), _image_of(self.job, name)
            shown: Mapping[str, str] = {}
            if isinstance(config, OfficialBenchmark) and config.few_shot:
                prompts = FewShotPlan(self.job, name, items, image_of, self._features).prompts()
                requests, shown = prompts.requests, prompts.answers
            else:
                requests = list(benchmark_of(config.kind).requests(items, config, partial(_tokenizer, self.job, name)))
            if isinstance(self.job.model, Endpoint):
                check_answerable(name, requests)
            shards = shards_of(requests, {item.id: item.group for item in items})
            self._planned[name] = Planned(items, shards, image_of, shown)
        return self._planned[name]

    def _features(self, images: Sequence[Image | SealedImage], image_of: ImageOf) -> NDArray[np.float64]:
        assert isinstance(self.target, EngineTarget)  # an endpoint is refused before
        return self.target.features(images, image_of)

    def _address(self, name: str, shard: int) -> store.Address:
        return self.job.answers_address([request_hash(request) for request in self.planned(name).shards[shard]])

    def _again_address(self, late: Sequence[Request]) -> store.Address:
        return self.job.answers_address([request_hash(request) for request in late], again=True)

    def _responses(self, name: str, planned: Planned) -> list[Response]:
        """The responses of all shards, in the order of the requests."""
        responses = []
        for number, shard in enumerate(planned.shards):
            of_shard = self._sealed(self._address(name, number))
            responses += [of_shard[request_hash(request)] for request in shard]
        return responses

    def _sealed(self, at: store.Address) -> dict[str, Response]:
        """Sealed responses with the seconds that each took."""
        answers = store.find(Answers, at, store=self._store)
        if answers is None:
            raise RuntimeError(f"the shard at {at.uri(self._store)} was not answered")
        seconds = store.read_manifest(answers.uri)["execution"]["seconds_of"]
        responses = read_responses(store.file(answers, RESPONSES))
        return {key: replace(one, seconds=seconds[key]) for key, one in responses.items()}


def _timed_out(planned: Planned, responses: Sequence[Response]) -> list[Request]:
    return [one for one, response in zip(planned.requests, responses, strict=True) if response.status == "timeout"]


def _rows(planned: Planned, responses: Sequence[Response]) -> list[ItemRow]:
    """The responses as rows, in the order of the requests."""
    item_of = {item.id: item for item in planned.items}
    return [row_of(item_of[one.item], one, response) for one, response in zip(planned.requests, responses, strict=True)]


def _target(job: EvalJob) -> Target:
    evaluate, storage = job.resources.evaluate, job.resources.storage
    if isinstance(job.model, Endpoint):
        return EndpointTarget(job.model, evaluate.endpoint)
    options = EngineOptions(
        feature_root=storage.scratch() / "features",
        features_leave_free=storage.features_leave_free,
        threads=evaluate.threads_per_worker,
        precision=job.suite.precision,
        device=job.resources.device,
        keep_prefixes=True,
    )
    return EngineTarget(job.model, evaluate.engine, options)


def _tokenizer(job: EvalJob, name: str) -> "Tokenizer":
    if isinstance(job.model, Endpoint):
        raise ValueError(
            f"benchmark {name!r} is written in token ids, which the endpoint {job.model.url} does not take; measure it "
            f"on a checkpoint, or leave it out of the suite"
        )
    return tokenizer_of(job.model)


def answered(target: Target, requests: Sequence[Request], image_of: ImageOf) -> dict[str, Response]:
    """The responses by the hashes of the requests; equal requests are asked once, and unreadable ones not at all."""
    distinct = {request_hash(request): request for request in requests}
    reasons = {key: unreadable(request) for key, request in distinct.items()}
    asked = [key for key, reason in reasons.items() if reason is None]
    given = dict(zip(asked, target.answer([distinct[key] for key in asked], image_of), strict=True))
    return {
        key: given[key] if reason is None else Response(status="unreadable", detail=reason)
        for key, reason in reasons.items()
    }


def read_items(job: EvalJob, name: str) -> Sequence[Item]:
    """The items of a benchmark of a job, from sealed files or held-out data. Raises CorruptArtifact and ValueError."""
    config = job.suite.benchmarks[name]
    if isinstance(config, OfficialBenchmark):
        return items_of(job.files[name], first=config.first)
    source = HeldOut(job.inputs(), partial(_tokenizer, job, name))
    return tuple(benchmark_of(config.kind).read(source, config))


def row_of(item: Item, request: Request, response: Response) -> ItemRow:
    """The row of a request."""
    return ItemRow(
        item=item.id,
        group=item.group,
        slices=item.slices,
        condition=request.condition,
        rotation=request.rotation,
        shots=request.shots,
        response=response,
        reference_hash=reference_hash(item.references),
    )


def _official(items: Sequence[Item], rows: Sequence[ItemRow], config: Any) -> dict[str, bytes]:
    """The files that a server or an official script reads, by their names; empty where there is none."""
    written = getattr(benchmark_of(config.kind), "official_files", None)
    return written(items, rows, config) if written else {}


def _image_of(job: EvalJob, name: str) -> ImageOf:
    sealed = [files[name] for files in (job.files, job.pools) if name in files]
    return SealedImages(*sealed) if sealed else _no_image


def _no_image(image: SealedImage) -> bytes:
    raise TypeError(f"held-out data has its images in its requests, not under the key {image.key}")
