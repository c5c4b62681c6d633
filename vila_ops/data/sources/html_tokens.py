"""HTML to tags and text, in linear time for any input. Pure.

The tokenizer of https://html.spec.whatwg.org/#tokenization, reduced to what affects text and images. Python's
html.parser is not used: it takes an hour for a malicious page of 200 kB (`<a b=` repeated).
"""

import html
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

RAW = ("script", "style", "textarea", "title", "iframe", "noembed", "noframes", "xmp")
"""Elements whose content has no tags."""
_NAME = re.compile(r"</?([a-zA-Z][^\s/>]*)")
_ATTRIBUTE = re.compile(r"""[\s/]*([^\s/>][^\s/>=]*)(?:\s*=\s*("[^"]*"|'[^']*'|["']|[^\s>"'][^\s>]*)?)?""")
"""Name and value; a value of a single quote is an unterminated one."""
_TAG_END = re.compile(r"[\s/]*>")
_COMMENT_END = re.compile(r"--!?>")
_HUGE_REFERENCE = re.compile(r"&#(?:[0-9]{9,}|x[0-9a-f]{9,});?", re.IGNORECASE)
"""References beyond any character; Python refuses to parse the longest as numbers."""


@dataclass(frozen=True)
class Start:
    """A start tag, its name and the names of its attributes in lower case."""

    name: str
    attributes: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class End:
    """An end tag."""

    name: str


def tokens(text: str) -> Iterator[Start | End | str]:
    """Tags and text in order, with character references resolved; no comments and no unterminated tag."""
    place = 0
    while (opened := text.find("<", place)) >= 0:
        if opened > place:
            yield _resolved(text[place:opened])
        if name := _NAME.match(text, opened):
            attributes, place = _attributes(text, name.end())
            if place < 0:
                return
            tag = name.group(1).lower()
            if text[opened + 1] == "/":
                yield End(tag)
                continue
            yield Start(tag, attributes)
            if tag in RAW:
                start, place = place, _raw_end(text, tag, place)
                yield _resolved(text[start:place])
        elif text.startswith(("<!", "<?", "</"), opened):
            place = _comment_end(text, opened)
            if place < 0:
                return
        else:
            yield "<"
            place = opened + 1
    yield _resolved(text[place:])


def _attributes(text: str, place: int) -> tuple[dict[str, str], int]:
    """The attributes of a tag and its end, -1 if the page ends first. The first attribute of a name counts."""
    attributes: dict[str, str] = {}
    while (end := _TAG_END.match(text, place)) is None:
        attribute = _ATTRIBUTE.match(text, place)
        if attribute is None or attribute.group(2) in ("'", '"'):
            return attributes, -1
        value = attribute.group(2) or ""
        value = value[1:-1] if value[:1] in ("'", '"') else value
        attributes.setdefault(attribute.group(1).lower(), _resolved(value))
        place = attribute.end()
    return attributes, end.end()


def _raw_end(text: str, tag: str, place: int) -> int:
    """The start of the end tag of a raw element, or the end of the page."""
    end = re.compile(rf"</{tag}[\s/>]", re.IGNORECASE).search(text, place)
    return end.start() if end else len(text)


def _comment_end(text: str, opened: int) -> int:
    """The end of a comment, a doctype or a bogus comment; -1 if it is not closed."""
    if not text.startswith("<!--", opened):
        return text.find(">", opened) + 1 or -1
    if text.startswith(("<!-->", "<!--->"), opened):
        return text.index(">", opened) + 1
    end = _COMMENT_END.search(text, opened + 4)
    return end.end() if end else -1


def _resolved(text: str) -> str:
    return html.unescape(_HUGE_REFERENCE.sub("\ufffd", text)) if "&" in text else text
