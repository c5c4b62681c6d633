"""The words of captions by the Penn Treebank rules, as published caption scores are computed on them.

`official_words` runs the tokenizer of pycocoevalcap 1.2: a class of Stanford CoreNLP 3.4.1 in a jar of its wheel, run
by Java. `tokenize` is ours, pure and without Java, and the tokenizer is part of the name of a metric that is computed
with it. It differs on 24 of 105,021 sentences.

`official_words` and `corrected_words` differ where a caption holds a line end other than "\\n", which pycocoevalcap
replaces. The tokenizer breaks the line at it, so that every later caption gets the words of the one before. Corrected:
a space is put in its place. Its reading of U+0085 as "..." (Windows' code for it) is kept in both.
"""

import re
import shutil
import subprocess
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from vila_ops.errors import TokenizerMissing

Words = Sequence[str]

JAR = "stanford-corenlp-3.4.1.jar"

_LINE_ENDS = re.compile("[\\r\\v\\f\\u2028\\u2029]")
"""At which, besides "\n", the tokenizer ends a line."""

_REMOVED = frozenset(("", "''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-", *".?!,:-;", "--", "..."))
"""Words that are dropped. Brackets stay, because they are in lower case by then."""

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
_WORD = rf"""
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
    """
"""Verbose. It is compiled at its first use: a run that measures nothing imports this module too."""


def has_official_tokenizer() -> bool:
    """Whether Java and the jar are installed here."""
    return shutil.which("java") is not None and _jar() is not None


def official_words(captions: Sequence[str]) -> list[Words]:
    """The words of captions as pycocoevalcap's `PTBTokenizer` gives them when it reads all of them at once.

    The captions are one text for the tokenizer: the next caption may decide how a final "B." is read. Raises
    TokenizerMissing, and ValueError for captions that are fewer lines than texts.
    """
    lines = _java([caption.replace("\n", " ") for caption in captions])
    if len(lines) < len(captions):
        raise ValueError(f"the tokenizer gave {len(lines)} lines for {len(captions)} captions; look for odd characters")
    return [tuple(word for word in line.split(" ") if word not in _REMOVED) for line in lines[: len(captions)]]


def corrected_words(captions: Sequence[str]) -> list[Words]:
    """The words of captions by the official tokenizer, each from its own caption. Raises TokenizerMissing."""
    return official_words([_LINE_ENDS.sub(" ", caption) for caption in captions])


def python_words(captions: Sequence[str]) -> list[Words]:
    """The words of captions by `tokenize`."""
    return [tokenize(caption) for caption in captions]


def _java(lines: Sequence[str]) -> list[str]:
    """The tokenized lines of a text, without the spaces at their ends."""
    java, jar = shutil.which("java"), _jar()
    if java is None or jar is None:
        raise TokenizerMissing(
            "official caption scores need Java and the jar of pycocoevalcap; install a Java runtime (Debian: "
            "default-jre-headless) and the package pycocoevalcap, or take the variant ptb_python"
        )
    program = (java, "-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase")
    done = subprocess.run(program, input="\n".join(lines).encode(errors="replace"), capture_output=True, check=False)
    if done.returncode:
        raise TokenizerMissing(f"the official tokenizer failed: {done.stderr.decode(errors='replace')[-500:]}")
    return [line.rstrip() for line in done.stdout.decode().split("\n")]


def _jar() -> Path | None:
    package = find_spec("pycocoevalcap")
    places = package.submodule_search_locations if package is not None else None
    jars = [jar for place in places or () if (jar := Path(place) / "tokenizer" / JAR).is_file()]
    return jars[0] if jars else None


def tokenize(caption: str) -> tuple[str, ...]:
    """The words of a caption as by pycocoevalcap's PTBTokenizer: lower case, without punctuation.

    "isn't" is two words, "U.S." one; "!!" and brackets are words, as there. Equal on 3,901 captions (COCO results, Tux
    Paint, emoji) and on all but 24 of 105,021 sentences of WordNet and GIMP's manual; HTML, emoticons, telephone
    numbers and rare uses of the apostrophe differ. The Java program reads all captions as one text, so that the next
    caption may change how a final "B." is read; here each caption is read alone.
    """
    words = []
    for match in re.finditer(_WORD, caption.translate(_REWRITES), re.VERBOSE):
        word = match.group()
        if _PUNCTUATION.fullmatch(word):
            continue
        if match.lastgroup == "split":
            word = word.replace("’", "'")
        words.append(_RENAMED.get(word, word).lower())
    return tuple(words)
