"""HTML to tags and text, in one pass over the page whatever it holds. Pure.

The tokenizer of https://html.spec.whatwg.org/#tokenization without what cannot be seen in text and images. Python's
html.parser is not used: a page of 200 kB that is meant badly (`<a b=` again and again) keeps it busy for an hour.
"""

import html
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

RAW = ("script", "style", "textarea", "title", "iframe", "noembed", "noframes", "xmp")
"""Elements whose content has no tags."""
_NAME = re.compile(r"</?([a-zA-Z][^\s/>]*)")
_ATTRIBUTE = re.compile(r"""[\s/]*([^\s/>][^\s/>=]*)(?:\s*=\s*("[^"]*"|'[^']*'|["']|[^\s>"'][^\s>]*)?)?""")
"""Name and value; a value of one quote alone is one that is never closed."""
_TAG_END = re.compile(r"[\s/]*>")
_COMMENT_END = re.compile(r"--!?>")
_HUGE_REFERENCE = re.compile(r"&#(?:[0-9]{9,}|x[0-9a-f]{9,});?", re.IGNORECASE)
"""Of no character; Python would refuse to read the longest ones as numbers."""


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
    """Tags and text in their order, character references resolved; no comments, nothing of a tag that is cut off."""
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
    """The attributes of a tag and where it ends; -1 where the page ends before it. The first of a name counts."""
    found: dict[str, str] = {}
    while (end := _TAG_END.match(text, place)) is None:
        attribute = _ATTRIBUTE.match(text, place)
        if attribute is None or attribute.group(2) in ("'", '"'):
            return found, -1
        value = attribute.group(2) or ""
        value = value[1:-1] if value[:1] in ("'", '"') else value
        found.setdefault(attribute.group(1).lower(), _resolved(value))
        place = attribute.end()
    return found, end.end()


def _raw_end(text: str, tag: str, place: int) -> int:
    """Where the end tag of a raw element begins; the end of the page where there is none."""
    end = re.compile(rf"</{tag}[\s/>]", re.IGNORECASE).search(text, place)
    return end.start() if end else len(text)


def _comment_end(text: str, opened: int) -> int:
    """Behind a comment, a doctype or what counts as a comment; -1 where it is not closed."""
    if not text.startswith("<!--", opened):
        return text.find(">", opened) + 1 or -1
    if text.startswith(("<!-->", "<!--->"), opened):
        return text.index(">", opened) + 1
    end = _COMMENT_END.search(text, opened + 4)
    return end.end() if end else -1


def _resolved(text: str) -> str:
    return html.unescape(_HUGE_REFERENCE.sub("\ufffd", text)) if "&" in text else text
