import random
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from vila_ops.config.clean import NearDuplicates, TopShare
from vila_ops.config.mixture import Contamination
from vila_ops.data.cleaning.duplicates import (
    TEMPLATE_RECORDS,
    contaminated,
    decide,
    duplicated,
    known_ngrams,
    top_share,
)
from vila_ops.data.cleaning.similarity import (
    SCHEMA,
    THUMBNAIL_BYTES,
    Signature,
    minhash,
    ngram_hashes,
    table,
    word_hashes,
)

GATE = Contamination.model_validate({"sources": {"unread": {"kind": "jsonl", "path": ".", "render": "caption"}}})
PLAIN = bytes(THUMBNAIL_BYTES)
A, B, C = 0xFFFF_0000_FFFF_0000, 0x1234_5678_9ABC_DEF0, 0x0F0F_3C3C_5A5A_6996
"""Hashes that are far from each other."""


def rows(*signatures: dict[str, Any]) -> pa.Table:
    """Records numbered as given; a hash alone has a black thumbnail."""
    made = []
    for number, fields in enumerate(signatures):
        thumbnails = tuple(PLAIN for _ in fields.get("hashes", ()))
        made.append(Signature(**{"record": number, "file": 0, "thumbnails": thumbnails, **fields}))
    return table(made)


def minima(text: str) -> bytes:
    return minhash(ngram_hashes(word_hashes(text), size=5)).tobytes()


def pairs(drops: pa.Table) -> list[tuple[int, str, int | None]]:
    return sorted((row["record"], row["reason"], row["twin"]) for row in drops.to_pylist())


def test_coyo_s_selection_keeps_the_best_fifth_of_each_file() -> None:
    """Ten rows in file 0, so two stay; of the equal ones in third place neither; file 1 has no rule."""
    ranks = [0.1, 0.9, 0.5, 0.2, 0.8, 0.8, 0.3, 0.4, 0.0, 0.7]
    signatures = rows(*({"rank": rank} for rank in ranks), {"rank": 0.0, "file": 1})
    drops = top_share(signatures, {0: TopShare(columns=("clip",), share=0.2)})
    assert pairs(drops) == [(number, "below_top_share", None) for number in (0, 2, 3, 5, 6, 7, 8, 9)]


def test_the_share_counts_unclean_records_but_none_without_a_rank() -> None:
    signatures = rows({"rank": 0.9, "is_clean": False}, {"rank": 0.8}, {"rank": 0.7}, {"rank": 0.6}, {"rank": None})
    half = top_share(signatures, {0: TopShare(columns=("clip",), share=0.5)})
    assert half["record"].to_pylist() == [2, 3]


def test_a_share_is_not_off_by_one_for_want_of_binary_fractions() -> None:
    signatures = rows(*({"rank": float(rank)} for rank in range(100)))
    assert len(top_share(signatures, {0: TopShare(columns=("clip",), share=0.29)})) == 71


def test_a_copy_is_dropped_for_the_first_in_order_whatever_the_order_of_rows() -> None:
    signatures = rows({"hashes": (A,)}, {"hashes": (B,)}, {"hashes": (A ^ 0b111,)}, {"hashes": (A ^ 0b1111 << 9,)})
    for shown in (signatures, signatures.take([3, 1, 0, 2])):
        assert pairs(duplicated(shown, NearDuplicates(image_bits=3))) == [(2, "duplicate_image", 0)]
        both = pairs(duplicated(shown, NearDuplicates(image_bits=4)))
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
    assert pairs(duplicated(signatures, NearDuplicates(image_bits=0))) == [(2, "duplicate_image", 1)]


def test_images_with_like_hashes_but_other_colours_are_two() -> None:
    blue = bytes((0, 0, 120) * 16)
    signatures = rows({"hashes": (A,)}, {"hashes": (A,), "thumbnails": (blue,)}, {"hashes": (A,)})
    assert pairs(duplicated(signatures, NearDuplicates(image_bits=4))) == [(2, "duplicate_image", 0)]


def test_texts_of_the_asked_similarity_are_one() -> None:
    """100 words have 96 5-grams; k words changed at the end leave 96 - k of them: J = (96 - k) / (96 + k)."""
    words = [f"w{number}" for number in range(100)]
    texts = [" ".join(words[: 100 - k] + [f"other{place}" for place in range(k)]) for k in (0, 2, 40)]
    signatures = rows(*({"minima": minima(text)} for text in (*texts, texts[0].upper() + "!")))
    drops = pairs(duplicated(signatures, NearDuplicates(text_similarity=0.8)))  # J = 0.96 and 0.41
    assert drops == [(1, "duplicate_text", 0), (3, "duplicate_text", 0)]
    exact = pairs(duplicated(signatures, NearDuplicates(text_similarity=1)))
    assert exact == [(3, "duplicate_text", 0)]


