"""An OpenAI-compatible endpoint as the target of an evaluation.

Requests are sent at the same time, as many as the endpoint answers: the number grows by one with each answer until the
first overload, is halved by an overload, and then grows by one in a round (additive increase, multiplicative decrease).
"""

import asyncio
import logging
import os
import time
from collections.abc import Sequence
from typing import Any

import httpx

from vila_ops.artifacts.kinds import Endpoint
from vila_ops.config import fingerprint
from vila_ops.config.resources import EndpointResources
from vila_ops.data.records import Image
from vila_ops.data.shards import data_url
from vila_ops.errors import EndpointRefused, EndpointUnreachable
from vila_ops.eval.benchmark import GenerateRequest, Request, SealedImage, TextPrompt
from vila_ops.eval.engine_target import cut
from vila_ops.eval.prompts import ImageOf
from vila_ops.eval.rows import Response, Status

FIRST_CONCURRENCY = 16
"""Requests that start together end together, so that an engine reads the prompts of the next ones in one pass."""
FIRST_WAIT_SECONDS = 0.5
"""Before the first retry; doubled for each further one."""
LONGEST_WAIT_SECONDS = 30.0
OVERLOADED = (429, 502, 503, 504)
"""Statuses that say that the endpoint has too much to do."""
REFUSED = ("content_filter", "refusal")
"""Finish reasons of answers that were held back."""
TOO_LONG = "context_length_exceeded"
log = logging.getLogger(__name__)


def check_answerable(name: str, requests: Sequence[Request]) -> None:
    """Raise ValueError for a benchmark that asks for more than an endpoint gives: likelihoods or states."""
    if other := next((one for one in requests if not isinstance(one, GenerateRequest)), None):
        raise ValueError(
            f"benchmark {name!r} needs {_needs(other)}, which no chat endpoint gives; measure it on a checkpoint, set "
            f"its prompt's answer to kind generate, or leave it out of the suite"
        )
    if any(not isinstance(one.prompt, TextPrompt) or not one.prompt.is_chat for one in requests):
        raise ValueError(
            f"benchmark {name!r} is written as running text, which no chat endpoint takes; set its prompt's format to "
            f"chat, or measure it on a checkpoint"
        )


def _needs(request: Request) -> str:
    return {"ScoreRequest": "likelihoods"}.get(type(request).__name__, "hidden states")


class Concurrency:
    """How many requests are under way, and may be."""

    def __init__(self, most: int) -> None:
        self.limit, self._most, self._running = float(min(FIRST_CONCURRENCY, most)), most, 0
        self._grows_fast, self._halved = True, 0.0
        self._changed = asyncio.Condition()

    async def __aenter__(self) -> None:
        async with self._changed:
            await self._changed.wait_for(lambda: self._running < int(self.limit))
            self._running += 1

    async def __aexit__(self, *_: object) -> None:
        async with self._changed:
            self._running -= 1
            self._changed.notify(max(1, int(self.limit) - self._running))  # each one woken takes time from the others

    def answered(self) -> None:
        """One request was answered."""
        self.limit = min(self._most, self.limit + (1 if self._grows_fast else 1 / self.limit))

    def overloaded(self, *, started: float) -> None:
        """The endpoint had too much to do, or did not answer in time, for a request that was sent at `started`.

        Requests that were sent before the last halving say nothing about the number since then.
        """
        if started >= self._halved:
            self.limit, self._grows_fast, self._halved = max(1.0, self.limit / 2), False, time.monotonic()


