import numpy as np
import pytest
from pycocoevalcap.rouge.rouge import Rouge as Official

from tests.eval.metrics.test_cider import caption_sets
from vila_ops.eval.metrics.columns import Columns
from vila_ops.eval.metrics.rouge import rouge_l


def test_scores_are_those_of_pycocoevalcap_on_1200_corpora() -> None:
    for seed in range(1200):
        rng = np.random.default_rng(seed)
        candidates, references = caption_sets(rng, ids=int(rng.integers(1, 3)))
        _, items = Official().compute_score(
            {id_: [" ".join(words) for words in captions] for id_, captions in references.items()},
            {id_: [" ".join(words)] for id_, words in candidates.items()},
        )
        ours = [rouge_l(candidates[id_], captions).official for id_, captions in references.items()]
        assert ours == pytest.approx(list(items), abs=1e-9)


def test_a_subsequence_by_hand() -> None:
    # 3 words in common of 4 and of 5
    precision, recall = 3 / 4, 3 / 5
    value = (1 + 1.44) * precision * recall / (recall + 1.44 * precision)
    result = rouge_l(["a", "red", "x", "cat"], [["a", "big", "red", "old", "cat"]])
    assert (result.official, result.corrected) == (pytest.approx(value), pytest.approx(value))


def test_precision_and_recall_may_be_of_two_references_in_the_official_column_alone() -> None:
    candidate = ["a", "b", "c", "d"]
    result = rouge_l(
        candidate, [["a"], ["a", "b", "c", "d", "e", "f", "g", "h"]]
    )  # recall 1 of one, precision 1 of the other
    assert result.official == pytest.approx(1)
    assert result.corrected == pytest.approx((1 + 1.44) * 0.5 / (0.5 + 1.44))


def test_empty_captions_agree_in_the_official_column_alone() -> None:
    assert rouge_l([], [[]]) == Columns(official=1, corrected=0)
    assert rouge_l([], [["a"]]) == Columns(0, 0)


def test_a_caption_without_references_is_refused() -> None:
    with pytest.raises(ValueError, match="without references"):
        rouge_l(["a"], [])
