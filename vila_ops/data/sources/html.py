"""A folder of HTML pages and their images: each page is an interleaved document.

Text blocks and images are in reading order, without alt texts, images with a side below 64 pixels, navigation, scripts
and styles. The `src` of an image is relative to the page or, if it starts with a slash, to the folder; images of other
hosts are not fetched.
"""

import posixpath
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import SplitResult, unquote, urlsplit

from vila_ops.config.sources import Html
from vila_ops.data.containers import BadImage, strip
from vila_ops.data.raw.files import Folders, RawFile, Scan, Span, paths, scan_files
from vila_ops.data.raw.objects import raw_path
from vila_ops.data.records import MISSING_IMAGE, Dropped, Image, Part, Record, Turn
from vila_ops.data.sources.faults import Fault
from vila_ops.data.sources.html_page import PageImage, page
from vila_ops.data.sources.images import from_base64, path_inside, read_image

SUFFIXES = (".html", ".htm", ".xhtml")
MIN_FIGURE_PIXELS = 64
"""Shorter side of a figure; smaller images are icons."""
MAX_PAGE_BYTES = 16 * 2**20


def raw_files(source: Html, folders: Folders, *, cache: Path) -> list[RawFile]:
    """The pages, each with the image files that it refers to."""
    root = _root(source)
    kind = f"{source.kind}:{root}"
    return scan_files(paths(raw_path(source.path), SUFFIXES), kind, lambda path: _scan(root, path), cache=cache)


def read(source: Html, folders: Folders, span: Span) -> Iterator[list[Record | Dropped]]:
    """The document of the page."""
    try:
        yield [_record(source, span)]
    except Fault as fault:
        yield [fault.dropped(span.name, where=span.name)]


def _record(source: Html, span: Span) -> Record:
    parts, notes = _parts(source, span.file())
    if not any(isinstance(part, str) for part in parts):
        raise Fault("no_text", "the page has no text outside of navigation, scripts and the like")
    return Record(
        id=span.name,
        object=span.name.lower(),
        turns=(Turn("document", parts),),
        category="",
        licence=source.licence,
        provenance=span.name,
        notes=notes,
    )


def _parts(source: Html, path: Path) -> tuple[tuple[Part, ...], tuple[str, ...]]:
    """Text and figures, and the record's notes. Text between two figures is one part, with a line for each block."""
    notes: tuple[str, ...] = ()
    parts: list[Part] = []
    lines: list[str] = []
    for item in _page(path):
        if isinstance(item, str):
            lines.append(item)
            continue
        try:
            image = _load(_root(source), path, item)
            is_icon = _shorter_side(image) < MIN_FIGURE_PIXELS
        except Fault:
            if source.missing_images == "drop_document":
                raise
            notes = (MISSING_IMAGE,)
            continue
        if not is_icon:
            if lines:
                parts.append("\n".join(lines))
                lines = []
            parts.append(image)
    return ((*parts, "\n".join(lines)) if lines else tuple(parts)), notes


def _page(path: Path) -> list[str | PageImage]:
    if (size := path.stat().st_size) > MAX_PAGE_BYTES:
        raise Fault("oversized", f"{size} bytes; {MAX_PAGE_BYTES} at most: cut the page into several")
    return page(path.read_bytes())


def _shorter_side(image: Image) -> int:
    try:
        stripped = strip(image.data)
    except BadImage as error:
        raise Fault(f"bad_image_{error.reason}", str(error)) from error
    return min(stripped.width, stripped.height)


def _load(root: Path, path: Path, shown: PageImage) -> Image:
    url = _url(shown)
    if url.scheme == "data":
        return _inline(url)
    return read_image(str(root), _name(root, path, url))


def _url(shown: PageImage) -> SplitResult:
    try:
        return urlsplit(shown.src.replace("\\", "/"))
    except ValueError as error:
        raise Fault("bad_url", f"{shown.src[:200]!r}: {error}") from error


def _inline(url: SplitResult) -> Image:
    """The image of a data: URL, https://www.rfc-editor.org/rfc/rfc2397."""
    kind, _, content = url.path.partition(",")
    if not kind.lower().replace(" ", "").endswith(";base64"):
        raise Fault("bad_url", f"a data: URL of {kind[:60]!r}; images are read as base64 only")
    return from_base64(unquote(content))


def _name(root: Path, path: Path, url: SplitResult) -> str:
    """The file name of a URL, relative to the root. Raises Fault for a URL of another host."""
    if url.scheme or url.netloc:
        raise Fault(
            "remote_image", f"{url.geturl()[:200]!r} is on another host; save it beside the page and refer to that file"
        )
    name = unquote(url.path)
    if name.startswith("/"):
        return posixpath.normpath(name.lstrip("/"))
    return posixpath.normpath(posixpath.join(path.parent.relative_to(root).as_posix(), name))


def _root(source: Html) -> Path:
    path = raw_path(source.path)
    return path.parent if path.is_file() else path


def _scan(root: Path, path: Path) -> Scan:
    """The images of one page; a page that cannot be read has none."""
    files: dict[str, None] = {}
    images = 0
    try:
        shown = [item for item in _page(path) if isinstance(item, PageImage)]
    except Fault:
        shown = []
    for item in shown:
        try:
            url = _url(item)
            if url.scheme != "data":
                files[str(path_inside(str(root), _name(root, path, url)))] = None
            images += 1
        except Fault:  # reported when the page is read
            continue
    return Scan(count=1, images=images, marks=(0,), beside=tuple(files))
