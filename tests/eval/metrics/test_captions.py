import random

import pytest
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

from vila_ops.eval.metrics.captions import TOKENIZERS, caption_scores
from vila_ops.eval.metrics.columns import mean
from vila_ops.eval.metrics.ptb import has_official_tokenizer, official_words, python_words

WORDS = (
    *("a", "the", "red", "cat", "dog's", "sits", "on", "1", "1/2", "mat", ".", ",", "!", "(left)", "U.S.", "B.", "it"),
    *("isn't", "“q”", "café", "and/or", "3:30", "p.m.", "½", "$5", "-", "--", "...", "don't", "\n", "\r", "\u2028"),
)


def corpus(size: int) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Captions of odd words, some of which end a line."""
    generator = random.Random(0)

    def caption() -> str:
        return " ".join(generator.choice(WORDS) for _ in range(generator.randint(0, 9)))

    references = {str(number): [caption() for _ in range(generator.randint(1, 4))] for number in range(size)}
    return {
        id_: captions[0] if generator.random() < 0.3 else caption() for id_, captions in references.items()
    }, references


@pytest.mark.slow
@pytest.mark.skipif(not has_official_tokenizer(), reason="no Java here")
def test_official_scores_are_those_of_pycocoevalcap_on_1000_captions() -> None:
    candidates, references = corpus(1000)
    tokenizer = PTBTokenizer()
    true = tokenizer.tokenize({id_: [{"caption": one} for one in ones] for id_, ones in references.items()})
    given = tokenizer.tokenize({id_: [{"caption": caption}] for id_, caption in candidates.items()})
    bleu, bleu_items = Bleu(4).compute_score(true, given, verbose=0)
    cider, cider_items = Cider().compute_score(true, given)
    rouge, rouge_items = Rouge().compute_score(true, given)

    ours = caption_scores(candidates, references, words_of=official_words)

    assert list(ours.bleu.scores) == pytest.approx(bleu, abs=1e-6)
    assert [one[3] for one in ours.bleu.items.values()] == pytest.approx(bleu_items[3], abs=1e-6)
    assert ours.cider.score == pytest.approx(cider, abs=1e-6)
    assert list(ours.cider.items.values()) == pytest.approx(list(cider_items), abs=1e-6)
    assert mean(ours.rouge_l.values()).official == pytest.approx(rouge, abs=1e-6)
    assert [one.official for one in ours.rouge_l.values()] == pytest.approx(list(rouge_items), abs=1e-6)


def test_true_captions_score_best() -> None:
    captions = {"1": "A red cat sleeps here.", "2": "Two dogs play football outside."}
    scores = caption_scores(captions, {id_: [one.upper()] for id_, one in captions.items()}, words_of=python_words)
    assert scores.cider.score == pytest.approx(10)
    assert scores.bleu.scores[3] == pytest.approx(1)
    assert mean(scores.rouge_l.values()).corrected == pytest.approx(1)


def test_each_variant_has_a_tokenizer_for_each_column() -> None:
    assert TOKENIZERS["ptb"][0] is official_words
    assert TOKENIZERS["ptb_python"] == (python_words, python_words)


def test_ids_of_one_side_alone_are_named() -> None:
    with pytest.raises(ValueError, match="differ in 2 ids: 7, 9"):
        caption_scores({"1": "a", "9": "b"}, {"1": ["a"], "7": ["b"]}, words_of=python_words)
