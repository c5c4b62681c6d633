from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vila_ops.config import Mixture
from vila_ops.data.loading.mixture import Composition, Size, compose

COYO, MMC4 = 598.7, 2794.0
"""Mean tokens of the recipe's samples: 576 + 22.7, and 4.0 x (576 + 122.5)."""


def mixture(blend: dict[str, Any] | None = None, **shares: dict[str, float]) -> Mixture:
    sources = {name: {"kind": "jsonl", "path": "x", "render": "caption", **more} for name, more in shares.items()}
    return Mixture.model_validate({"name": "m", "sources": sources, **({"blend": blend} if blend else {})})


def drawn(composition: Composition) -> dict[str, int]:
    return {name: share.samples_per_epoch for name, share in composition.shares.items()}


def test_without_weights_sources_share_an_epoch_of_as_many_samples_as_there_are() -> None:
    made = compose(mixture(a={}, b={}, c={}), {"a": Size(60, 600), "b": Size(30, 900), "c": Size(30, 60)})
    assert drawn(made) == {"a": 40, "b": 40, "c": 40}
    assert [share.sample_share for share in made.shares.values()] == pytest.approx([1 / 3] * 3)
    # 40 x 10, 40 x 30 and 40 x 2 tokens
    assert [share.token_share for share in made.shares.values()] == pytest.approx([400 / 1680, 1200 / 1680, 80 / 1680])
    assert made.shares["b"].repeats == pytest.approx(4 / 3)


def test_coyo_is_balanced_against_mmc4_as_the_recipe_does() -> None:
    """One slot of the recipe's index is four COYO samples or one document: 2394.8 tokens against 2794."""
    sizes = {"coyo": Size(4_000_000, round(4_000_000 * COYO)), "mmc4": Size(1_000_000, round(1_000_000 * MMC4))}
    made = compose(mixture(coyo={"weight": 4}, mmc4={"weight": 1}), sizes)
    assert drawn(made) == {"coyo": 4_000_000, "mmc4": 1_000_000}
    assert made.shares["coyo"].token_share == pytest.approx(2394.8 / (2394.8 + 2794.0))  # 46.2 %
    assert made.notes == ()


def test_tokens_are_shared_where_the_blend_says_so() -> None:
    sizes = {"coyo": Size(1_000_000, round(1_000_000 * COYO)), "mmc4": Size(1_000_000, round(1_000_000 * MMC4))}
    made = compose(mixture({"kind": "weight", "unit": "tokens"}, coyo={}, mmc4={}), sizes)
    # Half of 3392.7e6 tokens each: 1696.35e6 / 598.7 and 1696.35e6 / 2794 samples.
    assert drawn(made) == {"coyo": 2_833_389, "mmc4": 607_140}
    assert [share.token_share for share in made.shares.values()] == pytest.approx([0.5, 0.5], abs=1e-6)
    assert [share.wanted for share in made.shares.values()] == pytest.approx([0.5, 0.5])
    assert made.notes == (
        "source 'coyo' has 1000000 samples, too few for 50.0% of the tokens of an epoch: "
        "each is seen 2.83 times an epoch",
    )


def test_temperature_makes_sizes_more_equal() -> None:
    sizes = {"large": Size(90_000, 90_000), "small": Size(10_000, 40_000)}
    by_size = mixture({"kind": "size"}, large={}, small={})
    assert drawn(compose(by_size, sizes)) == {"large": 90_000, "small": 10_000}
    softer = mixture({"kind": "size", "temperature": 2}, large={}, small={})
    assert drawn(compose(softer, sizes)) == {"large": 75_000, "small": 25_000}  # sqrt(9) : 1
    assert [share.wanted for share in compose(softer, sizes).shares.values()] == pytest.approx([0.75, 0.25])
    tokens = mixture({"kind": "size", "unit": "tokens", "temperature": 2}, large={}, small={})
    # sqrt(90) : sqrt(40) = 3 : 2 of 130 000 tokens, of 1 and of 4 tokens a sample
    assert drawn(compose(tokens, sizes)) == {"large": 78_000, "small": 13_000}


def test_repeats_are_whole_passes_and_a_part_of_one() -> None:
    made = compose(
        mixture({"kind": "repeats"}, a={"repeats": 2.5}, b={"repeats": 0.1}, c={}), dict.fromkeys("abc", Size(40, 80))
    )
    assert drawn(made) == {"a": 100, "b": 4, "c": 40}
    assert [share.repeats for share in made.shares.values()] == [2.5, 0.1, 1.0]
    assert [share.wanted for share in made.shares.values()] == pytest.approx([100 / 144, 4 / 144, 40 / 144])
    assert made.notes == (), "what was asked for needs no note"


def test_a_source_too_small_for_its_share_is_said_and_not_dropped() -> None:
    made = compose(mixture(large={}, small={}), {"large": Size(990, 990), "small": Size(10, 10)})
    assert drawn(made) == {"large": 500, "small": 500}
    assert made.notes == (
        "source 'small' has 10 samples, too few for 50.0% of the samples of an epoch: each is seen 50 times an epoch",
    )
    rare = compose(
        mixture(large={"weight": 1000}, small={"weight": 0.001}), {"large": Size(99, 99), "small": Size(1, 1)}
    )
    assert drawn(rare) == {"large": 100, "small": 1}, "at least one sample of each"


def test_a_source_with_nothing_to_train_on_is_named() -> None:
    with pytest.raises(ValueError, match=r"mixture 'm': sources \['b', 'c'\] have no training sample; remove them"):
        compose(mixture(a={}, b={}, c={}), {"a": Size(1, 1), "b": Size(0, 0)})


SIZES = st.tuples(st.integers(1, 10**6), st.integers(1, 3000))
"""Samples, and tokens of each."""


@given(
    counts=st.dictionaries(st.sampled_from("abcdef"), SIZES, min_size=1),
    blend=st.sampled_from(
        [{"kind": kind, "unit": unit, **more} for unit in ("samples", "tokens") for kind, more in
         (("weight", {}), ("size", {}), ("size", {"temperature": 3.0}))]
    ),
)  # fmt: skip
def test_an_epoch_has_the_size_of_the_sources_and_order_of_names_is_nothing(
    counts: dict[str, tuple[int, int]], blend: dict[str, Any]
) -> None:
    sizes = {name: Size(samples, samples * mean) for name, (samples, mean) in counts.items()}
    made = compose(mixture(blend, **{name: {} for name in counts}), sizes)
    unit = blend["unit"]
    total = sum(getattr(size, unit) for size in sizes.values())
    reached = sum(n * (1 if unit == "samples" else counts[name][1]) for name, n in drawn(made).items())
    rounding = sum(1 if unit == "samples" else mean for _, mean in counts.values())
    assert abs(reached - total) <= rounding
    assert sum(share.sample_share for share in made.shares.values()) == pytest.approx(1)
    assert sum(share.token_share for share in made.shares.values()) == pytest.approx(1)
    backwards = compose(mixture(blend, **{name: {} for name in reversed(counts)}), dict(reversed(sizes.items())))
    assert backwards == made
