"""Scores of TextVQA and ST-VQA as by the M4C evaluators. Pure.

Hu et al., "Iterative Answer Prediction with Pointer-Augmented Multimodal Transformers for TextVQA" (arXiv:1911.06258);
`m4c_evaluators.py` of facebookresearch/mmf, which LLaVA and VILA copy as `m4c_evaluator.py`. The normaliser is that of
EvalAI: lower case, no comma and no question mark, "'s" a word of its own, then the rules of `vqa`. LLaVA normalises
the answers that it uploads for VQAv2 and VizWiz with it.

TextVQA with and without OCR tokens in the prompt are two benchmarks with one metric: the variant is part of the name.

The columns differ for more than 32 dots, for an answer of articles alone (see `vqa`), and for ANLS at a similarity of
exactly 0.5: the evaluator counts 0.5, the definition (Biten et al., arXiv:1905.13648, equation 1) counts 0. Where both
texts are empty the evaluator fails (division by zero); both columns are 1 there.
"""

from collections.abc import Sequence

from vila_ops.eval.metrics.anls import THRESHOLD, relative_distance
from vila_ops.eval.metrics.columns import Columns, right
from vila_ops.eval.metrics.vqa import CORRECTED, OFFICIAL, Normalizer, leave_one_out

TEXTVQA_ANSWERS = 10


def normalize(text: str, normalizer: Normalizer = OFFICIAL) -> str:
    """An answer in the normal form of EvalAI."""
    return normalizer(text.lower().replace(",", "").replace("?", "").replace("'s", " 's"))


def textvqa(answer: str, human: Sequence[str]) -> Columns:
    """The soft accuracy of an answer, from 0 to 1. Raises ValueError unless there are ten human answers."""
    if len(human) != TEXTVQA_ANSWERS:
        raise ValueError(f"{len(human)} human answers; a question of TextVQA has {TEXTVQA_ANSWERS}")
    return Columns(
        official=leave_one_out(normalize(answer), [normalize(one) for one in human]),
        corrected=leave_one_out(normalize(answer, CORRECTED), [normalize(one, CORRECTED) for one in human]),
    )


def stvqa_accuracy(answer: str, references: Sequence[str]) -> Columns:
    """1 where the answer is one of the references, all normalised, else 0. Raises ValueError without references."""
    _require(references)
    return right(
        normalize(answer) in [normalize(one) for one in references],
        normalize(answer, CORRECTED) in [normalize(one, CORRECTED) for one in references],
    )


def stvqa_anls(answer: str, references: Sequence[str]) -> Columns:
    """The best similarity to a reference in lower case, or 0 where it is low. Raises ValueError without references."""
    _require(references)
    similarities = [_similarity(answer.lower().strip(), one.lower().strip()) for one in references]
    return Columns(
        official=max(similarity if similarity >= THRESHOLD else 0.0 for similarity in similarities),
        corrected=max(similarity if similarity > THRESHOLD else 0.0 for similarity in similarities),
    )


def _similarity(left: str, right: str) -> float:
    return 1 - relative_distance(left, right, max(len(left), len(right)))


def _require(references: Sequence[str]) -> None:
    if not references:
        raise ValueError("a question without references cannot be scored; look at its annotation")
