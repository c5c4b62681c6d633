"""The text lines and image URLs of an HTML page, in reading order, as lenient as a browser. Pure."""

import codecs
import re
from dataclasses import dataclass

from vila_ops.data.sources.faults import Fault, checked
from vila_ops.data.sources.html_tokens import End, Start, tokens

SKIPPED = (
    "title",
    "script",
    "style",
    "template",
    "nav",
    "svg",
    "math",
    "iframe",
    "object",
    "select",
    "textarea",
    "button",
)
"""Elements whose content is skipped, images included, like that of role="navigation"."""
BLOCKS = (
    *("address", "article", "aside", "blockquote", "body", "br", "caption", "center", "dd", "details", "dialog", "div"),
    *("dl", "dt", "fieldset", "figcaption", "figure", "footer", "form", "h1", "h2", "h3", "h4", "h5", "h6", "header"),
    *("hr", "legend", "li", "main", "menu", "ol", "p", "pre", "section", "summary", "table", "tbody", "tfoot", "thead"),
    *("tr", "ul"),
)
"""Elements that start and end a line."""
_VOID = ("area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr")
_BOMS = ((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be"))
_CHARSET = re.compile(rb"""<meta\s[^>]{0,200}?charset\s{0,9}=\s{0,9}["']?\s{0,9}([a-z0-9_:.-]{1,40})""", re.IGNORECASE)
_CHARSET_BYTES = 1024
"""https://html.spec.whatwg.org/#charset: the declaration is within the first so many bytes."""
_CODECS = (
    *("utf-8", "cp866", "iso8859-2", "iso8859-3", "iso8859-4", "iso8859-5", "iso8859-6", "iso8859-7", "iso8859-8"),
    *("iso8859-10", "iso8859-13", "iso8859-14", "iso8859-15", "iso8859-16", "koi8-r", "koi8-u", "mac-roman"),
    *(
        "mac-cyrillic",
        "cp874",
        "cp1250",
        "cp1251",
        "cp1252",
        "cp1253",
        "cp1254",
        "cp1255",
        "cp1256",
        "cp1257",
        "cp1258",
    ),
    *("gbk", "gb18030", "big5", "euc_jp", "iso2022_jp", "shift_jis", "euc_kr"),
)
"""Python's names of the encodings in https://encoding.spec.whatwg.org/#names-and-labels."""
_READ_AS = {"ascii": "cp1252", "iso8859-1": "cp1252", "iso8859-9": "cp1254", "gb2312": "gbk"}
"""Encodings that browsers decode as another one, by the same standard. A declared UTF-16 is UTF-8, since the
declaration itself was readable."""


@dataclass(frozen=True)
class PageImage:
    """An image element of a page."""

    src: str


def page(data: bytes) -> list[str | PageImage]:
    """Text lines with single spaces, and images. Raises Fault (bad_encoding, nul_in_text, lone_surrogate)."""
    reader = _Reader()
    for token in tokens(checked(decoded(data), what="the page")):
        reader.take(token)
    return reader.finished()


def decoded(data: bytes) -> str:
    """A page's text, by its byte order mark, else its <meta charset>, else as UTF-8. Raises Fault (bad_encoding)."""
    bom, name = next(((bom, name) for bom, name in _BOMS if data.startswith(bom)), (b"", ""))
    name = name or _declared(data)
    try:
        return data[len(bom) :].decode(name)
    except UnicodeDecodeError as error:
        place = f"byte {len(bom) + error.start}"
        raise Fault(
            "bad_encoding", f"{place} is not {name} ({error.reason}); declare the page's own charset"
        ) from error


def _declared(data: bytes) -> str:
    declaration = _CHARSET.search(data[:_CHARSET_BYTES])
    if declaration is None:
        return "utf-8"
    label = declaration.group(1).decode("ascii").lower()
    if label.startswith("utf-16"):
        return "utf-8"
    try:
        name = codecs.lookup(label).name
    except LookupError:
        name = label
    name = _READ_AS.get(name, name)
    if name not in _CODECS:
        raise Fault(
            "bad_encoding", f"the charset {label!r} is not in the WHATWG encoding standard; save the page as UTF-8"
        )
    return name


class _Reader:
    """Collects lines and images from tokens; knows whether it is inside a skipped element."""

    def __init__(self) -> None:
        self._items: list[str | PageImage] = []
        self._words: list[str] = []
        self._skipped, self._depth = "", 0

    def take(self, token: Start | End | str) -> None:
        """Process one token."""
        match token:
            case Start(name) if self._depth:
                self._depth += name == self._skipped
            case End(name) if self._depth:
                self._depth -= name == self._skipped
            case str() if self._depth:
                return
            case Start():
                self._start(token)
            case End(name):
                if name in BLOCKS:
                    self._end_line()
            case str():
                self._words.append(token)

    def finished(self) -> list[str | PageImage]:
        """All lines and images."""
        self._end_line()
        return self._items

    def _start(self, tag: Start) -> None:
        if tag.name in SKIPPED or (tag.attributes.get("role") == "navigation" and tag.name not in _VOID):
            self._skipped, self._depth = tag.name, 1
        elif tag.name == "img":
            self._end_line()
            if src := tag.attributes.get("src", "").strip():
                self._items.append(PageImage(src))
        elif tag.name in BLOCKS:
            self._end_line()
        elif tag.name in ("td", "th"):
            self._words.append(" ")

    def _end_line(self) -> None:
        line = " ".join("".join(self._words).split())
        self._words = []
        if line:
            self._items.append(line)
