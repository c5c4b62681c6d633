"""The test of a canary: its bets are fair, it has power, and it holds its level although it is always read.

VILA_CANARIES sets the number of simulated canaries of each kind (`make faults` sets more).
"""

import os
import random

import pytest

from vila_ops.serve.router.sequential import WARM_UP, CanaryTest, EventBet, Observation, RankBet

CANARIES = int(os.environ.get("VILA_CANARIES", "25"))
LEVEL = 0.05
SETTINGS = {"slower": 1.2, "more_errors": 1.5, "drift": 1.5}
REQUESTS = {0.1: 400, 0.25: 200}
"""Share of the canary -> requests within which most bad canaries are recognised, as docs/serving.md says."""


def test_a_bet_on_an_event_is_fair_where_the_canary_is_as_bad_as_is_allowed() -> None:
    """At a quarter of the conversations and three times the rate, half of the events come from the canary."""
    after = []
    for canary in (True, False):
        bet = EventBet(3.0)
        bet.add(canary=canary, share=0.25)
        after.append(bet.capital())
    assert sum(after) / 2 == pytest.approx(1)
    assert after[0] > 1


@pytest.mark.parametrize("lower", [False, True])
@pytest.mark.parametrize("value", [0.5, 10.2, 99.0])
def test_a_bet_on_a_value_is_fair_whatever_the_value(value: float, lower: bool) -> None:
    """The value is already divided by what is allowed on the canary, so both have the same rank."""
    after = {}
    for canary in (True, False):
        bet = RankBet(2.0, lower=lower)
        for number in range(WARM_UP):
            bet.add(number, canary=False, share=0.2)
        assert bet.capital() == 1
        allowed = value / 2 if lower else value * 2
        bet.add(allowed if canary else value, canary=canary, share=0.2)
        after[canary] = bet.capital()
    assert 0.2 * after[True] + 0.8 * after[False] == pytest.approx(1)


def recognised_after(
    draw: random.Random, *, share: float, requests: int, slower: float = 1, errors: float = 0.01, length: float = 1,
    degenerate: float = 0.002,
) -> int | None:  # fmt: skip
    """The request at which a simulated canary is recognised, as the test is read after every one.

    The stable version fails once in a hundred requests, and its times and lengths are log-normal.
    """
    test = CanaryTest(LEVEL, **SETTINGS)
    for number in range(requests):
        canary = draw.random() < share
        failed = draw.random() < (errors if canary else 0.01)
        seconds, letters = draw.lognormvariate(0, 0.5), 100 * draw.lognormvariate(0, 0.7)
        seen = {
            "seconds": seconds * (slower if canary else 1),
            "length": int(letters * (length if canary else 1)),
            "degenerate": draw.random() < (degenerate if canary else 0.002),
        }
        test.add(Observation(canary, share, failed, **({} if failed else seen)))
        if test.verdict():
            return number
    return None


def test_canaries_that_are_as_bad_as_is_allowed_are_rolled_back_at_the_level_at_most() -> None:
    draw = random.Random(int(os.environ.get("VILA_SEED", "1")))
    bad = sum(
        recognised_after(draw, share=0.1, requests=400, slower=1.2, errors=0.015, length=1.5, degenerate=0.003)
        is not None
        for _ in range(2 * CANARIES)
    )
    mean = 2 * CANARIES * LEVEL
    assert bad <= mean + 3 * mean**0.5, "three standard deviations above the level"


@pytest.mark.parametrize("share", REQUESTS)
@pytest.mark.parametrize(
    "fault", [{"slower": 2.0}, {"errors": 0.3}, {"length": 3.0}, {"length": 1 / 3}, {"degenerate": 0.5}], ids=str
)
def test_bad_canaries_are_recognised_within_some_hundred_requests(share: float, fault: dict[str, float]) -> None:
    draw = random.Random(int(os.environ.get("VILA_SEED", "1")))
    numbers = [recognised_after(draw, share=share, requests=REQUESTS[share], **fault) for _ in range(CANARIES)]
    assert sum(number is not None for number in numbers) >= 0.8 * CANARIES


def test_the_verdict_names_the_sign() -> None:
    test = CanaryTest(LEVEL, **SETTINGS)
    for number in range(200):
        test.add(Observation(number % 10 == 0, 0.1, failed=False, seconds=9.0 if number % 10 == 0 else 1.0))
    assert str(test.verdict()).startswith("slower than the stable version, shown at level 0.05")
