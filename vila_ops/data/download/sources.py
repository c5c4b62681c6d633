"""The raw files of a source whose images are on the web, and the URLs that they name."""

from pathlib import Path
from typing import cast

from vila_ops.config import Source
from vila_ops.config.kinds import module_of
from vila_ops.config.sources import OwnFiles
from vila_ops.data.raw.objects import raw_path
from vila_ops.data.raw.url_files import out_of, url_files
from vila_ops.data.sources import GROUP, SOURCES, ImageUrls

KINDS = ("coyo", "interleaved", "mmc4", "table")
"""Our kinds with images by URL."""


def raw_files(source: Source, out: Path) -> list[tuple[Path, Path]]:
    """Each raw file of a source, by name, and the path in `out` of its tar and manifest without their suffixes.

    Raises ValueError if there are none.
    """
    suffixes = url_module(source.kind).URL_FILES
    files = url_files(raw_path(cast(OwnFiles, source).path), suffixes, images=str(out))
    return [(path, out_of(str(out), name)) for name, path in files]


def urls_of(source: Source, path: Path) -> list[str]:
    """The distinct URLs of one raw file in the order of first appearance. Raises ValueError for another format."""
    stated = url_module(source.kind).image_urls(source, path)
    return list(dict.fromkeys(url for one in stated if (url := _text(one))))


def url_module(kind: str) -> ImageUrls:
    """The module of a kind. Raises ValueError for a kind without images by URL."""
    module = module_of(GROUP, SOURCES, kind)
    if not hasattr(module, "image_urls"):
        raise ValueError(f"sources of kind {kind!r} have no image URLs to download; {', '.join(KINDS)} have")
    return cast(ImageUrls, module)


def _text(url: object) -> str:
    """A URL that UTF-8 can hold: a lone surrogate, which JSON can contain, becomes `?`. Empty if it is not text."""
    return url.encode(errors="replace").decode() if isinstance(url, str) else ""
