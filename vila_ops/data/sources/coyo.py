"""COYO-700M: Parquet rows of an image's URL, its alt text and scores; the images come from the downloader.

Its schema: id, url, text, width, height, image_phash, text_length, word_count, num_tokens_bert, num_tokens_gpt,
num_faces, clip_similarity_vitb32, clip_similarity_vitl14, nsfw_score_opennsfw2, nsfw_score_gantman, watermark_score,
aesthetic_score_laion_v2. All numeric columns except the id become scores, which filtering can read.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from vila_ops.config.sources import Coyo
from vila_ops.data.raw.downloaded import Downloaded, Missing, companions, out_of
from vila_ops.data.raw.files import Folders, RawFile, Scan, Span, scan_files
from vila_ops.data.records import NOT_DOWNLOADED, Dropped, Image, Record, Turn
from vila_ops.data.sources.faults import Fault, checked, finite_numbers
from vila_ops.data.sources.rows import is_text, number_columns, open_parquet, rows

URL_FILES = ".parquet"


def image_urls(path: Path) -> Iterator[object]:
    """The column url."""
    file = pq.ParquetFile(path)
    if "url" not in file.schema_arrow.names:
        raise ValueError(f"{path} has no column 'url' but {', '.join(file.schema_arrow.names)}: not a COYO file")
    for batch in file.iter_batches(columns=["url"]):
        yield from batch.column(0).to_pylist()


def raw_files(source: Coyo, folders: Folders, *, cache: Path) -> list[RawFile]:
    """The Parquet files, each with its tar and manifest. Raises ValueError for a file of another format."""
    beside = companions(Path(source.path), URL_FILES, images=source.images)
    by_path = {path: files for (_, path), files in beside.items()}
    return scan_files(beside, f"{source.kind}:{source.images}", lambda path: _scan(path, by_path[path]), cache=cache)


def read(source: Coyo, folders: Folders, span: Span) -> Iterator[list[Record | Dropped]]:
    """The captioned image of each row."""
    urls = {row["url"] for _, row in rows(span, ["url"]) if isinstance(row, dict) and isinstance(row["url"], str)}
    with open_parquet(Path(span.path)) as file:
        columns = ["url", "text", *(name for name in number_columns(file.schema_arrow) if name != "id")]
    with Downloaded(out_of(source.images, span.name), urls) as images:
        for number, (place, row) in enumerate(rows(span, columns), start=span.start):
            if not span.takes(number):
                yield []
                continue
            try:
                yield [_record(source, row, images, place=place)]
            except Fault as fault:
                yield [fault.dropped(place, where=place)]


def _record(source: Coyo, row: dict[str, Any] | Fault, images: Downloaded, *, place: str) -> Record:
    if isinstance(row, Fault):
        raise row
    url, text = row["url"], row["text"]
    if not url:
        raise Fault("no_url", "the url is empty")
    if not text or not text.strip():
        raise Fault("no_text", "the alt text is empty")
    checked(text, what="the alt text")
    data = images.image(checked(url, what="the url"))
    if isinstance(data, Missing):
        raise Fault(NOT_DOWNLOADED, f"{url}: {data.outcome} {data.detail}".strip())
    return Record(
        id=place,
        object=url.lower(),
        turns=(Turn("document", (Image(data), text.strip())),),
        category="",
        licence=source.licence,
        provenance=f"{place} {url}",
        scores=finite_numbers({name: value for name, value in row.items() if name not in ("url", "text")}),
    )


def _scan(path: Path, beside: tuple[str, ...]) -> Scan:
    with open_parquet(path) as file:
        schema, count = file.schema_arrow, file.metadata.num_rows
    for name in ("url", "text"):
        if name not in schema.names or not is_text(schema.field(name).type):
            raise ValueError(f"{path} has no column {name!r} of text, but {', '.join(schema.names)}: not a COYO file")
    return Scan(count=count, images=count, beside=beside)