class EndpointTarget:
    """Answers chat requests by an endpoint."""

    def __init__(self, endpoint: Endpoint, how: EndpointResources, *, temperature: float = 0.0) -> None:
        self._endpoint, self._how, self._temperature = endpoint, how, temperature
        self._limit: float | None = None

    def close(self) -> None:
        """Nothing stays open between shards."""

    def answer(self, requests: Sequence[Request], image_of: ImageOf) -> list[Response]:
        """The responses in the order of the requests. A request that failed after all retries has a status.

        Raises EndpointUnreachable where the endpoint does not listen, and EndpointRefused for a wrong key, model or
        URL: nothing is sealed then.
        """
        return asyncio.run(self._answer(requests, image_of))

    async def _answer(self, requests: Sequence[Request], image_of: ImageOf) -> list[Response]:
        key = os.environ.get(self._how.key_variable)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        concurrency = Concurrency(self._how.max_concurrency)
        if self._limit is not None:  # what the endpoint bore before
            concurrency.limit = self._limit
        limits = httpx.Limits(max_connections=self._how.max_concurrency)
        client = httpx.AsyncClient(
            base_url=self._endpoint.url.rstrip("/"),
            headers=headers,
            timeout=self._how.timeout_seconds,
            limits=limits,
            trust_env=False,
        )
        async with client:
            responses = await asyncio.gather(*(self._ask(client, concurrency, one, image_of) for one in requests))
        self._limit = concurrency.limit
        return responses

    async def _ask(
        self, client: httpx.AsyncClient, concurrency: Concurrency, request: Request, image_of: ImageOf
    ) -> Response:
        """The response after as many tries as it takes, or may take."""
        assert isinstance(request, GenerateRequest)
        assert isinstance(request.prompt, TextPrompt)
        response = Response(status="error", detail="not tried")
        for attempt in range(1 + self._how.max_retries):
            async with concurrency:
                started = time.monotonic()
                body = self._body(request, request.prompt, image_of)
                tried, wait = await self._once(client, body)
                if wait is None:
                    concurrency.answered()
                    return self._read(tried, request, body, time.monotonic() - started)
                concurrency.overloaded(started=started)
            response = self._failed(tried)
            if attempt < self._how.max_retries:
                await asyncio.sleep(min(max(wait, FIRST_WAIT_SECONDS * 2**attempt), LONGEST_WAIT_SECONDS))
        if isinstance(tried, httpx.TransportError) and not isinstance(tried, httpx.TimeoutException):
            raise EndpointUnreachable(f"{self._endpoint.url} does not answer: {tried!r}") from tried
        return response

    async def _once(
        self, client: httpx.AsyncClient, body: dict[str, Any]
    ) -> tuple[httpx.Response | httpx.TransportError, float | None]:
        """What one try gave, and the seconds to wait before the next one; None if another try would not help."""
        try:
            given = await client.post("/chat/completions", json=body)
        except httpx.TransportError as error:
            return error, 0.0
        if given.status_code in OVERLOADED or given.status_code == httpx.codes.INTERNAL_SERVER_ERROR:
            after = given.headers.get("retry-after", "")
            return given, float(after) if after.replace(".", "", 1).isdigit() else 0.0
        return given, None

    def _body(self, request: GenerateRequest, prompt: TextPrompt, image_of: ImageOf) -> dict[str, Any]:
        messages = [
            {"role": role, "content": [_content(part, image_of) for part in parts]} for role, parts in prompt.turns
        ]
        return {
            "model": self._endpoint.name,
            "messages": messages,
            "max_tokens": request.max_new_tokens,
            "temperature": self._temperature,
        }

    def _failed(self, tried: httpx.Response | httpx.TransportError) -> Response:
        if isinstance(tried, httpx.TimeoutException):
            return Response(status="timeout", detail=f"no answer in {self._how.timeout_seconds:g} s")
        if isinstance(tried, httpx.Response):
            return Response(status="error", detail=f"HTTP {tried.status_code}: {tried.text[:500]}")
        return Response(status="error", detail=repr(tried))

    def _read(self, given: Any, request: GenerateRequest, body: dict[str, Any], seconds: float) -> Response:
        """The response in what the endpoint sent. Raises EndpointRefused for a wrong key, model or URL."""
        assert isinstance(given, httpx.Response)
        if given.status_code in (401, 403, 404):
            raise EndpointRefused(f"{given.request.url} refused with HTTP {given.status_code}: {given.text[:500]}")
        if given.status_code != httpx.codes.OK:
            status: Status = "too_long" if TOO_LONG in given.text else "error"
            return Response(status=status, detail=f"HTTP {given.status_code}: {given.text[:500]}", seconds=seconds)
        try:
            completion = given.json()
            choice, usage = completion["choices"][0], completion.get("usage") or {}
            text, reason = choice["message"]["content"], choice.get("finish_reason")
        except (ValueError, LookupError, TypeError) as error:
            return Response(status="error", detail=f"no chat completion ({error!r}): {given.text[:500]}")
        if reason in REFUSED or text is None:
            return Response(status="refused", detail=str(choice["message"].get("refusal") or reason), seconds=seconds)
        valid = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # JSON may hold half a pair
        answer, was_cut = cut(valid, request.stop)
        return Response(
            answer=answer.strip(),
            finish_reason="stop" if was_cut else reason,
            prompt_hash=fingerprint(body["messages"]),
            prompt_tokens=usage.get("prompt_tokens"),
            answer_tokens=usage.get("completion_tokens"),
            seconds=seconds,
        )


def _content(part: Any, image_of: ImageOf) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    data = image_of(part) if isinstance(part, SealedImage) else part.data
    assert isinstance(part, (SealedImage, Image))
    return {"type": "image_url", "image_url": {"url": data_url(data)}}
