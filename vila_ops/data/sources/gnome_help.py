"""GNOME's user help: Mallard pages, whose title asks or names a task and whose text answers it."""

import re
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

from vila_ops.config.sources import GnomeHelp
from vila_ops.data.raw.files import Folders, RawFile, Span
from vila_ops.data.records import Dropped, Record, Turn
from vila_ops.data.sources.packaged import packages_as_file, provenance, read_keys

PAGES = "usr/share/help/C/gnome-help"
_MALLARD = "{http://projectmallard.org/1.0/}"
_IF = "{http://projectmallard.org/if/1.0/}"
_HIDDEN = ("info", "title", "media", "links", "comment", "cite", "table", "subtitle", "desc")
_LINES = ("p", "screen", "code")
_TASK_VERBS = (
    "add adjust automatically browse cancel change check choose click configure connect control copy create "
    "define delete determine disable disconnect edit enable enter find flash get have hide install limit link log "
    "magnify make manage manually map maximize middle-click move open participate pin preview print purge read "
    "recover remove rename repair restore safely search select send set share show simulate sort start stop "
    "switch test tile turn use view wipe write"
)


def keys(folder: Path) -> list[str]:
    """Names of the topic pages, sorted; guide pages are lists of links."""
    pages = ((path.stem, ElementTree.parse(path).getroot()) for path in (folder / PAGES).glob("*.page"))
    return sorted(name for name, page in pages if page.get("type") == "topic")


def raw_files(source: GnomeHelp, folders: Folders, *, cache: Path) -> list[RawFile]:
    """The package as one file."""
    return packages_as_file(source, keys(folders[source.package.name]))


def read(source: GnomeHelp, folders: Folders, span: Span) -> Iterator[list[Record | Dropped]]:
    """The record of each key."""
    folder = folders[source.package.name]
    return read_keys(keys(folder), span, lambda key: _page(source, folder, key))


def _page(source: GnomeHelp, folder: Path, key: str) -> Record | Dropped:
    """The page as a question and its answer."""
    path = folder / PAGES / f"{key}.page"
    page = ElementTree.parse(path).getroot()
    answer = "\n".join(_lines(page, path.parent))
    if not answer:
        return Dropped(id=key, reason="no_text")
    subtitle = page.find(f"{_MALLARD}subtitle")
    title = _title(page, path.parent) + ("" if subtitle is None else f": {_text(subtitle, path.parent)}")
    user_text = question(title, problem=page.get("style") == "problem")
    return Record(
        id=key,
        object=key,
        turns=(Turn("user", (user_text,)), Turn("assistant", (answer,))),
        category=page.get("style") or "",
        licence=source.package.licence,
        provenance=provenance(source.package, f"{PAGES}/{key}.page"),
    )


def question(title: str, *, problem: bool) -> str:
    """A page's title as a question in the first person: "Rename a file" -> "How do I rename a file?"."""
    if title.endswith("?"):
        return title
    first, _, rest = title.partition(" ")
    if match := re.match(r"(How|What|Where) to (.+)", title):
        return _in_first_person(f"{match[1]} {'do' if match[1] == 'How' else 'should'} I {match[2]}?")
    if first.lower().rstrip(",") in _TASK_VERBS.split():
        return _in_first_person(f"How do I {first.lower()} {rest}".rstrip() + "?")
    if problem or first in ("I", "My") or " is " in title:
        return f"{title}. What can I do?"
    return f"What should I know about {_uncapitalised(title)}?"


def _in_first_person(text: str) -> str:
    return re.sub(r"\byou\b", "I", re.sub(r"\byour\b", "my", text))


def _uncapitalised(title: str) -> str:
    """The title with a lower-case first letter, except in a name like GNOME or IRC."""
    return title if title[:2].isupper() else title[:1].lower() + title[1:]


def _lines(element: ElementTree.Element, folder: Path) -> Iterator[str]:
    """The element's text, a line for each paragraph, with numbered steps and section titles."""
    for child in element:
        tag = child.tag.removeprefix(_MALLARD)
        if tag in _HIDDEN or not _applies(child):
            continue
        if tag in _LINES:
            yield from filter(None, [_text(child, folder)])
        elif tag in ("steps", "list", "terms"):
            yield from _items(child, folder, numbered=tag == "steps")
        elif tag == f"{_IF}choose":
            yield from _lines(_chosen(child), folder)
        else:
            if tag in ("section", "steps") and (title := _title(child, folder)):
                yield f"{title}:"
            yield from _lines(child, folder)


def _items(element: ElementTree.Element, folder: Path, *, numbered: bool) -> Iterator[str]:
    """A line for each item, which starts with its number or a dash."""
    if title := _title(element, folder):
        yield title
    items = [child for child in element if child.tag == f"{_MALLARD}item" and _applies(child)]
    for number, item in enumerate(items, start=1):
        lead = f"{number}." if numbered else "-"
        term = _title(item, folder)
        body = " ".join(_lines(item, folder))
        yield f"{lead} {term}: {body}" if term else f"{lead} {body}"


def _title(element: ElementTree.Element, folder: Path) -> str:
    title = element.find(f"{_MALLARD}title")
    return "" if title is None else _text(title, folder)


def _text(element: ElementTree.Element, folder: Path) -> str:
    return " ".join("".join(_pieces(element, folder)).split())


def _pieces(element: ElementTree.Element, folder: Path) -> Iterator[str]:
    """Running text: key combinations are joined by +, menus by >, and an empty link is the title of its page."""
    tag = element.tag.removeprefix(_MALLARD)
    if tag in ("media", "comment") or not _applies(element):
        return
    if tag in ("keyseq", "guiseq"):
        yield ("+" if tag == "keyseq" else " > ").join(_text(child, folder) for child in element)
        return
    if tag == "link" and not len(element) and not (element.text or "").strip():
        yield _linked_title(element.get("xref", ""), folder)
        return
    yield element.text or ""
    for child in element:
        yield from _pieces(child, folder)
        yield child.tail or ""


def _linked_title(target: str, folder: Path) -> str:
    """The title that a link PAGE or PAGE#SECTION refers to; empty if the page is unknown, as for #SECTION."""
    name, _, section = target.partition("#")
    path = folder / f"{name}.page"
    if not name or not path.is_file():
        return ""
    page = ElementTree.parse(path).getroot()
    target_section = page.find(f".//*[@id='{section}']") if section else None
    return _title(page if target_section is None else target_section, folder)


def _chosen(choose: ElementTree.Element) -> ElementTree.Element:
    """The first `when` that applies, else the `else`, else nothing."""
    for branch in choose:
        if branch.tag == f"{_IF}else" or _condition(branch.get("test")):
            return branch
    return ElementTree.Element("nothing")


def _applies(element: ElementTree.Element) -> bool:
    own = element.get("test") if element.tag == f"{_IF}if" else None
    return _condition(own) and _condition(element.get(f"{_IF}test"))


def _condition(test: str | None) -> bool:
    """Mallard's condition on a plain GNOME: no token holds, so only negated ones do; comma is or, space is and."""
    if test is None:
        return True
    return any(all(token.startswith("!") for token in choice.split()) for choice in test.split(","))
