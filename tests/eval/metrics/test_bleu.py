import numpy as np
import pytest
from pycocoevalcap.bleu.bleu import Bleu as Official

from tests.eval.metrics.test_cider import caption_sets
from vila_ops.eval.metrics.bleu import bleu_of_words

Captions = dict[str, list[str]]
References = dict[str, list[list[str]]]


def official(candidates: Captions, references: References) -> tuple[list[float], list[list[float]]]:
    scores, items = Official(4).compute_score(
        {id_: [" ".join(words) for words in captions] for id_, captions in references.items()},
        {id_: [" ".join(words)] for id_, words in candidates.items()},
        verbose=0,
    )
    return scores, items


@pytest.mark.slow
def test_scores_are_those_of_pycocoevalcap_on_1200_corpora() -> None:
    for seed in range(1200):
        rng = np.random.default_rng(seed)
        candidates, references = caption_sets(rng, ids=int(rng.integers(1, 4)))
        scores, items = official(candidates, references)
        ours = bleu_of_words(candidates, references)
        assert list(ours.scores) == pytest.approx(scores, abs=1e-9)
        for order in range(4):
            assert [one[order] for one in ours.items.values()] == pytest.approx(items[order], abs=1e-9)


def test_a_short_candidate_by_hand() -> None:
    # one of one word is right; the nearest reference has two words, so brevity is exp(1 - 2 / 1)
    result = bleu_of_words({"1": ["cat"]}, {"1": [["red", "cat"], ["a", "big", "red", "cat"]]})
    assert result.scores[0] == pytest.approx(np.exp(-1))
    assert result.items["1"] == result.scores


def test_repeated_words_count_as_often_as_in_a_reference() -> None:
    result = bleu_of_words({"1": ["the"] * 4}, {"1": [["the", "cat", "the", "mat"]]})
    assert result.scores[0] == pytest.approx(0.5)


def test_other_ids_and_missing_references_are_refused() -> None:
    for candidates, references in (({"1": ["a"]}, {"2": [["a"]]}), ({"1": ["a"]}, {"1": []}), ({}, {})):
        with pytest.raises(ValueError, match="give each id one and its references"):
            bleu_of_words(candidates, references)
