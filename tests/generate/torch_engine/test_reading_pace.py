"""The time that reading adds between two tokens stays near that of a token, whatever the machine."""

import itertools

import pytest

from vila_ops.generate.torch_engine.reading_pace import MIN_TOKENS, ReadingPace


@pytest.mark.parametrize(
    ("fixed", "token", "expected"),
    [
        (0.03, 0.0006, 11),  # a small model on one CPU thread: a pass through its weights, and what a token adds
        (0.020, 0.00001, 256),  # a device that reads hundreds of tokens as fast as one
        (0.005, 0.01, MIN_TOKENS),  # one whose tokens cost more than its weights
    ],
)
def test_reading_takes_a_fifth_of_the_time_of_decoding_beyond_what_every_pass_takes(
    fixed: float, token: float, expected: int
) -> None:
    pace = ReadingPace(max_tokens=256)
    assert pace.tokens(1, 1) == 256, "nothing was measured yet"
    for length in itertools.islice(itertools.cycle((5, 200, 39)), 60):
        pace.decoded(fixed + token)
        tokens = min(length, pace.tokens(1, 1))
        pace.read(tokens, fixed + tokens * token)
    assert pace.tokens(1, 1) == pytest.approx(expected, rel=0.1)


def test_a_fixed_cost_of_a_pass_that_reads_is_not_taken_for_that_of_its_few_tokens() -> None:
    """In 2 ms + 0.3 ms a token beyond decoding, 13 tokens take a fifth of the time of a pass that decodes in 30 ms."""
    pace = ReadingPace(max_tokens=256)
    for length in itertools.islice(itertools.cycle((2, 100)), 200):
        pace.decoded(0.03)
        tokens = min(length, pace.tokens(1, 1))
        pace.read(tokens, 0.032 + tokens * 0.0003)
    assert 8 <= pace.tokens(1, 1) <= 14


def test_one_slow_pass_changes_little() -> None:
    pace = ReadingPace(max_tokens=256)
    for _ in range(20):
        pace.decoded(0.03)
        pace.read(30, 0.045)
    before = pace.tokens(1, 1)
    pace.read(30, 0.06)
    assert before * 0.75 < pace.tokens(1, 1) < before
    pace.read(30, 0.0)  # faster than decoding, by the clock of a host that does not wait for its device
    assert pace.tokens(1, 1) > before * 0.8


def test_many_requests_that_wait_for_few_answers_get_more_time() -> None:
    pace = ReadingPace(max_tokens=256)
    for _ in range(20):
        pace.decoded(0.03)
        pace.read(30, 0.06)
    assert (pace.tokens(1, 1), pace.seconds(1, 1)) == (6, pytest.approx(0.006))
    assert (pace.tokens(2, 4), pace.seconds(2, 4)) == (6, pytest.approx(0.006))
    assert (pace.tokens(6, 2), pace.seconds(6, 2)) == (18, pytest.approx(0.018))
