"""CIDEr-D of captions, and their tokens by the Penn Treebank rules. Pure, without Java.

Vedantam et al., "CIDEr: Consensus-based Image Description Evaluation" (arXiv:1411.5726), as computed by pycocoevalcap
1.2 in `tokenizer/ptbtokenizer.py` and `cider/cider_scorer.py`, the library behind published tables.
"""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

LONGEST_NGRAM = 4
"""In words; the n-grams of 1 to 4 words have equal weight."""
SIGMA = 6.0
"""Width of the penalty on a difference of length, in words."""
SCALE = 10.0
"""A candidate equal to its only reference scores 10 when every order of n-gram has a rare one."""

Ngram = tuple[str, ...]
Words = Sequence[str]


@dataclass(frozen=True)
class Cider:
    """CIDEr-D on the library's own scale, 0 to 10; tables in percent (VILA's too) print 100 times this."""

    score: float
    """Mean of `items`."""
    items: dict[str, float]
    """By id, in the order of the references."""


@dataclass(frozen=True)
class _Vector:
    """A caption as tf-idf weights of its n-grams."""

    weights: tuple[dict[Ngram, float], ...]
    """One mapping for each order of n-gram, shortest first."""
    norms: tuple[float, ...]
    """Euclidean, one for each order."""
    bigrams: int
    """Number of bigrams with repeats, which the library takes for the length of a caption."""


def cider(candidates: Mapping[str, str], references: Mapping[str, Sequence[str]]) -> Cider:
    """CIDEr-D of one caption for each id against one or more references, as plain text; see `cider_of_words`."""
    return cider_of_words(
        {id_: tokenize(caption) for id_, caption in candidates.items()},
        {id_: [tokenize(caption) for caption in captions] for id_, captions in references.items()},
    )


def cider_of_words(candidates: Mapping[str, Words], references: Mapping[str, Sequence[Words]]) -> Cider:
    """CIDEr-D of captions that are split into words. Equal to pycocoevalcap's `Cider().compute_score` to 1e-9.

    Item = SCALE * mean over orders and references of exp(-d^2 / 2 SIGMA^2) * min(c, r) . r / |c| |r| with d the
    difference in bigrams (arXiv:1411.5726 equations 1, 4, 5 and section 7). idf is log(N / df) for N ids, of which df
    have the n-gram in any reference. The score of an item therefore depends on the other items: an n-gram that all ids
    share has weight 0, and a single id scores 0. A caption without words scores 0.
    Raises ValueError for ids that one argument lacks or that have no reference.
    """
    if candidates.keys() != references.keys():
        alone = sorted(candidates.keys() ^ references.keys())
        raise ValueError(f"candidates and references differ in {len(alone)} ids: {', '.join(alone[:5])}")
    if empty := [id_ for id_, captions in references.items() if not captions]:
        raise ValueError(f"no reference for {len(empty)} ids: {', '.join(empty[:5])}")
    if not references:
        raise ValueError("CIDEr of no captions; give at least one id")
    counts = {id_: [_ngrams(words) for words in captions] for id_, captions in references.items()}
    frequency = Counter(ngram for captions in counts.values() for ngram in set().union(*captions))
    log_ids = math.log(len(counts))
    idf = {ngram: log_ids - math.log(documents) for ngram, documents in frequency.items()}
    items = {}
    for id_, captions in counts.items():
        candidate = _vector(_ngrams(candidates[id_]), idf, unseen=log_ids)
        targets = [_vector(caption, idf, unseen=log_ids) for caption in captions]
        items[id_] = SCALE * sum(_similarity(candidate, target) for target in targets) / len(targets)
    return Cider(score=sum(items.values()) / len(items), items=items)


def _ngrams(words: Words) -> Counter[Ngram]:
    """Number of occurrences of each n-gram of 1 to LONGEST_NGRAM words."""
    return Counter(
        tuple(words[start : start + order])
        for order in range(1, LONGEST_NGRAM + 1)
        for start in range(len(words) - order + 1)
    )


