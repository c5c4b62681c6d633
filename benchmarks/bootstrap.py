"""Seconds of a paired interval and a test: 10^5 items of two models, 10^4 resamples clustered by image.

Scores are right/wrong, VQA accuracy (five values) and continuous; images have one question or ten. Peers on the same
scores: `scipy.stats.bootstrap` of the differences (no clusters, so with one question an image only; percentile method,
in batches that fit the processor's cache), and the same resampling of images in plain numpy. Their intervals have to
agree with ours. A test is timed on our side only; scipy's `permutation_test` would draw 10^9 signs for it.

Targets: 1 s for interval and test of discrete scores, 30 s for continuous ones with one question an image.
"""

import time
from collections.abc import Callable
from functools import partial
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from result import result
from scipy import stats

from vila_ops.eval.significance import paired_test
from vila_ops.eval.statistics import FloatArray, paired_difference

ITEMS, RESAMPLES = 10**5, 10**4
BATCH = 20
"""Resamples at a time of both peers: 16 MB of indices. 1, 5, 100 and 500 were not faster at 10^5 items."""
TARGET, CONTINUOUS_TARGET = 1.0, 30.0
T = TypeVar("T")
KINDS = ("right_or_wrong", "vqa", "continuous")


def main(items: int = ITEMS, resamples: int = RESAMPLES) -> None:
    cases = {f"{kind}_{size}": case(kind, size, items, resamples) for kind in KINDS for size in (1, 10)}
    discrete = [one["ours"] for name, one in cases.items() if not name.startswith("continuous")]
    continuous = cases["continuous_1"]["ours"]
    result(
        "bootstrap",
        ours=max(discrete),
        peer=cases["right_or_wrong_1"]["scipy"],
        target=TARGET,
        ok=max(discrete) <= TARGET and continuous <= CONTINUOUS_TARGET,
        unit="seconds of interval and test of discrete scores, the slowest of four cases; scipy: interval alone",
        continuous_target=CONTINUOUS_TARGET,
        items=items,
        resamples=resamples,
        seconds=cases,
    )


def case(kind: str, size: int, items: int, resamples: int) -> dict[str, float]:
    """Seconds of ours and of the peers for `size` questions an image."""
    first, second = scores(kind, items, seed=0), scores(kind, items, seed=1)
    images = np.arange(items) // size
    names = [f"COCO_val2014_{image:012d}.jpg" for image in images]
    settings = {"statistic": "mean", "resamples": resamples, "seed": 0}
    interval, seconds = timed(partial(paired_difference, first, second, names, **settings))
    _, test_seconds = timed(partial(paired_test, first, second, names, **settings))
    peers = {"numpy": partial(in_numpy, first - second, images, resamples)}
    if size == 1:
        peers["scipy"] = partial(in_scipy, first - second, resamples)
    measured = {"ours": round(seconds + test_seconds, 3), "interval": round(seconds, 3), "test": round(test_seconds, 3)}
    for name, peer in peers.items():
        (low, high), peer_seconds = timed(peer)
        tolerance = 15 / np.sqrt(resamples) * interval.standard_error  # four standard errors of two quantiles
        if max(abs(low - interval.low), abs(high - interval.high)) > tolerance:
            raise AssertionError(f"{kind}, {size} an image: ours {interval}, {name} {low} to {high}")
        measured[name] = round(peer_seconds, 3)
    return measured


def scores(kind: str, items: int, *, seed: int) -> FloatArray:
    rng = np.random.default_rng(seed)
    match kind:
        case "right_or_wrong":
            return (rng.random(items) < 0.7).astype(np.float64)
        case "vqa":
            return rng.choice([0, 0.3, 0.6, 0.9, 1], size=items, p=[0.3, 0.1, 0.1, 0.1, 0.4])
        case _:
            return rng.normal(size=items)


def in_scipy(differences: FloatArray, resamples: int) -> tuple[float, float]:
    interval = stats.bootstrap(
        (differences,), np.mean, n_resamples=resamples, batch=BATCH, vectorized=True, method="percentile", rng=2
    ).confidence_interval
    return interval.low, interval.high


def in_numpy(differences: FloatArray, images: NDArray[np.intp], resamples: int) -> tuple[float, float]:
    rng = np.random.default_rng(3)
    sums, sizes = np.bincount(images, weights=differences), np.bincount(images)
    means = []
    for _ in range(0, resamples, BATCH):
        drawn = rng.integers(len(sums), size=(BATCH, len(sums)))
        means.append(sums[drawn].sum(axis=1) / sizes[drawn].sum(axis=1))
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975])
    return float(low), float(high)


def timed(work: Callable[[], T]) -> tuple[T, float]:
    start = time.perf_counter()
    value = work()
    return value, time.perf_counter() - start


if __name__ == "__main__":
    main()
