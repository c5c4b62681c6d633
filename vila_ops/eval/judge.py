"""A judge grades answers: its requests, which are sealed in shards like those of a model, and its part of a name.

A judged benchmark's module also has `judge_requests(items, rows, config)`: a request for each row that is judged.
"""

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from vila_ops.artifacts import attempts, store
from vila_ops.artifacts.execution import execution
from vila_ops.artifacts.kinds import Answers, Endpoint
from vila_ops.config import Resources, fingerprint
from vila_ops.config.benchmarks import Judge, JudgedBenchmark
from vila_ops.eval.benchmark import GenerateRequest, Item, TextPrompt, benchmark_of
from vila_ops.eval.endpoint_target import EndpointTarget
from vila_ops.eval.job import ANSWERS
from vila_ops.eval.prompts import request_hash
from vila_ops.eval.rows import ItemRow, Response, read_responses, write_responses
from vila_ops.eval.shards import shards_of

REPLIES = "answers.parquet"
"""File of a sealed shard of replies."""
_HASH = 8
log = logging.getLogger(__name__)


def judged(
    items: Sequence[Item],
    rows: Sequence[ItemRow],
    config: JudgedBenchmark,
    resources: Resources,
    *,
    asks: bool = True,
    again: bool = False,
) -> list[ItemRow]:
    """Rows with the replies of the config's judge; None where it did not answer.

    Replies that are sealed are not asked for again, but with `again` those that timed out are, once. Raises ValueError
    where `asks` is false and some are not, and what `EndpointTarget.answer` raises.
    """
    judge = config.judge
    if judge is None:
        return list(rows)
    requests = _requests(items, rows, config)
    target = EndpointTarget(_endpoint(judge), resources.evaluate.endpoint, temperature=judge.temperature)
    replies: dict[str, Response] = {}
    for shard in shards_of(requests, {item.id: item.group for item in items}):
        replies |= _replies(shard, target, judge, resources, asks=asks)
        late = [request for request in shard if replies[request_hash(request)].status == "timeout"]
        if again and late:
            replies |= _replies(late, target, judge, resources, asks=asks, again=True)
    by_item = {request.item: replies[request_hash(request)] for request in requests}
    if failed := {item: reply.status for item, reply in by_item.items() if reply.answer is None}:
        log.warning("%s: the judge %s failed on %d items: %s", _kind(config), judge.model, len(failed), failed)
    return [replace(row, judge_reply=by_item[row.item].answer) if row.item in by_item else row for row in rows]


def _requests(items: Sequence[Item], rows: Sequence[ItemRow], config: JudgedBenchmark) -> list[GenerateRequest]:
    counted = [row for row in rows if row.ok or config.failed_items == "wrong"]
    requests: list[GenerateRequest] = benchmark_of(_kind(config)).judge_requests(items, counted, config)  # type: ignore[attr-defined]
    return requests


def _endpoint(judge: Judge) -> Endpoint:
    return Endpoint(url=judge.url, name=judge.model, revision=judge.revision)


def _replies(
    shard: Sequence[Any],
    target: EndpointTarget,
    judge: Judge,
    resources: Resources,
    *,
    asks: bool,
    again: bool = False,
) -> Mapping[str, Response]:
    """The replies to a shard by the hashes of its requests; asked for and sealed unless they are.

    `again`: the second replies to requests that timed out.
    """
    hashes = [request_hash(request) for request in shard]
    recipe: dict[str, Any] = {"requests": hashes, "temperature": judge.temperature} | ({"again": True} if again else {})
    at = store.address(Answers, revision=ANSWERS, recipe=recipe, parents=(_endpoint(judge).digest,))
    root = resources.storage.store
    sealed = store.find(Answers, at, store=root)
    if sealed is None:
        if not asks:
            raise ValueError(f"the judge {judge.model} was not asked yet; evaluate without --rescore")
        replies = target.answer(shard, _no_image)
        with attempts.attempt(at, store=root) as attempt:
            write_responses(attempt / REPLIES, dict(zip(hashes, replies, strict=True)))
        facts = {"model": _endpoint(judge).digest}
        ran = execution(launch=resources.launch, seconds=sum(one.seconds for one in replies), ran=[])
        sealed = store.seal(Answers, at, attempt, facts=facts, execution=ran)
    return read_responses(store.file(sealed, REPLIES))


def judge_request(row: ItemRow, judge: Judge, text: str) -> GenerateRequest:
    """The request to grade a row."""
    system = (("system", (judge.system,)),) if judge.system else ()
    prompt = TextPrompt((*system, ("user", (text,))))
    return GenerateRequest(item=row.item, prompt=prompt, max_new_tokens=judge.max_new_tokens)


def judged_by(judge: Judge, prompts: Sequence[str]) -> str:
    """The end of the name of a metric: the judge's model and temperature, and a hash of all else that it was told."""
    told = fingerprint([judge.revision, judge.system, judge.max_new_tokens, sorted(set(prompts))])
    model = re.sub(r"[^\w.-]+", "-", judge.model)
    return f"by_{model}_t{judge.temperature:g}_{told[:_HASH]}"


def readable(rows: Sequence[ItemRow], read: Callable[[str], Any]) -> dict[str, Any]:
    """What `read` makes of the judge's reply to each item, but for None."""
    read_replies = {row.item: read(row.judge_reply) for row in rows if row.judge_reply is not None}
    return {item: value for item, value in read_replies.items() if value is not None}


def _kind(config: Any) -> str:
    kind: str = config.kind
    return kind


def _no_image(image: Any) -> bytes:
    raise TypeError(f"a judge reads text alone, and the request has the image {image}")
