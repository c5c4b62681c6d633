import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pycocoevalcap.cider.cider import Cider as Official

from vila_ops.eval.metrics.cider import cider, cider_of_words

WORDS = ["a", "the", "red", "cat", "dog", "sits", "on", "mat", "with", "hat", "boat", "n't"]


def official(candidates: dict[str, list[str]], references: dict[str, list[list[str]]]) -> tuple[float, list[float]]:
    score, items = Official().compute_score(
        {id_: [" ".join(words) for words in captions] for id_, captions in references.items()},
        {id_: [" ".join(words)] for id_, words in candidates.items()},
    )
    return float(score), [float(item) for item in items]


def caption_sets(rng: np.random.Generator, ids: int) -> tuple[dict[str, list[str]], dict[str, list[list[str]]]]:
    """Captions of 0 to 13 words over a small vocabulary, so that n-grams of every order are shared."""

    def caption(shortest: int) -> list[str]:
        return [str(word) for word in rng.choice(WORDS, size=rng.integers(shortest, 14))]

    references = {str(i): [caption(1) for _ in range(rng.integers(1, 6))] for i in range(ids)}
    candidates = {id_: captions[0] if rng.random() < 0.2 else caption(0) for id_, captions in references.items()}
    return candidates, references


@pytest.mark.slow
def test_scores_are_those_of_pycocoevalcap_on_1200_corpora() -> None:
    for seed in range(1200):
        rng = np.random.default_rng(seed)
        candidates, references = caption_sets(rng, ids=int(rng.integers(1, 8)))
        score, items = official(candidates, references)
        ours = cider_of_words(candidates, references)
        assert ours.score == pytest.approx(score, abs=1e-9)
        assert list(ours.items.values()) == pytest.approx(items, abs=1e-9)


def test_scores_are_those_of_pycocoevalcap_on_a_large_corpus() -> None:
    candidates, references = caption_sets(np.random.default_rng(7), ids=1000)
    score, items = official(candidates, references)
    ours = cider_of_words(candidates, references)
    assert ours.score == pytest.approx(score, abs=1e-9)
    assert list(ours.items.values()) == pytest.approx(items, abs=1e-9)


@given(st.data())
def test_any_words_score_as_in_pycocoevalcap(data: st.DataObject) -> None:
    word = st.text("abcé-'1", min_size=1, max_size=2)
    captions = st.lists(word, min_size=1, max_size=8)
    references = data.draw(
        st.dictionaries(word, st.lists(captions, min_size=1, max_size=3), min_size=1, max_size=5), label="references"
    )
    candidates = {id_: data.draw(st.lists(word, max_size=8), label="candidate") for id_ in references}
    score, items = official(candidates, references)
    ours = cider_of_words(candidates, references)
    assert ours.score == pytest.approx(score, abs=1e-9)
    assert list(ours.items.values()) == pytest.approx(items, abs=1e-9)


def test_a_true_caption_of_rare_words_scores_ten() -> None:
    captions = {"1": "A red cat sleeps here.", "2": "Two dogs play football outside."}
    result = cider(captions, {id_: [caption.upper()] for id_, caption in captions.items()})
    assert result.items == pytest.approx({"1": 10, "2": 10})


def test_a_short_candidate_by_hand() -> None:
    # One unigram of two and no bigram agree: cosine 1/sqrt(2) in one order of four, one bigram less than the reference.
    references = {"1": [["red", "cat"]], "2": [["blue", "dog"]]}
    result = cider_of_words({"1": ["cat"], "2": ["fish"]}, references)
    assert result.items == pytest.approx({"1": 10 / 4 / math.sqrt(2) * math.exp(-1 / 72), "2": 0})
    assert result.score == pytest.approx(result.items["1"] / 2)


def test_an_empty_candidate_scores_nothing() -> None:
    assert cider({"1": "", "2": "a dog"}, {"1": ["a cat"], "2": ["a dog"]}).items["1"] == 0


def test_items_keep_the_order_of_the_references() -> None:
    result = cider({"b": "x", "a": "y", "c": "z"}, {"c": ["x"], "a": ["y"], "b": ["z"]})
    assert list(result.items) == ["c", "a", "b"]


def test_ids_of_one_side_alone_are_named() -> None:
    with pytest.raises(ValueError, match="differ in 2 ids: 7, 9"):
        cider({"1": "a", "9": "b"}, {"1": ["a"], "7": ["b"]})


def test_an_id_without_references_is_named() -> None:
    with pytest.raises(ValueError, match="no reference for 1 ids: 2"):
        cider({"1": "a", "2": "b"}, {"1": ["a"], "2": []})


def test_no_captions_are_refused() -> None:
    with pytest.raises(ValueError, match="no captions"):
        cider({}, {})
