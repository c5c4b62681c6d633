"""When a scheduled run may work. It is a parameter of a schedule in infra/prefect.yaml, not of a recipe."""

from pydantic import NonNegativeInt, PositiveInt

from vila_ops.config.base import Config


class Schedule(Config):
    """Windows of time, in each of which a recipe runs at most once, and what happens to those that were missed."""

    window_hours: PositiveInt = 168
    """Length of a window. Windows follow each other without gaps, from Monday, 1970-01-05, 00:00 UTC on."""
    catch_up: NonNegativeInt = 0
    """How many windows before the present one a late run may still be for. 0: a run whose window is over ends at
    once."""
