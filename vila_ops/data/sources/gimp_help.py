"""The GIMP manual: XHTML pages as interleaved documents of text and figures."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import assert_never
from xml.etree import ElementTree

import PIL.Image

from vila_ops.config.sources import GimpHelp
from vila_ops.data.raw.files import Folders, RawFile, Span
from vila_ops.data.records import Dropped, Image, Part, Record, Turn
from vila_ops.data.sources.packaged import packages_as_file, provenance

PAGES = "usr/share/gimp/2.0/help/en"
MIN_FIGURE_PIXELS = 64
"""Shorter side of a figure; smaller images are icons."""
_XHTML = "{http://www.w3.org/1999/xhtml}"
_NAVIGATION = ("navheader", "navfooter", "toc", "indexterm")
_BLOCKS = ("p", "div", "li", "dt", "dd", "h1", "h2", "h3", "h4", "h5", "h6", "tr", "pre", "blockquote", "br", "table")
_NUMBERING = re.compile(r"^(?:Figure|Table|Example|Chapter|Appendix)?\s*[0-9A-Z]+(?:\.[0-9]+)*\.\s+(?=\S)")
_FIGURE = re.compile(rb'<img\s[^>]*?src="([^"]+\.(?:png|jpe?g))"', re.IGNORECASE)


def keys(folder: Path) -> list[str]:
    """Names of the pages with at least one figure, sorted."""
    root = folder / PAGES
    figures = {path.relative_to(root).as_posix() for path in root.rglob("*") if _is_figure(path)}
    pages = (path for path in root.glob("*.html") if not figures.isdisjoint(_named_figures(path)))
    return sorted(path.stem for path in pages)


def raw_files(source: GimpHelp, folders: Folders, *, cache: Path) -> list[RawFile]:
    """The package as one file."""
    return packages_as_file(source, keys(folders[source.package.name]))


def read(source: GimpHelp, folders: Folders, span: Span) -> Iterator[list[Record | Dropped]]:
    """The records of each key: one, or one for each figure."""
    folder = folders[source.package.name]
    for number, key in enumerate(keys(folder)[span.start : span.stop], start=span.start):
        yield _page(source, folder, key) if span.takes(number) else []


def _page(source: GimpHelp, folder: Path, key: str) -> list[Record | Dropped]:
    """The page as one document, or as pairs."""
    root = folder / PAGES
    parts = _parts(root, ElementTree.parse(root / f"{key}.html").getroot())
    match source.order:
        case "interleaved":
            samples = {key: parts}
        case "image_first":
            samples = {key: image_first(parts)}
        case "pairs":
            samples = {f"{key}#{number}": pair for number, pair in enumerate(pairs(parts))}
        case _:
            assert_never(source.order)
    if not any(isinstance(part, str) for own in samples.values() for part in own):
        return [Dropped(id=key, reason="no_text")]
    return [
        Record(
            id=id_,
            object=key,
            turns=(Turn("document", own),),
            category="",
            licence=source.package.licence,
            provenance=provenance(source.package, f"{PAGES}/{key}.html"),
        )
        for id_, own in samples.items()
    ]


def image_first(parts: Sequence[Part]) -> tuple[Part, ...]:
    """All figures, in their order, then all text."""
    text = "\n".join(part for part in parts if isinstance(part, str))
    return (*(part for part in parts if isinstance(part, Image)), *([text] if text else []))


def pairs(parts: Sequence[Part]) -> list[tuple[Part, ...]]:
    """Each figure with the line before it, or after it where there is none; the other text is left out."""
    lines: list[Part] = []
    for part in parts:
        lines += part.split("\n") if isinstance(part, str) else [part]
    samples: list[tuple[Part, ...]] = []
    for place, figure in enumerate(lines):
        if isinstance(figure, Image):
            before = [line for line in lines[:place] if isinstance(line, str)][-1:]
            after = [line for line in lines[place + 1 :] if isinstance(line, str)][:1]
            samples += [(figure, line) for line in before or after]
    return samples


def _named_figures(page: Path) -> set[str]:
    return {name.decode("utf-8") for name in _FIGURE.findall(page.read_bytes())}


def _is_figure(path: Path) -> bool:
    if path.suffix.lower() not in (".png", ".jpg", ".jpeg") or not path.is_file():
        return False
    with PIL.Image.open(path) as image:
        return min(image.size) >= MIN_FIGURE_PIXELS


def _parts(root: Path, page: ElementTree.Element) -> tuple[Part, ...]:
    """Text and figures in reading order. The text between two figures is one part, with a line for each block."""
    parts: list[Part] = []
    lines: list[str] = []
    for item in [*_blocks(root, page.iter(f"{_XHTML}body")), None]:
        if isinstance(item, str):
            lines.append(item)
            continue
        if lines:
            parts.append("\n".join(lines))
            lines = []
        if item is not None:
            parts.append(item)
    return tuple(parts)


def _blocks(root: Path, bodies: Iterator[ElementTree.Element]) -> Iterator[str | Image]:
    """Cleaned lines of text, and figures."""
    words: list[str] = []
    for item in (item for body in bodies for item in _walk(root, body)):
        if isinstance(item, str):
            words.append(item)
            continue
        line = _clean("".join(words))
        words = []
        if line:
            yield line
        if isinstance(item, Image):
            yield item


def _walk(root: Path, element: ElementTree.Element) -> Iterator[str | Image | None]:
    """Pieces of text, figures, and None at the start and end of a block, without navigation."""
    tag = element.tag.removeprefix(_XHTML)
    if element.get("class") in _NAVIGATION or tag in ("script", "style"):
        return
    if tag == "img":
        path = root / element.get("src", "")
        if _is_figure(path):
            yield Image(path.read_bytes())
        return
    if tag in _BLOCKS:
        yield None
    if tag in ("td", "th"):
        yield " "
    yield element.text or ""
    for child in element:
        yield from _walk(root, child)
        yield child.tail or ""
    if tag in _BLOCKS:
        yield None


def _clean(text: str) -> str:
    """The text with single spaces and without numbering of headings and figures; empty without letters and digits."""
    line = _NUMBERING.sub("", " ".join(text.split()))
    return line if any(character.isalnum() for character in line) else ""
