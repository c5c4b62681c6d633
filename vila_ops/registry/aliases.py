"""Which version each alias of a registered model points to, and every move that led there. Pure.

A version is its number in the registry; None stands for an alias that points nowhere.
"""

from collections.abc import Mapping
from datetime import datetime
from typing import Literal, get_args

from vila_ops.artifacts.kinds import Checkpoint, ModelVersion
from vila_ops.config import Config
from vila_ops.errors import PromotionRaceLost

Alias = Literal["champion", "challenger", "previous"]
CHAMPION: Alias = "champion"
"""The version that is served and that other versions are compared with."""
CHALLENGER: Alias = "challenger"
"""The version that may become the champion once it has proved itself beside it."""
PREVIOUS: Alias = "previous"
"""The champion before the present one."""
ALIASES: tuple[Alias, ...] = get_args(Alias)


class Move(Config):
    """One change of a model's aliases."""

    number: int
    """1 for the first move of a model, and one more for each that follows."""
    token: str
    """Random, so that a process recognises its own move after an answer was lost."""
    when: str
    """UTC, ISO 8601, by the clock of the process that made it."""
    reason: str
    aliases: dict[Alias, int]
    """Where the aliases point after it, without those that point nowhere."""

    def time(self) -> datetime:
        """When it was made."""
        return datetime.fromisoformat(self.when)


class AliasRecord(Config):
    """The content of a model's register."""

    checkpoints: dict[int, Checkpoint] = {}
    """Of every version that an alias has pointed to."""
    history: tuple[Move, ...] = ()

    def aliases(self) -> dict[Alias, int]:
        """Where the aliases point, without those that point nowhere."""
        return self.history[-1].aliases if self.history else {}

    def version(self, alias: Alias) -> int | None:
        """The version that an alias points to."""
        return self.aliases().get(alias)

    def model_version(self, name: str, alias: Alias) -> ModelVersion | None:
        """The version that an alias points to, with the artifact reference of its checkpoint."""
        version = self.version(alias)
        if version is None:
            return None
        promoted = version == self.version(CHAMPION)
        return ModelVersion(name=name, version=version, checkpoint=self.checkpoints[version], promoted=promoted)


def aliases_after(aliases: Mapping[Alias, int], changes: Mapping[Alias, int | None]) -> dict[Alias, int]:
    """The aliases after a move of some. A champion that is replaced becomes `previous` unless that is moved too.

    A challenger that becomes the champion is no challenger any more.
    """
    after: dict[Alias, int | None] = {**aliases, **changes}
    champion, former = after.get(CHAMPION), aliases.get(CHAMPION)
    if champion != former and PREVIOUS not in changes:
        after[PREVIOUS] = former
    if after.get(CHALLENGER) == champion:
        after[CHALLENGER] = None
    return {alias: version for alias, version in after.items() if version is not None}


def rival_of(version: int, champion: int | None) -> int | None:
    """The version to compare a version with: the champion, or None where the version is the champion itself."""
    return None if champion == version else champion


def champion_after(version: int, champion: int | None, *, passed: bool) -> int | None:
    """The champion after a version was judged by the gate."""
    return version if passed else champion


def race_lost(name: str, *, version: int | None, champion: int | None, now: int | None) -> PromotionRaceLost:
    """The error of a verdict that does not count, because the champion changed while the version was judged."""
    return PromotionRaceLost(
        f"the champion of {name} became version {now} while version {version} was judged against version {champion}; "
        f"register again to be judged against the new one"
    )
