"""COYO-700M: Parquet rows of an image's URL, its alt text and scores; the images come from the downloader.

Its schema: id, url, text, width, height, image_phash, text_length, word_count, num_tokens_bert, num_tokens_gpt,
num_faces, clip_similarity_vitb32, clip_similarity_vitl14, nsfw_score_opennsfw2, nsfw_score_gantman, watermark_score,
aesthetic_score_laion_v2. All numeric columns except the id become scores, which filtering can read. Rules on scores and
words are applied before an image is looked for, so that only what they leave need be downloaded.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from vila_ops.config.sources import Coyo
from vila_ops.data.filtering.record_rules import filter_record, score_sum
from vila_ops.data.filtering.top_share import top_share
from vila_ops.data.raw.downloaded import Downloaded, Missing, scan_downloaded
from vila_ops.data.raw.files import Folders, RawFile, Scan, Span
from vila_ops.data.raw.objects import raw_path
from vila_ops.data.raw.url_files import out_of
from vila_ops.data.records import Dropped, Image, Record, Turn
from vila_ops.data.sources.faults import Fault, checked, finite_numbers
from vila_ops.data.sources.rows import is_text, number_columns, open_parquet, rows

URL_FILES = (".parquet",)


def image_urls(source: Coyo, path: Path) -> Iterator[object]:
    """The URL of each row that the rules of `clean` on scores and words leave, the best share of the file included."""
    dropped: set[int] = set()
    urls: list[str] = []
    ranks: list[float | None] = []
    is_clean: list[bool] = []
    rule = source.clean.top_share
    whole = Span(name=path.name, path=str(path), digest="", start=0, stop=_count(path), mark=0)
    for place, row in rows(whole, _columns(path)):
        try:
            url, record = _without_image(source, row, place=place)
        except Fault:  # reported when the row is read
            continue
        urls.append(url)
        ranks.append(score_sum(record.scores, rule.columns) if rule else None)
        is_clean.append(isinstance(filter_record(record, source.clean).record, Record))
    if rule:
        columns = {"record": range(len(urls)), "file": [0] * len(urls), "rank": pa.array(ranks, pa.float64())}
        best = top_share(pa.table({**columns, "is_clean": pa.array(is_clean, pa.bool_())}), {0: rule})
        dropped = set(best["record"].to_pylist())
    yield from (url for number, url in enumerate(urls) if is_clean[number] and number not in dropped)


def raw_files(source: Coyo, folders: Folders, *, cache: Path) -> list[RawFile]:
    """The Parquet files, each with its tar and manifest. Raises ValueError for a file of another format."""
    kind = f"{source.kind}:{source.images}"
    return scan_downloaded(raw_path(source.path), URL_FILES, kind, _scan, images=source.images, cache=cache)


def read(source: Coyo, folders: Folders, span: Span) -> Iterator[list[Record | Dropped]]:
    """The captioned image of each row."""
    urls = {row["url"] for _, row in rows(span, ["url"]) if isinstance(row, dict) and isinstance(row["url"], str)}
    with Downloaded(out_of(source.images, span.name), urls) as images:
        for number, (place, row) in enumerate(rows(span, _columns(span.file())), start=span.start):
            if not span.takes(number):
                yield []
                continue
            try:
                yield [_record(source, row, images, place=place)]
            except Fault as fault:
                yield [fault.dropped(place, where=place)]


def _record(source: Coyo, row: dict[str, Any] | Fault, images: Downloaded, *, place: str) -> Record | Dropped:
    url, record = _without_image(source, row, place=place)
    if isinstance(dropped := filter_record(record, source.clean).record, Dropped):
        return replace(dropped, is_bad=False, scores=record.scores)
    data = images.image(url)
    if isinstance(data, Missing):
        return replace(data.fault(url).dropped(place, where=place), scores=record.scores)
    text = record.turns[0].parts
    return replace(record, turns=(Turn("document", (Image(data), *text)),))


def _without_image(source: Coyo, row: dict[str, Any] | Fault, *, place: str) -> tuple[str, Record]:
    """The URL of a row, and its record without the image. Raises Fault for a row without a URL or a text."""
    if isinstance(row, Fault):
        raise row
    url, text = row["url"], row["text"]
    if not url:
        raise Fault("no_url", "the url is empty")
    if not text or not text.strip():
        raise Fault("no_text", "the alt text is empty")
    checked(url, what="the url")
    return url, Record(
        id=place,
        object=url.lower(),
        turns=(Turn("document", (checked(text, what="the alt text").strip(),)),),
        category="",
        licence=source.licence,
        provenance=f"{place} {url}",
        scores=finite_numbers({name: value for name, value in row.items() if name not in ("url", "text")}),
    )


def _columns(path: Path) -> list[str]:
    """The columns to read: url, text and the numbers but the id."""
    with open_parquet(path) as file:
        return ["url", "text", *(name for name in number_columns(file.schema_arrow) if name != "id")]


def _count(path: Path) -> int:
    """The number of rows. Raises ValueError for a file without the columns of COYO."""
    with open_parquet(path) as file:
        schema, count = file.schema_arrow, file.metadata.num_rows
    for name in ("url", "text"):
        if name not in schema.names or not is_text(schema.field(name).type):
            raise ValueError(f"{path} has no column {name!r} of text, but {', '.join(schema.names)}: not a COYO file")
    return int(count)


def _scan(path: Path, beside: tuple[str, ...]) -> Scan:
    count = _count(path)
    return Scan(count=count, images=count, beside=beside)
