import numpy as np
import pytest
from numpy.typing import NDArray

from vila_ops.config.clean import MAX_IMAGE_BITS
from vila_ops.data.dedup.neighbours import THUMBNAIL_TOLERANCE, ImageSignatures, first_copies, first_similar


def hashes(count: int, *, seed: int) -> NDArray[np.uint64]:
    """Half of them 0 to 12 flipped bits from another, and some in a crowd of few bits."""
    rng = np.random.default_rng(seed)
    made = rng.integers(0, 2**64, count, dtype=np.uint64)
    for place in range(count // 2, count):
        made[place] = made[rng.integers(place)]
        for bit in rng.choice(64, rng.integers(13), replace=False):
            made[place] ^= np.uint64(1) << np.uint64(bit)
    made[: count // 20] &= np.uint64(0xFF)
    return rng.permutation(made)


def images(of: NDArray[np.uint64], **more: NDArray[np.uint8]) -> ImageSignatures:
    thumbnails = more.get("thumbnails", np.zeros((len(of), 48), np.uint8))
    return ImageSignatures(record=np.arange(len(of)), hashes=of, thumbnails=thumbnails)


@pytest.mark.parametrize("bits", range(MAX_IMAGE_BITS + 1))
def test_exactly_the_hashes_within_the_bits_are_found(bits: int) -> None:
    known, own = hashes(1500, seed=bits), hashes(1000, seed=bits + 100)
    own[::4] = known[:250] ^ np.uint64((1 << bits) - 1)
    near = np.bitwise_count(known[:, None] ^ known[None, :]) <= bits
    earlier = np.tril(near, k=-1)
    found = first_copies(images(known), among=None, bits=bits)
    assert np.array_equal(found >= 0, earlier.any(axis=1))
    assert all(earlier[place, twin] for place, twin in enumerate(found) if twin >= 0)
    between = np.bitwise_count(own[:, None] ^ known[None, :]) <= bits
    found = first_copies(images(own), among=images(known), bits=bits)
    assert np.array_equal(found >= 0, between.any(axis=1))
    assert all(between[place, twin] for place, twin in enumerate(found) if twin >= 0)


def test_a_channel_beyond_the_tolerance_makes_two_images_of_one_hash() -> None:
    thumbnails = np.full((3, 48), 100, np.uint8)
    thumbnails[1, 47] += THUMBNAIL_TOLERANCE
    thumbnails[2, 0] -= THUMBNAIL_TOLERANCE + 1
    found = first_copies(images(np.zeros(3, np.uint64), thumbnails=thumbnails), among=None, bits=0)
    assert found.tolist() == [-1, 0, -1]


@pytest.mark.parametrize("similarity", [0.5, 0.7, 0.8, 0.9, 1.0])
def test_minima_that_agree_as_often_as_asked_are_found(similarity: float) -> None:
    """Pairs 0.03 above the threshold: at random places, as minima do, so one in a thousand may be missed."""
    rng = np.random.default_rng(0)
    first = rng.integers(0, 2**16, (1000, 128), dtype=np.uint16)
    second, third = first.copy(), first.copy()
    agree = min(128, int(np.ceil((similarity + 0.03) * 128)))
    for place in range(1000):
        second[place, rng.choice(128, 128 - agree, replace=False)] ^= np.uint16(1)
        third[place, rng.choice(128, 128 - int(np.ceil(similarity * 128)) + 1, replace=False)] ^= np.uint16(2)
    found = first_similar(np.concatenate([first, second]), similarity=similarity)
    assert np.all(found[:1000] == -1)
    assert np.count_nonzero(found[1000:] == np.arange(1000)) >= 998
    below = first_similar(np.concatenate([first, third]), similarity=similarity)
    assert np.all(below == -1)