def _vector(counts: Counter[Ngram], idf: Mapping[Ngram, float], *, unseen: float) -> _Vector:
    """Counts times idf; `unseen` is the idf of an n-gram in no reference."""
    weights: tuple[dict[Ngram, float], ...] = tuple({} for _ in range(LONGEST_NGRAM))
    for ngram, count in counts.items():
        weights[len(ngram) - 1][ngram] = count * idf.get(ngram, unseen)
    norms = tuple(math.sqrt(sum(weight * weight for weight in order.values())) for order in weights)
    return _Vector(weights, norms, bigrams=sum(count for ngram, count in counts.items() if len(ngram) == 2))


def _similarity(candidate: _Vector, reference: _Vector) -> float:
    """The mean over the orders of the clipped cosine, times the penalty on length, from 0 to 1."""
    total = 0.0
    norms = (left * right for left, right in zip(candidate.norms, reference.norms, strict=True))
    for ours, theirs, norm in zip(candidate.weights, reference.weights, norms, strict=True):
        if norm > 0:
            shared = [(weight, theirs[ngram]) for ngram, weight in ours.items() if ngram in theirs]
            total += sum(min(left, right) * right for left, right in shared) / norm
    delta = candidate.bigrams - reference.bigrams
    return total / LONGEST_NGRAM * math.exp(-(delta**2) / (2 * SIGMA**2))


# The lists and rules below were derived from the output of pycocoevalcap's PTBTokenizer (CoreNLP 3.4.1): the lists from
# every word of up to four letters and 280,000 others, the rules from 109,000 sentences.

_REWRITES = str.maketrans(
    {
        "“": " '' ", "”": " '' ", '"': " '' ", "«": " '' ", "»": " '' ", "‹": " ' ", "›": " ' ", "‘": " ` ",
        "–": "--", "—": "--", "…": " ... ", "½": " 1/2 ", "¼": " 1/4 ", "¾": " 3/4 ", "⅓": " 1/3 ", "⅔": " 2/3 ",
        "\u00ad": "", "\u200b": "",
    }
)  # fmt: skip
_RENAMED = {
    "(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-",
    "£": "#", "€": "$", "¢": "cents",
}  # fmt: skip
"""pycocoevalcap intends to drop brackets, but compares lower case with upper case, so that they stay as words."""
_PUNCTUATION = re.compile(r"[.]+|-+|''|``|['’`?!,:;]")
_ABBREVIATIONS = (
    "adj adm adv al ala alex apr ariz assn assoc asst attys? aug ave bancorp bhd bldg blvd brig bros calif capt cf "
    "cie cmdr col colo comdr conn corp cos? cpl ct dak dec dept det drs? elec ens esq est etc ext feb fla fri ft ga "
    "gen govs? hon inc ind insp intl invt jan jos jr jul jun kans? ky lieut lt ltd maj mar md messrs mfg mich minn "
    "mlle mme mo mon mont mr mrs ms msgr mt mtg natl neb nev nov oct okla penn pfc ph plc pres profs? p?ptes? "
    "p?ptys? pvt rd reps? rev rt sens? sept? seq sfc sgt spc sq sr st ste supts? sys tel tenn thu thurs treas tues? "
    "univ va vs vt wed wisc? wm wyo ph\\.d ed\\.d"
)
_CAPITALISED = "Ark Az Del Ill La Mass Miss Ore Pa Tex Wash ARK AZ DEL ILL LA MASS MISS ORE PA TEX WASH"
"""Abbreviations that are other words in lower case."""
_NUMBERED = "art ca figs? nos? op pp prop"
"""Abbreviations only before a number."""
_OPENERS = (
    "A About According Additionally After An As At But Earlier He Her Here However If In It Last Many More Now Once "
    "One Other Our She Since So Some Such That The Their Then There These They This We What When While Yet You"
)
"""Before one of these words, a single letter with a dot ends a sentence; otherwise it is an initial."""


def _any(words: str) -> str:
    return "|".join(words.split())


