from pathlib import Path

import numpy as np

from vila_ops.config.clean import Clean, NearDuplicates
from vila_ops.config.mixture import Contamination
from vila_ops.data.dedup.hashing import MINIMA, ngram_hashes, word_hashes
from vila_ops.data.dedup.signatures import SignatureRules, signature
from vila_ops.data.records import Image, Part, Record, Turn

GATE = Contamination.model_validate({"sources": {"unread": {"kind": "jsonl", "path": ".", "render": "caption"}}})


def document(*parts: Part) -> Record:
    return Record("d", "thing", (Turn("document", parts),), category="", licence="", provenance="")


def test_a_signature_holds_what_the_rules_ask_for_and_nothing_else(tiny: Path) -> None:
    image = Image((tiny / "pairs/cat.png").read_bytes())
    words = [f"w{number}" for number in range(20)]
    long, short = document(image, " ".join(words)), document(image, " ".join(words[:12]))
    by_image = SignatureRules(Clean(), near_duplicates=NearDuplicates(image_bits=4))
    by_text = SignatureRules(Clean(), near_duplicates=NearDuplicates(text_similarity=0.8))
    made = signature(long, by_image, number=7, file=3)
    assert (made.record, made.file, len(made.hashes), made.minima, made.ngrams) == (7, 3, 1, None, ())
    made = signature(long, by_text, number=0, file=0)
    assert (made.hashes, made.ngrams, len(made.minima or b"")) == ((), (), 2 * MINIMA)
    assert signature(short, by_text, number=0, file=0).minima is None  # a caption recurs under other images
    assert signature(document(" ".join(words[:2])), by_text, number=0, file=0).minima
    evaluation = SignatureRules(Clean(), contamination=GATE)
    assert len(signature(long, evaluation, number=0, file=0).ngrams) == 8
    assert signature(short, evaluation, number=0, file=0).ngrams == ()  # known by its image alone
    assert len(signature(document("short text"), evaluation, number=0, file=0).ngrams) == 1
    known = np.sort(ngram_hashes(word_hashes(" ".join(words[:14])), size=13))
    training = SignatureRules(Clean(), contamination=GATE, known_ngrams=known)
    assert sorted(signature(long, training, number=0, file=0).ngrams) == known.tolist()


def test_a_record_that_another_rule_drops_is_ranked_and_otherwise_not_there() -> None:
    rules = Clean.model_validate({"min_words": 2, "top_share": {"columns": ["clip"], "share": 0.5}})
    few = Record("d", "x", (Turn("document", ("word",)),), category="", licence="", provenance="", scores={"clip": 0.5})
    decided = SignatureRules(rules, NearDuplicates(text_similarity=0.8), GATE)
    made = signature(few, decided, number=0, file=0)
    assert (made.rank, made.is_clean, made.minima, made.ngrams) == (0.5, False, None, ())
    damaged = signature(
        document(Image(b"no image"), "two words"), SignatureRules(Clean(), None, GATE), number=0, file=0
    )
    assert not damaged.is_clean
