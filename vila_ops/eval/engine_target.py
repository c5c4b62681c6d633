"""A model in this process as the target of an evaluation: requests in, responses out."""

import itertools
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vila_ops.artifacts.kinds import Checkpoint, Pretrained
from vila_ops.config.engine import OwnEngine
from vila_ops.config.images import Webp
from vila_ops.data.containers import BadImage
from vila_ops.data.images import square
from vila_ops.data.records import Image
from vila_ops.data.text.conversation import Tokenizer
from vila_ops.eval.benchmark import GenerateRequest, Request, ScoreRequest, SealedImage, StatesRequest
from vila_ops.eval.prompts import ImageOf, prompt_hash, tokenised, unreadable
from vila_ops.eval.rows import Response
from vila_ops.generate.engine import (
    Engine,
    EngineOptions,
    generate_all,
    hidden_states_of,
    image_features_of,
    score_all,
)
from vila_ops.generate.load import load_engine
from vila_ops.generate.request import Loglikelihood, Output, Prompt, Sampling


class EngineTarget:
    """Answers requests with an engine, which is loaded when the first one is asked."""

    def __init__(self, model: Checkpoint | Pretrained, config: OwnEngine, options: EngineOptions) -> None:
        self._load = partial(load_engine, model, config, options)
        self._asked = itertools.count()

    @cached_property
    def engine(self) -> Engine:
        """The loaded model."""
        return self._load()

    def close(self) -> None:
        """Release the model."""
        if "engine" in self.__dict__:
            self.engine.close()

    def answer(self, requests: Sequence[Request], image_of: ImageOf) -> list[Response]:
        """The responses in the order of the requests. What they are does not depend on what was asked before."""
        squares: dict[str, bytes] = {}

        def shown(image: SealedImage) -> bytes:
            if image.key not in squares:
                squares[image.key] = self._square(image_of(image))
            return squares[image.key]

        prompts = [self._prompt(request, shown) for request in requests]
        responses: list[Response] = [one if isinstance(one, Response) else Response() for one in prompts]
        asked = [number for number, one in enumerate(prompts) if isinstance(one, Prompt)]
        for kind, ask in (
            (GenerateRequest, self._generate),
            (ScoreRequest, self._score),
            (StatesRequest, self._states),
        ):
            own = [number for number in asked if isinstance(requests[number], kind)]
            given: Any = [(requests[number], prompts[number]) for number in own]
            for number, response in zip(own, ask(given) if given else [], strict=True):
                responses[number] = response
        return responses

    def features(self, images: Sequence[Image | SealedImage], image_of: ImageOf) -> NDArray[np.float64]:
        """Means over patches (I, C) of the tower's features of images. Raises BadImage."""
        squares = [one.data if isinstance(one, Image) else self._square(image_of(one)) for one in images]
        return image_features_of(self.engine, squares)

    def _square(self, data: bytes) -> bytes:
        fit, size = self.engine.image_aspect_ratio, self.engine.image_size
        return square(data, size=size, fit=fit, encoding=Webp())

    def _prompt(self, request: Request, shown: ImageOf) -> Prompt | Response:
        """The prompt of a request, or the response to one that cannot be asked."""
        try:
            prompt = tokenised(request.prompt, self.engine.tokenizer, shown)
        except BadImage as error:
            return Response(status="unreadable", detail=str(error))
        length = len(prompt.input_ids) + longest_answer(request, self.engine.tokenizer)
        if length > self.engine.context_length:
            detail = f"{length} tokens with the answer, and the model's context has {self.engine.context_length}"
            return Response(status="too_long", detail=detail)
        return prompt

    def _generate(self, given: Sequence[tuple[GenerateRequest, Prompt]]) -> list[Response]:
        """Prompts of similar length are read together, the longest first.

        What an engine keeps of them, such as an image that others ask about too, is for this call alone.
        """
        stop_ids, salt = frozenset(self.engine.tokenizer.stop_ids), f"{next(self._asked)}"
        started, outputs = time.monotonic(), dict[int, Output]()
        order = sorted(range(len(given)), key=lambda number: -len(given[number][1].input_ids))
        for length in sorted({request.max_new_tokens for request, _ in given}):
            own = [number for number in order if given[number][0].max_new_tokens == length]
            prompts = [replace(given[number][1], cache_salt=salt) for number in own]
            answers = generate_all(self.engine, prompts, Sampling(length, stop_ids))
            outputs |= dict(zip(own, answers, strict=True))
        seconds = (time.monotonic() - started) / len(given)
        return [
            self._generated(request, prompt, outputs[number], seconds) for number, (request, prompt) in enumerate(given)
        ]

    def _generated(self, request: GenerateRequest, prompt: Prompt, output: Output, seconds: float) -> Response:
        text = self.engine.tokenizer.decode(output.ids)
        answer, was_cut = cut(text, request.stop)
        return Response(
            answer=answer.strip(),
            finish_reason="stop" if was_cut else output.finish_reason,
            prompt_hash=prompt_hash(prompt),
            prompt_tokens=len(prompt.input_ids),
            answer_tokens=len(output.ids),
            seconds=seconds,
        )

    def _score(self, given: Sequence[tuple[ScoreRequest, Prompt]]) -> list[Response]:
        started = time.monotonic()
        tokenizer = self.engine.tokenizer
        items = [(prompt, [_ids(one, tokenizer) for one in request.continuations]) for request, prompt in given]
        likelihoods = score_all(self.engine, items)
        seconds = (time.monotonic() - started) / len(given)
        return [
            scored(request, prompt, scores, seconds)
            for (request, prompt), scores in zip(given, likelihoods, strict=True)
        ]

    def _states(self, given: Sequence[tuple[StatesRequest, Prompt]]) -> list[Response]:
        responses = []
        for request, prompt in given:
            started = time.monotonic()
            states = hidden_states_of(self.engine, prompt, request.continuation)
            visual = np.flatnonzero(np.asarray(prompt.input_ids) == self.engine.tokenizer.image_id)
            values = tuple(request.reduce(states, visual, len(request.continuation)))
            own = Response(
                values=values,
                prompt_hash=prompt_hash(prompt),
                prompt_tokens=len(prompt.input_ids),
                answer_tokens=len(request.continuation),
                seconds=time.monotonic() - started,
            )
            responses.append(own if all(map(math.isfinite, values)) else _not_finite(own, "a value of the states"))
        return responses