_L = r"[^\W\d_²³₂]"  # a letter
_W = r"[^\W_²³₂]"  # a letter or digit
_A = "['’]"
_ENDING = rf"(?i:[smd]|re|ve|ll)(?!{_W})"
_WORD = re.compile(
    rf"""
      (?P<address>  https?://[^\s<>|()]*[^\s<>|().!?,;:'-] | [\w.-]+@[\w-]+(?:\.[\w-]+)+ )
    | (?P<dotted>   (?: (?i:{_any(_ABBREVIATIONS)}) | {_any(_CAPITALISED)} | (?i:{_any(_NUMBERED)})(?=\.\s*\d)
                      | [A-Za-z](?!\.\s+(?:{_any(_OPENERS)})(?!\S)) | [A-Za-z](?:\.[A-Za-z])+ ) \.(?!{_L}|-\w) )
    | (?P<split>    (?i: can(?=not\b) | gon(?=na\b) | got(?=ta\b) | wan(?=na\b) | lem(?=me\b) | gim(?=me\b)
                       | {_A}t(?=(?:is|was)\b) | {_L}*?[^\W\d_nN](?=n{_A}t) | n{_A}ts? | {_A}{_ENDING} ) )
    | (?P<elided>   {_A}n(?:{_A}|(?!{_L})) | {_A}[2-9]0s | {_A}(?:till?|cause|em)
                  | (?i: ol{_A}(?!{_L}) | cap{_A}n | li{_A}l | c{_A}mon | e{_A}er )
                  | [A-HJ-XZn]{_A}(?!{_ENDING}){_L}{{2,}} | {_L}+[aeiouyAEIOUY]{_A}(?!{_ENDING})[aeiouA-Z]{_L}* )
    | (?P<number>   (?:\d{{1,4}}-)?\d{{1,4}}/\d{{1,4}}(?![\w/]) | \d+(?:[.,]\d+)+(?:-{_W}+)+
                  | \d+(?:\.\d+)+(?:\.[A-Za-z]\w*)+ | [+-]?\d*(?:[.:,]\d+)+ | [+-]\d+(?![\w-]) )
    | (?P<symbol>   [A-Z]+(?:[+&][A-Z]+)+ | [Cc]\+\+ | [CcFf]\# | [A-Z]{{1,3}}\$ | [\#@]{_L}\w* )
    | (?P<slashed>  [A-Za-z0-9]+(?:-[A-Za-z]+){{0,2}}(?:/[A-Za-z0-9]+(?:-[A-Za-z]+){{0,2}}){{1,2}} )
    | (?P<plain>    (?:[dol]{_A})?{_W}+(?:-(?:[dol]{_A})?{_W}+)+(?!{_A}t) | (?i:[dol]){_A}(?!{_ENDING}){_W}+
                  | {_L}{_W}*(?:[.!?]{_L}{_W}*)+(?:\.?-{_W}+)* | {_W}+(?:_+{_W}+)* )
    | (?P<run>      \.\.+ | --+ | \'\' | `` | [!?]{{2,}} | \*+ )
    | (?P<other>    \S )
    """,
    re.VERBOSE,
)


def tokenize(caption: str) -> tuple[str, ...]:
    """The words of a caption as by pycocoevalcap's PTBTokenizer: lower case, without punctuation.

    "isn't" is two words, "U.S." one; "!!" and brackets are words, as there. Equal on 3,901 captions (COCO results, Tux
    Paint, emoji) and on all but 24 of 105,021 sentences of WordNet and GIMP's manual; HTML, emoticons, telephone
    numbers and rare uses of the apostrophe differ. The Java program reads all captions as one text, so that the next
    caption may change how a final "B." is read; here each caption is read alone.
    """
    words = []
    for match in _WORD.finditer(caption.translate(_REWRITES)):
        word = match.group()
        if _PUNCTUATION.fullmatch(word):
            continue
        if match.lastgroup == "split":
            word = word.replace("’", "'")
        words.append(_RENAMED.get(word, word).lower())
    return tuple(words)
