"""The composition of an epoch: how many samples of each source, and how often each sample is repeated. Pure."""

from collections.abc import Mapping
from typing import NamedTuple, assert_never

from vila_ops.config import Config
from vila_ops.config.mixture import ByRepeats, BySize, ByWeight, Mixture

TOLERANCE = 0.01
"""Repeats up to 1 + this are due to rounding and are not reported."""


class Size(NamedTuple):
    """The training samples of a source and their tokens."""

    samples: int
    tokens: int


class SourceShare(Config):
    """The share of one source in an epoch."""

    samples: int
    """Training samples of the source."""
    tokens: int
    """Tokens of those samples."""
    samples_per_epoch: int
    wanted: float
    """Share that the blend asks for, in its unit (samples for a blend by repeats)."""
    repeats: float
    """How often a sample is used in an epoch, on average."""
    sample_share: float
    token_share: float
    """Share of the tokens of an epoch, averaged over epochs."""


class Composition(Config):
    """An epoch with as many samples (or tokens, if that is the unit) as the sources, unless the blend is by repeats."""

    shares: dict[str, SourceShare]
    """By source, in the order of names."""
    notes: tuple[str, ...]
    """Warnings about sources that are repeated within an epoch to fill their share."""


def compose(mixture: Mixture, sizes: Mapping[str, Size]) -> Composition:
    """The epoch of a mixture with sources of these sizes; each source has at least one sample in it.

    Raises ValueError if a source has no training sample.
    """
    sizes = {name: sizes.get(name, Size(0, 0)) for name in sorted(mixture.sources)}
    if empty := [name for name, size in sizes.items() if not size.samples]:
        raise ValueError(f"mixture {mixture.name!r}: sources {empty} have no training sample; remove them")
    exact = _samples_per_epoch(mixture, sizes)
    drawn = {name: max(1, round(count)) for name, count in exact.items()}
    masses = {name: count * _mass(mixture, sizes[name]) for name, count in exact.items()}
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
    """The weight of one sample of a source in the blend's unit: for tokens, the source's mean length."""
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
