from tests.data.signature_rows import A, B, C, pairs, rows
from vila_ops.config.mixture import Contamination
from vila_ops.data.decontamination.contamination import TEMPLATE_RECORDS, contaminated, known_ngrams

GATE = Contamination.model_validate({"sources": {"unread": {"kind": "jsonl", "path": ".", "render": "caption"}}})


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
