"""Which URLs the raw files of a format name."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, assert_never

import pyarrow.parquet as pq

Format = Literal["mmc4", "coyo"]
log = logging.getLogger(__name__)


def raw_files(source: Format, path: Path) -> list[Path]:
    """The files of a folder, by name; a file is itself. Raises ValueError when there are none."""
    pattern = "*.jsonl" if source == "mmc4" else "*.parquet"
    found = [path] if path.is_file() else sorted(path.glob(pattern))
    if not found:
        raise ValueError(f"{path}: no such file, or a folder without {pattern}, which {source} comes as")
    return found


def urls_of(source: Format, path: Path) -> list[str]:
    """The distinct URLs of one raw file in the order of first appearance. Raises ValueError for another form."""
    match source:
        case "mmc4":
            found = _mmc4(path)
        case "coyo":
            found = _coyo(path)
        case _:
            assert_never(source)
    return list(dict.fromkeys(url for url in found if url))


def _mmc4(path: Path) -> Iterator[str]:
    """image_info[].raw_url of each line; a damaged line, which `prepare` will drop, is said and passed over."""
    damaged = good = 0
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                urls = [image["raw_url"] for image in json.loads(line)["image_info"]]
            except (ValueError, KeyError, TypeError) as error:
                damaged += 1
                log.warning("%s:%d is not an MMC4 document with image_info[].raw_url (%r)", path, number, error)
                continue
            good += 1
            for url in urls:
                yield _text(url)
    if damaged and not good:
        raise ValueError(f"{path}: none of {damaged} lines is an MMC4 document with image_info[].raw_url")


def _coyo(path: Path) -> Iterator[str]:
    """The column url."""
    file = pq.ParquetFile(path)
    if "url" not in file.schema_arrow.names:
        raise ValueError(f"{path} has no column 'url' but {', '.join(file.schema_arrow.names)}: not a COYO file")
    for batch in file.iter_batches(columns=["url"]):
        for url in batch.column(0).to_pylist():
            yield _text(url)


def _text(url: object) -> str:
    """A URL that UTF-8 can hold; empty for what is no text. A lone surrogate, which JSON can say, becomes `?`."""
    return url.encode(errors="replace").decode() if isinstance(url, str) else ""
