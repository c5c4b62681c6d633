"""What an epoch of a mixture is made of: how many samples of each source, and so how often each is seen. Pure."""

from collections.abc import Mapping
from typing import NamedTuple, assert_never

from vila_ops.config import Config
from vila_ops.config.mixture import ByRepeats, BySize, ByWeight, Mixture

TOLERANCE = 0.01
"""A hundredth of a source seen once more is rounding, not a finding."""


class Size(NamedTuple):
    """What a source has to train on."""

    samples: int
    tokens: int


class SourceShare(Config):
    """One source's part of an epoch."""

    samples: int
    """That the source has to train on."""
    tokens: int
    """Of those samples."""
    samples_per_epoch: int
    wanted: float
    """Share of the blend's unit (samples where it shares none) that was asked for."""
    repeats: float
    """How often an epoch sees each sample, in the mean."""
    sample_share: float
    token_share: float
    """Of an epoch, in the mean over epochs."""


class Composition(Config):
    """An epoch: as many samples (or tokens, where the blend shares those) as the sources have, unless repeats say."""

    shares: dict[str, SourceShare]
    """In the order of their names."""
    notes: tuple[str, ...]
    """What the reader of a mixture may not expect: sources that an epoch sees more than once to fill their share."""


def compose(mixture: Mixture, sizes: Mapping[str, Size]) -> Composition:
    """The epoch that a mixture's blend makes of sources of these sizes; at least one sample of each.

    Raises ValueError when a source has nothing to train on.
    """
    sizes = {name: sizes.get(name, Size(0, 0)) for name in sorted(mixture.sources)}
    if empty := [name for name, size in sizes.items() if not size.samples]:
        raise ValueError(f"mixture {mixture.name!r}: sources {empty} have no training sample; remove them")
    asked = _samples_per_epoch(mixture, sizes)
    drawn = {name: max(1, round(count)) for name, count in asked.items()}
    masses = {name: count * _mass(mixture, sizes[name]) for name, count in asked.items()}
    tokens = {name: drawn[name] * size.tokens / size.samples for name, size in sizes.items()}
    shares = {
        name: SourceShare(
            samples=size.samples,
            tokens=size.tokens,
            samples_per_epoch=drawn[name],
            wanted=masses[name] / sum(masses.values()),
            repeats=drawn[name] / size.samples,
            sample_share=drawn[name] / sum(drawn.values()),
            token_share=tokens[name] / sum(tokens.values()),
        )
        for name, size in sizes.items()
    }
    return Composition(shares=shares, notes=_notes(mixture, shares))


def _samples_per_epoch(mixture: Mixture, sizes: Mapping[str, Size]) -> dict[str, float]:
    blend = mixture.blend
    match blend:
        case ByRepeats():
            return {name: size.samples * (mixture.sources[name].repeats or 1.0) for name, size in sizes.items()}
        case ByWeight():
            masses = {name: mixture.sources[name].weight or 1.0 for name in sizes}
        case BySize():
            masses = {name: getattr(size, blend.unit) ** (1 / blend.temperature) for name, size in sizes.items()}
        case _:
            assert_never(blend)
    whole = sum(getattr(size, blend.unit) for size in sizes.values()) / sum(masses.values())
    return {name: whole * masses[name] / _mass(mixture, size) for name, size in sizes.items()}


def _mass(mixture: Mixture, size: Size) -> float:
    """What a sample of a source counts in the blend: in tokens its source's mean length."""
    tokens = not isinstance(mixture.blend, ByRepeats) and mixture.blend.unit == "tokens"
    return size.tokens / size.samples if tokens else 1.0


def _notes(mixture: Mixture, shares: Mapping[str, SourceShare]) -> tuple[str, ...]:
    if isinstance(mixture.blend, ByRepeats):
        return ()
    unit = mixture.blend.unit
    return tuple(
        f"source {name!r} has {share.samples} samples, too few for {share.wanted:.1%} of the {unit} of an epoch: "
        f"each is seen {share.repeats:.3g} times an epoch"
        for name, share in shares.items()
        if share.repeats > 1 + TOLERANCE
    )
