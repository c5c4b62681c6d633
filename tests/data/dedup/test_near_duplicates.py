from tests.data.signature_rows import A, B, C, minima, pairs, rows
from vila_ops.config.clean import NearDuplicates
from vila_ops.data.dedup.near_duplicates import near_duplicates


def test_a_copy_is_dropped_for_the_first_in_order_whatever_the_order_of_rows() -> None:
    signatures = rows({"hashes": (A,)}, {"hashes": (B,)}, {"hashes": (A ^ 0b111,)}, {"hashes": (A ^ 0b1111 << 9,)})
    for shown in (signatures, signatures.take([3, 1, 0, 2])):
        assert pairs(near_duplicates(shown, NearDuplicates(image_bits=3))) == [(2, "duplicate_image", 0)]
        both = pairs(near_duplicates(shown, NearDuplicates(image_bits=4)))
        assert both == [(2, "duplicate_image", 0), (3, "duplicate_image", 0)]


def test_a_document_goes_only_when_all_its_images_were_seen_in_earlier_ones() -> None:
    signatures = rows(
        {"hashes": (A, A)},  # twice the same, in itself
        {"hashes": (A, B)},
        {"hashes": (B, A)},
        {"hashes": ()},
        {"hashes": (C, B), "is_clean": False},
        {"hashes": (C,)},
    )
    assert pairs(near_duplicates(signatures, NearDuplicates(image_bits=0))) == [(2, "duplicate_image", 1)]


def test_images_with_like_hashes_but_other_colours_are_two() -> None:
    blue = bytes((0, 0, 120) * 16)
    signatures = rows({"hashes": (A,)}, {"hashes": (A,), "thumbnails": (blue,)}, {"hashes": (A,)})
    assert pairs(near_duplicates(signatures, NearDuplicates(image_bits=4))) == [(2, "duplicate_image", 0)]


def test_texts_of_the_asked_similarity_are_one() -> None:
    """100 words have 96 5-grams; k words changed at the end leave 96 - k of them: J = (96 - k) / (96 + k)."""
    words = [f"w{number}" for number in range(100)]
    texts = [" ".join(words[: 100 - k] + [f"other{place}" for place in range(k)]) for k in (0, 2, 40)]
    signatures = rows(*({"minima": minima(text)} for text in (*texts, texts[0].upper() + "!")))
    drops = pairs(near_duplicates(signatures, NearDuplicates(text_similarity=0.8)))  # J = 0.96 and 0.41
    assert drops == [(1, "duplicate_text", 0), (3, "duplicate_text", 0)]
    exact = pairs(near_duplicates(signatures, NearDuplicates(text_similarity=1)))
    assert exact == [(3, "duplicate_text", 0)]
