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


class Share(Config):
    """One source's part of an epoch."""

    samples: int
    """That the source has to train on."""
    tokens: int
    """Of those samples."""
    samples_per_epoch: int
    repeats: float
    """How often an epoch sees each sample, in the mean."""
    sample_share: float
    token_share: float
    """Of an epoch, in the mean over epochs."""


class Composition(Config):
    """An epoch: as many samples (or tokens, where the blend shares those) as the sources have, unless repeats say."""

    shares: dict[str, Share]
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
    drawn = {name: max(1, round(count)) for name, count in _samples_per_epoch(mixture, sizes).items()}
    tokens = {name: drawn[name] * size.tokens / size.samples for name, size in sizes.items()}
    shares = {
        name: Share(
            samples=size.samples,
            tokens=size.tokens,
            samples_per_epoch=drawn[name],
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
    # In tokens a sample counts its source's mean length.
    units = {name: getattr(size, blend.unit) / size.samples for name, size in sizes.items()}
    return {name: whole * masses[name] / units[name] for name in sizes}


def _notes(mixture: Mixture, shares: Mapping[str, Share]) -> tuple[str, ...]:
    if isinstance(mixture.blend, ByRepeats):
        return ()
    unit = mixture.blend.unit
    wanted = {name: share.sample_share if unit == "samples" else share.token_share for name, share in shares.items()}
    return tuple(
        f"source {name!r} has {share.samples} samples, too few for {wanted[name]:.1%} of the {unit} of an epoch: "
        f"each is seen {share.repeats:.3g} times an epoch"
        for name, share in shares.items()
        if share.repeats > 1 + TOLERANCE
    )
