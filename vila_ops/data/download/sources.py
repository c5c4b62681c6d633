"""The raw files of a source whose images are on the web, and the URLs that they name."""

from pathlib import Path
from typing import cast

from vila_ops.config.kinds import module_of
from vila_ops.data.sources import GROUP, SOURCES, ImageUrls


def raw_files(kind: str, path: Path) -> list[Path]:
    """The files of a folder, by name; a file is itself. Raises ValueError if there are none."""
    pattern = f"*{_module(kind).URL_FILES}"
    files = [path] if path.is_file() else sorted(path.glob(pattern))
    if not files:
        raise ValueError(f"{path}: no such file, and no folder with {pattern}, the files of the format {kind}")
    return files


def urls_of(kind: str, path: Path) -> list[str]:
    """The distinct URLs of one raw file in the order of first appearance. Raises ValueError for another format."""
    return list(dict.fromkeys(url for stated in _module(kind).image_urls(path) if (url := _text(stated))))


def _module(kind: str) -> ImageUrls:
    module = module_of(GROUP, SOURCES, kind)
    if not hasattr(module, "image_urls"):
        raise ValueError(f"sources of kind {kind!r} have no image URLs to download; mmc4 and coyo have")
    return cast(ImageUrls, module)


def _text(url: object) -> str:
    """A URL that UTF-8 can hold: a lone surrogate, which JSON can contain, becomes `?`. Empty if it is not text."""
    return url.encode(errors="replace").decode() if isinstance(url, str) else ""