def longest_answer(request: Request, tokenizer: Tokenizer) -> int:
    """Most tokens after the prompt of a request."""
    match request:
        case GenerateRequest():
            return request.max_new_tokens
        case ScoreRequest():
            return max(len(_ids(one, tokenizer)) for one in request.continuations)
    assert isinstance(request, StatesRequest)
    return len(request.continuation)


def check_context(name: str, requests: Sequence[Request], tokenizer: Tokenizer, limit: int | None) -> None:
    """Raise ValueError, which names the first item, where requests of a benchmark exceed the model's context.

    No image is read: how many tokens it takes is a number of the tokenizer. None as the limit: the config states none.
    """
    asked = [request for request in requests if unreadable(request) is None]
    lengths = [
        len(tokenised(request.prompt, tokenizer, lambda image: b"").input_ids) + longest_answer(request, tokenizer)
        for request in asked
    ]
    too_long = [number for number, length in enumerate(lengths) if limit is not None and length > limit]
    if too_long:
        first = asked[too_long[0]]
        raise ValueError(
            f"benchmark {name!r}: item {first.item!r} with its {len(first.shots)} demonstrations and the answer has "
            f"{lengths[too_long[0]]} tokens, and the model's context has {limit}; {len(too_long)} of {len(asked)} "
            f"requests do not fit, the longest with {max(lengths)}: take fewer few_shot.shots, or fewer "
            f"prompt.answer.max_new_tokens"
        )


def _ids(continuation: list[int] | str, tokenizer: Tokenizer) -> list[int]:
    return tokenizer.text_ids(continuation) if isinstance(continuation, str) else continuation


def scored(request: ScoreRequest, prompt: Prompt, scores: Sequence[Loglikelihood], seconds: float) -> Response:
    """The response to a request for likelihoods. One that is not finite is a failure."""
    nats, tokens = tuple(one.nll for one in scores), tuple(one.tokens for one in scores)
    cost = [one / many for one, many in zip(nats, tokens, strict=True)] if request.per_token else list(nats)
    response = Response(
        answer=request.labels[cost.index(min(cost))] if request.labels else None,
        nats=nats,
        tokens=tokens,
        prompt_hash=prompt_hash(prompt),
        prompt_tokens=len(prompt.input_ids),
        answer_tokens=sum(tokens),
        seconds=seconds,
    )
    return response if all(map(math.isfinite, nats)) else _not_finite(response, "a likelihood")


def _not_finite(response: Response, what: str) -> Response:
    return Response(
        status="not_finite",
        detail=f"{what} is not finite",
        prompt_hash=response.prompt_hash,
        prompt_tokens=response.prompt_tokens,
        seconds=response.seconds,
    )


def cut(text: str, stop: Sequence[str]) -> tuple[str, bool]:
    """The text before the first of the stop texts, and whether there is one."""
    places = [place for one in stop if (place := text.find(one)) >= 0]
    return (text[: min(places)], True) if places else (text, False)
