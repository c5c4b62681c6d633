"""Axes and lines of drawings. Pure."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

Point = tuple[float, float]


@dataclass(frozen=True)
class Axis:
    """A scale with round ticks, drawn from `lowest` to `highest` percent of a drawing's width or height."""

    low: float
    high: float
    step: float
    """Distance between ticks."""
    lowest: float
    highest: float

    @property
    def ticks(self) -> list[float]:
        """The multiples of the step between the ends."""
        first, last = math.ceil(self.low / self.step - 1e-9), math.floor(self.high / self.step + 1e-9)
        return [index * self.step for index in range(first, last + 1)]

    def at(self, value: float) -> float:
        """The position of a value in percent."""
        share = (value - self.low) / (self.high - self.low)
        return round(self.lowest + share * (self.highest - self.lowest), 2)

    def label(self, tick: float) -> str:
        """The text of a tick, with as many decimals as distinguish it from its neighbours."""
        decimals = max(0, -math.floor(math.log10(self.step) + 1e-9))
        decimals += not math.isclose(self.step, round(self.step, decimals))
        return f"{tick:,.{decimals}f}".replace("-", "−")


def axis(values: Iterable[float], *, ticks: int, lowest: float = 5, highest: float = 95) -> Axis:
    """An axis from the lowest to the highest value, with at least two ticks and at most `ticks` + 1."""
    known = [value for value in values if math.isfinite(value)] or [0.0]
    low, high = min(known), max(known)
    if low == high:
        low, high = low - 0.5, high + 0.5
    rough = (high - low) / ticks
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * digit for digit in (1, 2, 2.5, 5, 10) if power * digit >= rough * 0.999)
    return Axis(low, high, step, lowest, highest)


def polyline(points: Iterable[Point]) -> str:
    """Points in the form of an SVG attribute."""
    return " ".join(f"{x},{y}" for x, y in points)
