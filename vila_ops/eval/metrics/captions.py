"""CIDEr-D, BLEU-4 and ROUGE-L of captions, for COCO and Flickr30k.

The words come from a tokenizer, which is part of the metric's name: `ptb` is the official one (`ptb.official_words` for
the official column, `ptb.corrected_words` for the corrected one), `ptb_python` is ours (`ptb.python_words`). Pure but
for the official tokenizer, which is a program in Java.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from vila_ops.eval.metrics.bleu import Bleu, bleu_of_words
from vila_ops.eval.metrics.cider import Cider, cider_of_words
from vila_ops.eval.metrics.columns import Columns
from vila_ops.eval.metrics.ptb import Words, corrected_words, official_words, python_words
from vila_ops.eval.metrics.rouge import rouge_l

WordsOf = Callable[[Sequence[str]], list[Words]]
"""A tokenizer of all captions of a set at once."""

TOKENIZERS: dict[str, tuple[WordsOf, WordsOf]] = {
    "ptb": (official_words, corrected_words),
    "ptb_python": (python_words, python_words),
}
"""By the name of the variant, the tokenizers of the official and of the corrected column."""


@dataclass(frozen=True)
class CaptionScores:
    """The scores of a set of captions with one tokenizer."""

    cider: Cider
    bleu: Bleu
    rouge_l: dict[str, Columns]
    """By id; the columns differ by ROUGE-L's rule alone, not by the tokenizer."""


def caption_scores(
    candidates: Mapping[str, str], references: Mapping[str, Sequence[str]], *, words_of: WordsOf
) -> CaptionScores:
    """The scores of one caption for each id against one or more references.

    Candidates and references are tokenized apart, each all at once, as pycocoevalcap does. Raises ValueError for ids
    that one argument lacks or that have no reference, and TokenizerMissing.
    """
    if candidates.keys() != references.keys():
        alone = sorted(candidates.keys() ^ references.keys())
        raise ValueError(f"candidates and references differ in {len(alone)} ids: {', '.join(alone[:5])}")
    true = iter(words_of([caption for captions in references.values() for caption in captions]))
    true_words = {id_: [next(true) for _ in captions] for id_, captions in references.items()}
    words = dict(zip(references, words_of([candidates[id_] for id_ in references]), strict=True))
    parts = {id_: _parts(caption) for id_, caption in words.items()}
    true_parts = {id_: [_parts(caption) for caption in captions] for id_, captions in true_words.items()}
    return CaptionScores(
        cider=cider_of_words(parts, true_parts),
        bleu=bleu_of_words(parts, true_parts),
        rouge_l={id_: rouge_l(words[id_], captions) for id_, captions in true_words.items()},
    )


def _parts(words: Words) -> list[str]:
    """Words without white space: CIDEr and BLEU split the tokenizer's "1 1/2" at its hard space, ROUGE does not."""
    return " ".join(words).split()
