"""Name the object that a caption is about, so that an object is in one split only. Pure."""

import re


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_LEADING = _words("a an the some any another our this these those two three very big no")
_ENDS_PHRASE = _words(
    "of in on at with without for from by to into inside behind over under near around that which who whose as "
    "like but or if is are was were be been will has have had lets let means mean stands stand shows resembles "
    "carries carry used called covered hatched eaten made facing showing tilted fluttering playing dancing making "
    "ahead not done increasing decreasing also last then you we it its"
)
_NOT_A_NOUN_PHRASE = _words("i we you it they because when remember eat enter put go look down up")
_PORTIONS = _words(
    "pair couple bunch cluster string head ear quarter slice piece group baby plant bowl roll sheaf cut drop"
)
"""In "a pair of cherries" the cherries are the object."""
_QUALITIES = _words(
    "red orange yellow green blue purple pink brown black white grey gray golden silver plastic ripe wilted potted "
    "colorful large small little new old full open closed flat"
)
_GENERIC = _words("face flower fruit plant")
"""In "a hibiscus flower" the hibiscus is the object, in "a red flower" the flower."""
_COMPOUNDS = {
    "hot dog": "hot-dog",
    "ice cream": "ice-cream",
    "sea lion": "sea-lion",
    "teddy bear": "teddy-bear",
    "t shirt": "t-shirt",
    "light bulb": "lightbulb",
    "fire truck": "fire-engine",
    "fire engine": "fire-engine",
    "top hat": "top-hat",
    "lady beetle": "ladybug",
    "kiwi fruit": "kiwifruit",
    "milky way": "milky-way",
    "x ray": "x-ray",
}
"""Two words with another meaning than their last word, and words with two spellings."""
_IRREGULAR = {
    "leaves": "leaf",
    "knives": "knife",
    "wolves": "wolf",
    "mice": "mouse",
    "geese": "goose",
    "feet": "foot",
    "teeth": "tooth",
    "men": "man",
    "women": "woman",
    "children": "child",
    "people": "person",
    "buses": "bus",
    "cookies": "cookie",
    "movies": "movie",
    "shoes": "shoe",
    "canoes": "canoe",
    "toes": "toe",
}
_ALREADY_SINGULAR = _words(
    "scissors pants jeans pliers binoculars goggles sunglasses shorts briefs series species news gas lens canvas atlas "
    "christmas clothes rhinoceros mars stairs arts skis"
)


def object_name(caption: str) -> str:
    """The head noun of the caption's first noun phrase, lower case and singular; the whole caption if it has none.

    "A red apple." and "green apple" give "apple", "A pair of closed scissors." gives "scissors".
    """
    text = _lowered(caption)
    words = _noun_phrase(text)
    if not words:
        return " ".join(caption.lower().split()).rstrip(".")
    while len(words) > 1 and words[-1] in _GENERIC and words[-2] not in _QUALITIES:
        words.pop()
    return singular(words[-1])


def singular(noun: str) -> str:
    """The singular of a lower-case English noun, by rule and short lists; good enough to match names."""
    if noun in _IRREGULAR:
        return _IRREGULAR[noun]
    if noun in _ALREADY_SINGULAR or len(noun) < 4 or noun.endswith(("ss", "us", "is")) or not noun.endswith("s"):
        return noun
    if noun.endswith("ies") and len(noun) > 4:
        return noun[:-3] + "y"
    if noun.endswith(("sses", "xes", "ches", "shes", "zzes", "oes")):
        return noun[:-2]
    return noun[:-1]


def _lowered(caption: str) -> str:
    """Lower case, without quotes and possessives, with single spaces and joined compounds."""
    text = re.sub(r"[’']s\b", "", caption.lower())
    text = re.sub(r"[\"“”‘’']", "", text)
    text = " ".join(text.split())
    for written, joined in _COMPOUNDS.items():
        text = re.sub(rf"\b{written}(s?)\b", rf"{joined}\1", text)
    return text


def _noun_phrase(text: str) -> list[str]:
    """The words of the first noun phrase without articles; empty if the text does not begin with one."""
    phrase: list[str] = []
    tokens = re.findall(r"[\w-]+|[^\w\s]", text)
    if tokens and tokens[0] in _NOT_A_NOUN_PHRASE:
        return []
    for position, token in enumerate(tokens):
        if token == "of" and phrase and singular(phrase[-1]) in _PORTIONS:
            return _noun_phrase(" ".join(tokens[position + 1 :])) or phrase
        if token in (",", "and") and phrase and phrase[-1] in _QUALITIES:
            continue
        if token in _ENDS_PHRASE or token == "and" or not re.match(r"\w", token):
            break
        if phrase or token not in _LEADING:
            phrase.append(token)
    return phrase
