import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as Pillow
from PIL import ImageDraw
from scipy.fft import dctn  # type: ignore[import-untyped]

from vila_ops.config.clean import MAX_IMAGE_BITS
from vila_ops.data.dedup.hashing import (
    MINIMA,
    image_signature,
    minhash,
    ngram_hashes,
    perceptual_hash,
    word_hashes,
)
from vila_ops.data.images import rgb

IMAGEHASH = {
    "accordion": 0xFB9C84E795239438,
    "bicycle": 0xBCB2DB18EC443B19,
    "cat": 0xEB9EC161272D94B4,
    "duck": 0xBE90E10FC46EC12F,
    "polar-bear": 0xBBCDD832C43C8738,
    "scarf": 0xB8E09772C29FC89C,
    "taxi": 0xE9819C6EC169A71E,
}
"""imagehash 4.3.2: phash of the tiny images on white, hash_size 8, highfreq_factor 4."""


def encoded(image: Pillow.Image, kind: str = "PNG", **more: int) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **more)
    return out.getvalue()


@pytest.mark.parametrize("name", IMAGEHASH)
def test_a_hash_is_imagehash_s_less_the_bits_within_half_a_grey_level_of_the_median(name: str, tiny: Path) -> None:
    image = rgb((tiny / "pairs" / f"{name}.png").read_bytes(), at_least=56)
    ours, theirs = perceptual_hash(image), IMAGEHASH[name]
    assert ours & ~theirs == 0
    grey = np.asarray(image.convert("L").resize((32, 32), Pillow.Resampling.LANCZOS), np.float64)
    coefficients = dctn(grey)[:8, :8] / 4  # scipy's are 2 sum x cos in each direction
    unsure = coefficients - np.median(coefficients) <= 128
    left_out = np.unpackbits(np.frombuffer((theirs & ~ours).to_bytes(8, "big"), np.uint8)).reshape(8, 8)
    assert np.all(unsure[left_out == 1])
    assert not np.any(unsure & (np.unpackbits(np.frombuffer(ours.to_bytes(8, "big"), np.uint8)).reshape(8, 8) == 1))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_large_image_seen_small_has_the_hash_of_the_whole(kind: str, seed: int) -> None:
    field = np.random.default_rng(seed).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    whole = Pillow.fromarray(field).resize((1000, 750), Pillow.Resampling.BICUBIC)
    quick, _ = image_signature(encoded(whole, kind))
    assert (quick ^ perceptual_hash(whole)).bit_count() <= 2


def test_images_without_structure_are_the_same_only_as_exact_copies() -> None:
    white = Pillow.new("RGB", (200, 100), "white")
    spot = white.copy()
    ImageDraw.Draw(spot).point((50, 50), "black")
    faint = Pillow.fromarray(np.random.default_rng(0).integers(250, 255, (100, 200, 3), dtype=np.uint8))
    kinds = [encoded(image, kind) for image in (white, spot, faint) for kind in ("PNG", "JPEG")]
    hashes = [image_signature(data)[0] for data in kinds]
    assert [image_signature(data)[0] for data in kinds] == hashes
    apart = [(one ^ other).bit_count() for at, one in enumerate(hashes) for other in hashes[:at]]
    assert min(apart) > MAX_IMAGE_BITS


def test_words_are_the_same_in_any_case_punctuation_spacing_and_compatibility_form() -> None:
    plain = word_hashes("what is the naïve fish of 10 km")
    assert np.array_equal(word_hashes("  What is -- the “NAI\u0308VE”\n\uff46\uff49\uff53\uff48 (of 10 km)?!"), plain)
    assert len(np.unique(plain)) == 8
    assert len(word_hashes("猫は snow_ball を見る")) == 2 + 2 + 3
    assert len(word_hashes("?! …")) == 0


def test_ngrams_are_the_same_only_for_the_same_words_in_the_same_order() -> None:
    words = word_hashes("a b c d a b c")
    trigrams = ngram_hashes(words, size=3)
    assert len(trigrams) == 5
    assert trigrams[0] == trigrams[4]
    assert len(np.unique(np.concatenate([trigrams, ngram_hashes(words, size=2)]))) == 4 + 4
    assert ngram_hashes(words[::-1].copy(), size=7) != ngram_hashes(words, size=7)
    assert len(ngram_hashes(words, size=8)) == len(ngram_hashes(words[:0], size=0)) == 0


@pytest.mark.parametrize("shared", [0, 100, 500, 900, 1000])
def test_minhash_estimates_the_jaccard_similarity(shared: int) -> None:
    """Each side has 1000 shingles, so J = shared / (2000 - shared); five standard deviations of 20 x 128 minima."""
    rng = np.random.default_rng(shared)
    agree = []
    for _ in range(20):
        pool = rng.integers(0, 2**64, 2000 - shared, dtype=np.uint64)
        agree.append(minhash(pool[:1000]) == minhash(pool[-1000:]))
    jaccard = shared / (2000 - shared)
    deviation = (jaccard * (1 - jaccard) / (20 * MINIMA)) ** 0.5
    assert abs(float(np.mean(agree)) - jaccard) <= 5 * deviation + 2**-16


def test_a_long_text_has_the_minima_of_its_pieces() -> None:
    shingles = np.random.default_rng(0).integers(0, 2**64, 5000, dtype=np.uint64)
    shuffled = np.random.default_rng(1).permutation(np.concatenate([shingles, shingles[:100]]))
    assert np.array_equal(minhash(shuffled), minhash(shingles))