def test_a_leak_is_told_with_the_evaluation_record_it_shows() -> None:
    evaluation = rows({"hashes": (B,), "ngrams": (5, 6)}, {"hashes": (A,), "ngrams": (6, 7)})
    signatures = rows(
        {"hashes": (C, A ^ 0b111111), "ngrams": (5,)},
        {"hashes": (A ^ 0b1111111,), "ngrams": ()},
        {"ngrams": (4, 7)},
        {"ngrams": (6,)},
        {"hashes": (B,), "ngrams": (6,), "is_clean": False},
    )
    assert known_ngrams(evaluation).tolist() == [5, 6, 7]
    assert pairs(contaminated(signatures, evaluation, GATE)) == [
        (0, "contaminated_image", 1),
        (2, "contaminated_text", 1),
        (3, "contaminated_text", 0),
    ]


def test_how_an_evaluation_set_words_all_its_questions_gives_nothing_away() -> None:
    evaluation = rows(*({"ngrams": (1, 2, 100 + number)} for number in range(TEMPLATE_RECORDS)), {"ngrams": (2,)})
    assert known_ngrams(evaluation).tolist() == [1, *range(100, 100 + TEMPLATE_RECORDS)]


def test_an_empty_table_and_an_evaluation_set_without_images_or_texts_drop_nothing() -> None:
    near = NearDuplicates(image_bits=4, text_similarity=0.8)
    for signatures in (SCHEMA.empty_table(), rows({}, {"hashes": (A,)}, {"ngrams": (1,)})):
        for evaluation in (SCHEMA.empty_table(), rows({})):
            drops = decide(signatures, shares={}, evaluation=evaluation, contamination=GATE, near_duplicates=near)
            assert len(drops) == 0


def test_a_rule_looks_only_at_what_the_rules_before_it_left() -> None:
    """0 goes for its rank, so 1 stays although it shows the same. 2 is a leak, so 3 stays although it says the same.
    4 has the image of 3, so 5 stays although it has the text of 4."""
    one, two = minima("a b c d e f g h"), minima("q r s t u v w x")
    signatures = rows(
        {"rank": 0.1, "hashes": (A,)},
        {"rank": 0.9, "hashes": (A,)},
        {"file": 1, "ngrams": (7,), "minima": one},
        {"file": 1, "hashes": (B,), "minima": one},
        {"file": 1, "hashes": (B,), "minima": two},
        {"file": 1, "hashes": (C,), "minima": two},
    )
    drops = decide(
        signatures,
        shares={0: TopShare(columns=("clip",), share=0.5)},
        evaluation=rows({"ngrams": (7,)}),
        contamination=GATE,
        near_duplicates=NearDuplicates(image_bits=4, text_similarity=0.8),
    )
    assert pairs(drops) == [(0, "below_top_share", None), (2, "contaminated_text", 0), (4, "duplicate_image", 3)]


@pytest.mark.parametrize("seed", range(5))
def test_records_added_at_the_end_change_nothing_before_them(seed: int) -> None:
    draw = random.Random(seed)
    base = [draw.getrandbits(64) for _ in range(40)]
    texts = [[f"w{draw.randrange(50)}" for _ in range(60)] for _ in range(20)]

    def one(number: int) -> dict[str, Any]:
        words = list(draw.choice(texts))
        words[draw.randrange(60)] = f"changed{number}"
        close = [
            draw.choice(base) ^ (1 << draw.randrange(64)) ^ (1 << draw.randrange(64)) for _ in range(draw.randrange(3))
        ]
        ranked = {"rank": draw.random(), "file": number // 100}
        return {"hashes": tuple(close), "minima": minima(" ".join(words)), "ngrams": (draw.randrange(400),), **ranked}

    records = [one(number) for number in range(400)]
    rules = {
        "evaluation": rows(*({"ngrams": (draw.randrange(400),)} for _ in range(10))),
        "contamination": GATE,
        "near_duplicates": NearDuplicates(image_bits=3, text_similarity=0.8),
    }
    shares = {file: TopShare(columns=("clip",), share=0.7) for file in range(4)}
    whole = decide(rows(*records), shares=shares, **rules)
    assert len(set(whole["reason"].to_pylist())) == 4
    for stop in (100, 200, 300):
        before = decide(rows(*records[:stop]), shares=shares, **rules)
        assert {row for row in pairs(whole) if row[0] < stop} == set(pairs(before))
    assert np.all(np.bincount(whole["record"].to_numpy()) <= 1)
