import random
from typing import Any

import numpy as np
import pytest

from tests.data.signature_rows import A, B, C, minima, pairs, rows
from vila_ops.config.clean import NearDuplicates, TopShare
from vila_ops.config.mixture import Contamination
from vila_ops.data.dedup.signatures import SCHEMA
from vila_ops.data.preprocess.decide import decide

GATE = Contamination.model_validate({"sources": {"unread": {"kind": "jsonl", "path": ".", "render": "caption"}}})


def test_an_empty_table_and_an_evaluation_set_without_images_or_texts_drop_nothing() -> None:
    near = NearDuplicates(image_bits=4, text_similarity=0.8)
    for signatures in (SCHEMA.empty_table(), rows({}, {"hashes": (A,)}, {"ngrams": (1,)})):
        for evaluation in (SCHEMA.empty_table(), rows({})):
            drops = decide(signatures, shares={}, evaluation=evaluation, contamination=GATE, duplicates=near)
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
        duplicates=NearDuplicates(image_bits=4, text_similarity=0.8),
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
        "duplicates": NearDuplicates(image_bits=3, text_similarity=0.8),
    }
    shares = {file: TopShare(columns=("clip",), share=0.7) for file in range(4)}
    whole = decide(rows(*records), shares=shares, **rules)
    assert len(set(whole["reason"].to_pylist())) == 4
    for stop in (100, 200, 300):
        before = decide(rows(*records[:stop]), shares=shares, **rules)
        assert {row for row in pairs(whole) if row[0] < stop} == set(pairs(before))
    assert np.all(np.bincount(whole["record"].to_numpy()) <= 1)
