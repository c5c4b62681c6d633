"""The next token of each answer, from its logits: bias, penalties, truncation, a draw, and log-probabilities."""

# B rows, V vocabulary

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from vila_ops.errors import UnsupportedSetting
from vila_ops.generate.request import Sampling, TokenLogprob
from vila_ops.generate.torch_engine.request_state import RequestState

HIGHEST = torch.finfo(torch.float32).max
"""What a score becomes at most by a repetition penalty near 0: infinity is no score to draw by."""
LOWEST_TEMPERATURE = torch.finfo(torch.float32).tiny
"""Smaller temperatures may be 0 in fp32, by which nothing can be divided."""
NUCLEUS = 256
"""Likeliest tokens among which `top_p` is looked for first; sorting a whole vocabulary takes milliseconds."""


class Chosen(NamedTuple):
    """The next token of an answer."""

    token: int
    logprob: TokenLogprob | None
    """If the request asks for it."""


def choose(
    logits: Tensor, states: Sequence[RequestState], *, vocabulary: int, image_id: int
) -> list[Chosen | UnsupportedSetting]:
    """The next token of each answer, from the model's logits (B, V), which this changes; or why its grammar has none.

    Only ids below `vocabulary` are chosen, and never `image_id`: a model cannot generate images. Log-probabilities are
    those of the model, before anything is masked. The order of vLLM's sampler: bias, penalties, grammar, temperature,
    `min_p`, `top_k`, then `top_p` of what they leave.
    """
    nats = {
        row: logits[row].float().log_softmax(-1)
        for row, state in enumerate(states)
        if state.request.sampling.logprobs is not None
    }
    logits[:, image_id] = -torch.inf
    scores = logits[:, :vocabulary].float()
    failed: dict[int, UnsupportedSetting] = {}
    for row, state in enumerate(states):
        try:
            _adjust(scores[row], state)
        except UnsupportedSetting as error:
            failed[row] = error
    tokens: list[int] = scores.argmax(-1).tolist()
    drawn = [row for row, state in enumerate(states) if state.request.sampling.temperature > 0]
    if drawn:
        for row, token in zip(drawn, _draw(scores[drawn], [states[row] for row in drawn]), strict=True):
            tokens[row] = token
    reports = {row: _report(nats[row], scores[row], tokens[row], states[row].request.sampling) for row in nats}
    return [failed.get(row) or Chosen(token, reports.get(row)) for row, token in enumerate(tokens)]


def uniform(seed: int, choice: int, position: int) -> float:
    """A number in [0, 1) for the token at a position of an answer.

    It depends on these three alone: a block of the counter-based generator Philox (Salmon et al., SC 2011) with seed
    and choice, each of 64 bits, as its key and the position as its counter.
    """
    bits = np.random.Philox(key=seed % 2**64 | choice % 2**64 << 64, counter=position).random_raw()
    return (int(bits) >> 11) * 2.0**-53


def _adjust(scores: Tensor, state: RequestState) -> None:
    """Apply bias, penalties and grammar to the scores (V,) of a row, in place.

    Presence and frequency penalty as OpenAI's API reference defines them, over the answer; the repetition penalty of
    CTRL (Keskar et al., 2019), over prompt and answer, before them as in vLLM (`apply_penalties` in
    vllm/model_executor/layers/utils.py).
    """
    sampling, answer = state.request.sampling, state.ids
    if sampling.logit_bias:
        scores[_ids(list(sampling.logit_bias), scores)] += scores.new_tensor(list(sampling.logit_bias.values()))
    if sampling.repetition_penalty != 1:
        known = [*state.request.prompt.input_ids, *answer]
        ids = _ids(sorted({one for one in known if one < len(scores)}), scores)
        values = scores[ids]
        factor = sampling.repetition_penalty
        highest = values.clamp(min=HIGHEST)  # infinity for a score that is infinite already, which stays an error
        scores[ids] = torch.where(values > 0, torch.minimum(values / factor, highest), values * factor)
    if answer and (sampling.frequency_penalty or sampling.presence_penalty):
        times = Counter(answer)
        counts = scores.new_tensor(list(times.values()))
        scores[_ids(list(times), scores)] -= sampling.frequency_penalty * counts + sampling.presence_penalty
    if state.request.grammar is not None:
        scores[~state.request.grammar.allowed(len(scores)).to(scores.device)] = -torch.inf


def _ids(ids: list[int], scores: Tensor) -> Tensor:
    return torch.tensor(ids, dtype=torch.long, device=scores.device)


def _draw(scores: Tensor, states: Sequence[RequestState]) -> list[int]:
    """Draw a token for each row of scores (B, V), by the inverse of its distribution function in the order of ids.

    Raises RuntimeError for scores that are no distribution.
    """
    temperatures = scores.new_tensor([state.request.sampling.temperature for state in states])
    temperatures.clamp_(min=LOWEST_TEMPERATURE)
    highest = scores.amax(-1, keepdim=True)  # subtracted first, so that a low temperature does not overflow
    weights = ((scores - highest) / temperatures[:, None]).softmax(-1)
    kept = torch.stack([_truncated(row, state.request.sampling) for row, state in zip(weights, states, strict=True)])
    sums = kept.cpu().double().cumsum(-1)
    draws = [uniform(one.request.seed, one.request.sampling.choice, len(one.ids)) for one in states]
    places = sums[:, -1:] * torch.tensor(draws, dtype=torch.double)[:, None]
    tokens: list[int] = torch.searchsorted(sums, places, right=True)[:, 0].tolist()
    if max(tokens) == sums.shape[1]:
        raise RuntimeError("the model's logits are not finite, so no token can be drawn")
    return tokens


def _truncated(weights: Tensor, sampling: Sampling) -> Tensor:
    """Probabilities (V,) with 0 for the tokens that are not drawn; tokens that tie with the last drawn one are kept."""
    if sampling.min_p > 0:
        weights = weights * (weights >= sampling.min_p * weights.max())
    if 0 < sampling.top_k < len(weights):
        weights = weights * (weights >= weights.topk(sampling.top_k).values[-1])
    if sampling.top_p < 1:
        weights = weights * (weights >= _last_of_nucleus(weights, sampling.top_p))
    return weights


def _last_of_nucleus(weights: Tensor, share: float) -> Tensor:
    """The weight of the last of the likeliest tokens that together reach a share of all weights (V,)."""
    enough, size = share * weights.sum(), min(NUCLEUS, len(weights))
    while (sums := (top := weights.topk(size).values).cumsum(0))[-1] < enough and size < len(weights):
        size = min(16 * size, len(weights))
    return top[(sums < enough).sum().clamp(max=size - 1)]


def _report(nats: Tensor, scores: Tensor, token: int, sampling: Sampling) -> TokenLogprob:
    """The log-probability of a token, and those of the likeliest tokens that can be chosen."""
    assert sampling.logprobs is not None
    possible = nats[: len(scores)].masked_fill(scores == -torch.inf, -torch.inf)
    values, ids = possible.topk(min(sampling.logprobs, len(possible)))
    return TokenLogprob(token, float(nats[token]), tuple(zip(ids.tolist(), values.tolist(), strict=True)))
