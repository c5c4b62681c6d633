"""Which version the alias of a registered model points to. Pure.

A version is its number in the registry; None stands for an alias that points nowhere.
"""

from vila_ops.errors import PromotionRaceLost

CHAMPION = "champion"
"""Alias of the version that is served and that other versions are compared with."""


def rival_of(version: int, champion: int | None) -> int | None:
    """The version to compare a version with: the champion, or None where the version is the champion itself."""
    return None if champion == version else champion


def champion_after(version: int, champion: int | None, *, passed: bool) -> int | None:
    """The champion after a version was judged by the gate."""
    return version if passed else champion


def race_lost(name: str, *, version: int, champion: int | None, now: int | None) -> PromotionRaceLost:
    """The error of a verdict that does not count, because the champion changed while the version was judged."""
    return PromotionRaceLost(
        f"the champion of {name} became version {now} while version {version} was judged against version {champion}; "
        f"register again to be judged against the new one"
    )
