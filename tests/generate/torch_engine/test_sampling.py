"""Tokens are drawn from the distributions that stock transformers computes, and penalties are those of OpenAI."""

import math
from typing import Any

import pytest
import torch
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from vila_ops.generate.request import Prompt, Sampling
from vila_ops.generate.torch_engine.request_state import GenerationRequest, RequestState
from vila_ops.generate.torch_engine.sampling import choose, uniform

VOCABULARY, IMAGE = 40, 3
QUANTILE = 3.719
"""Of the normal distribution at 0.9999, by which a draw that is right fails once in 10000 changes of seeds."""
LOGITS = 2 * torch.randn(VOCABULARY + 2, generator=torch.Generator().manual_seed(1))
"""Of one position; the last two ids are beyond the vocabulary."""


def state(prompt: tuple[int, ...] = (1,), answer: tuple[int, ...] = (), **settings: Any) -> RequestState:
    """A request with an answer so far."""
    request = GenerationRequest(Prompt(list(prompt)), Sampling(100, frozenset(), **settings))
    return RequestState(0, request, ids=list(answer))


def chosen(*states: RequestState, logits: torch.Tensor = LOGITS) -> list[int]:
    """The next tokens, each from the same logits."""
    rows = logits.expand(len(states), -1).clone()
    return [one.token for one in choose(rows, states, vocabulary=VOCABULARY, image_id=IMAGE)]


def stock(*processors: Any, prompt: tuple[int, ...] = (1,)) -> torch.Tensor:
    """Probabilities (V,) by stock transformers, of what can be chosen."""
    scores = LOGITS[None, :VOCABULARY].clone()
    scores[:, IMAGE] = -torch.inf
    for processor in processors:
        scores = processor(torch.tensor([prompt]), scores)
    return scores[0].double().softmax(-1)


