"""Whether a canary is worse than the stable version: tests that hold their level however often they are read. Pure.

The router draws by a secret hash which conversations go to the canary, with a known share. If the canary is not worse,
what is seen of a conversation says nothing about where it went, so a bet on "canary" gains nothing on average: its
capital is a nonnegative supermartingale, and the chance that it ever reaches 1 / level is at most the level (Ville's
inequality). Nothing is assumed about the rate of errors, the distribution of times or the load, which may change.

Each conversation is counted once, since the requests of one have one place. Bets are mixtures of fixed fractions
(Waudby-Smith and Ramdas, "Estimating means of bounded random variables by betting", JRSS B 86, 2024, sections 4 and 5).
The signs are combined by the mean of their capitals, which is again such a process (Vovk and Wang, "E-values:
calibration, combination and applications", Annals of Statistics 49, 2021, section 3).
"""

import math
from bisect import bisect_left, bisect_right, insort
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

FRACTIONS = (0.1, 0.3, 0.6, 0.9)
"""Of the largest bet at which the capital cannot become negative."""
REFERENCE = 512
"""Earlier values that a value is ranked among."""
WARM_UP = 20
"""Values before the first bet on a rank."""


@dataclass(frozen=True)
class Observation:
    """What is known of the first response of a conversation. None: there was nothing to measure."""

    canary: bool
    share: float
    """The chance with which this conversation was sent to the canary."""
    failed: bool
    seconds: float | None = None
    """Time to the end of the response, or until the client left."""
    length: int | None = None
    """Characters of the answer."""
    degenerate: bool | None = None
    """Whether the answer is empty or repeats itself."""


class EventBet:
    """Capital of bets that events, such as errors, come from the canary.

    The canary is not worse if an event is at most `ratio` times as likely on it as on the stable version.
    """

    def __init__(self, ratio: float) -> None:
        self._ratio = ratio
        self._logs = [0.0] * len(FRACTIONS)

    def add(self, *, canary: bool, share: float) -> None:
        """Count an event."""
        at_most = share * self._ratio / (share * self._ratio + 1 - share)
        for index, fraction in enumerate(FRACTIONS):
            self._logs[index] += math.log1p(fraction * (canary - at_most) / at_most)

    def capital(self) -> float:
        """The capital now; it started with 1."""
        return _mean_of(self._logs)


class RankBet:
    """Capital of bets that high values come from the canary (or low ones, with `lower`).

    The canary is not worse if its values, divided by `ratio` (multiplied, with `lower`), are not stochastically larger
    (smaller) than those of the stable version. A score that increases with the rank keeps the supermartingale.
    """

    def __init__(self, ratio: float, *, lower: bool = False) -> None:
        self._factor, self._lower = ratio if lower else 1 / ratio, lower
        self._recent: deque[float] = deque()
        self._sorted: list[float] = []
        self._bets = list(product((_signed, _extreme), FRACTIONS))
        self._logs = [0.0] * len(self._bets)

    def add(self, value: float, *, canary: bool, share: float) -> None:
        """Count a value."""
        adjusted = value * self._factor if canary else value
        if len(self._recent) >= WARM_UP:
            below = (bisect_left(self._sorted, adjusted) + bisect_right(self._sorted, adjusted)) / 2
            rank = below / len(self._sorted)
            self._bet(1 - rank if self._lower else rank, canary=canary, share=share)
        self._remember(adjusted)

    def capital(self) -> float:
        """The capital now; it started with 1."""
        return _mean_of(self._logs)

    def _bet(self, rank: float, *, canary: bool, share: float) -> None:
        for index, (score, fraction) in enumerate(self._bets):
            most = 1 / max(share, 1 - share) if score is _signed else 1 / share
            self._logs[index] += math.log1p(fraction * most * (canary - share) * score(rank))

    def _remember(self, value: float) -> None:
        self._recent.append(value)
        insort(self._sorted, value)
        if len(self._recent) > REFERENCE:
            del self._sorted[bisect_left(self._sorted, self._recent.popleft())]


def _signed(rank: float) -> float:
    """From -1 to 1: finds a shift of all values."""
    return 2 * rank - 1


def _extreme(rank: float) -> float:
    """From 0 to 1, above three quarters of the values: finds a canary whose values are nearly all extreme."""
    return max(0.0, 4 * rank - 3)


def _mean_of(logs: list[float]) -> float:
    return sum(math.exp(min(log, 700.0)) for log in logs) / len(logs)


class CanaryTest:
    """The signs of a canary together, at one level."""

    def __init__(self, level: float, *, slower: float, more_errors: float, drift: float) -> None:
        self._level = level
        self._errors, self._degenerate = EventBet(more_errors), EventBet(more_errors)
        self._slower = RankBet(slower)
        self._longer, self._shorter = RankBet(drift), RankBet(drift, lower=True)
        self._capitals: dict[str, Callable[[], float]] = {
            "more errors": self._errors.capital,
            "slower": self._slower.capital,
            "longer answers": self._longer.capital,
            "shorter answers": self._shorter.capital,
            "empty or repeating answers": self._degenerate.capital,
        }

    def add(self, seen: Observation) -> None:
        """Count the first response of a conversation."""
        if seen.failed:
            self._errors.add(canary=seen.canary, share=seen.share)
        if seen.degenerate:
            self._degenerate.add(canary=seen.canary, share=seen.share)
        if seen.seconds is not None:
            self._slower.add(seen.seconds, canary=seen.canary, share=seen.share)
        if seen.length is not None:
            self._longer.add(seen.length, canary=seen.canary, share=seen.share)
            self._shorter.add(seen.length, canary=seen.canary, share=seen.share)

    def verdict(self) -> str | None:
        """Why the canary is worse; None while that is not shown at the level."""
        capitals = {sign: capital() for sign, capital in self._capitals.items()}
        mean = sum(capitals.values()) / len(capitals)
        if mean < 1 / self._level:
            return None
        sign = max(capitals, key=capitals.__getitem__)
        return f"{sign} than the stable version, shown at level {self._level:g} (e-value {mean:.3g})"