@pytest.mark.parametrize(
    ("draws", "settings", "processors"),
    [
        (100_000, {"temperature": 1.0}, []),
        (10_000, {"temperature": 0.6, "top_k": 7}, [TemperatureLogitsWarper(0.6), TopKLogitsWarper(7)]),
        (10_000, {"temperature": 1.3, "top_p": 0.8}, [TemperatureLogitsWarper(1.3), TopPLogitsWarper(0.8)]),
        (10_000, {"temperature": 1.0, "min_p": 0.05}, [MinPLogitsWarper(0.05)]),
    ],
    ids=["temperature", "top_k", "top_p", "min_p"],
)
def test_draws_have_the_distribution_of_stock_transformers(
    draws: int, settings: dict[str, Any], processors: list[Any]
) -> None:
    """Pearson's chi-square, by the bound of Wilson and Hilferty (1931)."""
    expected = draws * stock(*processors)
    counts = torch.zeros(VOCABULARY, dtype=torch.double)
    answers = [[5] * length for length in range(2_000)]
    for seed in range(draws // len(answers)):
        request = state(seed=seed, choice=seed % 3, **settings).request
        states = [RequestState(0, request, ids=answer) for answer in answers]
        counts += torch.bincount(torch.tensor(chosen(*states)), minlength=VOCABULARY)
    possible = expected > 0
    assert counts[~possible].sum() == 0
    common = expected >= 5  # the rest is one cell, as the test's approximation asks
    rare = (counts[possible & ~common].sum(), expected[possible & ~common].sum())
    cells = [*zip(counts[common], expected[common], strict=True), *([rare] if rare[1] > 0 else [])]
    statistic = float(sum((count - mean) ** 2 / mean for count, mean in cells))
    freedom = len(cells) - 1
    assert statistic < freedom * (1 - 2 / (9 * freedom) + QUANTILE * math.sqrt(2 / (9 * freedom))) ** 3


def test_a_draw_depends_on_seed_choice_and_position_alone() -> None:
    settings = {"temperature": 1.5, "seed": 7}
    answers = [(5,) * length for length in range(30)]
    alone = [chosen(state(answer=answer, **settings))[0] for answer in answers]
    others = [state(temperature=2.0, seed=number) for number in range(30)]
    mixed = [one for pair in zip(others, (state(answer=a, **settings) for a in answers), strict=True) for one in pair]
    assert chosen(*mixed)[1::2] == alone
    assert len(set(alone)) > 5
    places = {(seed, choice, position) for seed in (0, 1, -1, 2**63) for choice in (0, 1) for position in (0, 1, 2)}
    assert len({uniform(*place) for place in places}) == len(places)
    assert all(0 <= uniform(*place) < 1 for place in places)


def test_requests_without_a_seed_draw_independently() -> None:
    assert len(set(chosen(*(state(temperature=2.0) for _ in range(200))))) > 5


def test_at_temperature_0_and_near_it_the_likeliest_token_is_chosen() -> None:
    likeliest = int(stock().argmax())
    cold = [state(temperature=value) for value in (1e-30, 1e-42, 5e-324)]  # the last two are less than fp32 holds
    assert chosen(state(), *cold, state(top_k=1, temperature=5.0)) == [likeliest] * 5
    assert chosen(state(logit_bias={likeliest: -100.0})) == [int(stock().topk(2).indices[1])]
    assert chosen(state(logit_bias={9: 100.0}), state(logit_bias={IMAGE: 1e9})) == [9, likeliest]


def test_presence_and_frequency_penalties_are_those_of_openais_reference() -> None:
    """mu[j] - c[j] * frequency - (c[j] > 0) * presence, where c counts the answer and not the prompt."""
    logits = torch.full((VOCABULARY + 2,), -10.0)
    logits[[5, 6, 7]] = torch.tensor([3.0, 2.0, 1.0])
    both = {"presence_penalty": 0.5, "frequency_penalty": 0.3}
    rows = [
        state(prompt=(5, 5, 5, 5, 5), **both),  # the prompt does not count
        state(answer=(5,), **both),  # 3 - 0.8 > 2
        state(answer=(5, 5), **both),  # 3 - 1.1 < 2
        state(answer=(5, 5, 6), **both),  # 1.9 > 2 - 0.8
        state(answer=(5, 5, 5, 6, 6), presence_penalty=2.5),  # 0.5, -0.5, 1
        state(answer=(5, 6), frequency_penalty=-1.0),  # a negative one rewards
    ]
    assert chosen(*rows, logits=logits) == [5, 5, 6, 5, 7, 5]


@pytest.mark.parametrize("penalty", [0.5, 1.7])
def test_the_repetition_penalty_is_that_of_stock_transformers(penalty: float) -> None:
    known = tuple(int(one) for one in LOGITS[:VOCABULARY].argsort()[::3])
    expected = stock(RepetitionPenaltyLogitsProcessor(penalty), prompt=known)
    one = state(prompt=(*known[:5], VOCABULARY + 1), answer=known[5:], repetition_penalty=penalty)
    assert chosen(one) == [int(expected.argmax())]


def test_a_repetition_penalty_too_small_for_fp32_still_gives_a_token() -> None:
    positive = int(LOGITS[:VOCABULARY].argmax())
    for temperature in (0.0, 1.0):
        assert chosen(state(answer=(positive,), repetition_penalty=1e-300, temperature=temperature)) == [positive]


def test_log_probabilities_are_of_the_model_before_settings_change_them() -> None:
    nats = LOGITS.log_softmax(-1)
    rows = [state(logprobs=3, logit_bias={9: 100.0}), state(), state(logprobs=0)]
    biased, none, bare = choose(LOGITS.expand(3, -1).clone(), rows, vocabulary=VOCABULARY, image_id=IMAGE)
    assert none.logprob is None
    assert bare.logprob is not None
    assert bare.logprob.top == ()
    assert biased.logprob is not None
    assert (biased.token, biased.logprob.id) == (9, 9)
    assert biased.logprob.logprob == pytest.approx(float(nats[9]))
    nats[[IMAGE, VOCABULARY, VOCABULARY + 1]] = -torch.inf
    ids, values = zip(*biased.logprob.top, strict=True)
    assert list(ids) == nats.topk(3).indices.tolist()
    assert list(values) == pytest.approx(nats.topk(3).values.tolist())


def test_logits_that_are_not_finite_are_an_error() -> None:
    with pytest.raises(RuntimeError, match="not finite"):
        chosen(state(temperature=1.0), logits=torch.full((VOCABULARY + 2,), torch.nan))
    logits = LOGITS.clone()
    logits[7] = torch.inf
    for penalty in (1.0, 1.3, 1e-300):
        with pytest.raises(RuntimeError, match="not finite"):
            chosen(state(answer=(7,), temperature=1.0, repetition_penalty=penalty), logits=logits)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"temperature": -1.0}, "temperature is -1.0; it has to be 0 or more"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_k": -1}, "top_k is -1"),
        ({"min_p": 1.5}, "min_p is 1.5"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0"),
        ({"presence_penalty": math.nan}, "presence_penalty is nan"),
        ({"logit_bias": {1: math.inf}}, "logit_bias is"),
    ],
)
def test_a_setting_outside_of_its_range_is_refused_by_name(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Sampling(1, frozenset(), **settings)
