"""Interleaved documents with the URLs of their images, as OBELICS and OmniCorpus are published.

{"general_metadata": {"url": "http://ex.test/p", "fluency_prob": 0.9},
 "texts": ["Intro.", null, "A red ball."], "images": [null, "http://ex.test/b.jpg", null],
 "metadata": [null, {"unsafe_prob": 0.01, "width": 640}, null]}

At each place of `texts` and `images` one is null. Parquet and jsonl (plain, gzipped or zipped) are read; in OBELICS the
two columns of metadata are JSON in text. Numbers in general_metadata are scores of the document, those in metadata
scores of its images. The images come from the downloader. Rules on scores and words are applied before an image is
looked for, so that only what they leave need be downloaded.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from vila_ops.config.sources import Interleaved
from vila_ops.data.filtering.record_rules import filter_record
from vila_ops.data.raw.downloaded import Downloaded, Missing, scan_downloaded
from vila_ops.data.raw.files import STRIDE, Folders, RawFile, Scan, Span
from vila_ops.data.raw.lines import every_line, lines
from vila_ops.data.raw.objects import raw_path
from vila_ops.data.raw.text import DECODER
from vila_ops.data.raw.url_files import out_of
from vila_ops.data.records import MISSING_IMAGE, Dropped, Image, Part, Record, Turn
from vila_ops.data.sources.faults import Fault, checked, finite_numbers, json_of
from vila_ops.data.sources.json_files import stated
from vila_ops.data.sources.rows import open_parquet, rows
from vila_ops.errors import VilaError

URL_FILES = (".parquet", ".jsonl", ".jsonl.zip", ".jsonl.gz")
LISTS, METADATA = ("texts", "images"), ("metadata", "general_metadata")
PARAGRAPHS = "\n\n"
"""Between two texts without an image between them."""


def image_urls(source: Interleaved, path: Path) -> Iterator[object]:
    """The URL of each image that the rules of `clean` on scores and words leave; faulty documents are skipped."""
    whole = Span(name=path.name, path=str(path), digest="", start=0, stop=_scan(source, path, ()).count, mark=0)
    for place, value in _values(whole):
        try:
            kept = None if value is None else _document(source, value, place=place)
        except Fault:  # reported when the document is read
            continue
        if isinstance(kept, Record):
            yield from (image.data.decode() for image in _images(kept))


def raw_files(source: Interleaved, folders: Folders, *, cache: Path) -> list[RawFile]:
    """The files, each with its tar and manifest. Raises ValueError for a file of another format."""
    kind = f"{source.kind}:{source.images}:{source.max_images}"
    scan = partial(_scan, source)
    return scan_downloaded(raw_path(source.path), URL_FILES, kind, scan, images=source.images, cache=cache)


def read(source: Interleaved, folders: Folders, span: Span) -> Iterator[list[Record | Dropped]]:
    """The document of each row or line, none for a blank line."""
    documents: list[list[Record | Dropped]] = []
    for number, (place, value) in enumerate(_values(span), start=span.start):
        try:
            taken = value is not None and span.takes(number)
            documents.append([_document(source, value, place=place)] if taken else [])
        except Fault as fault:
            documents.append([fault.dropped(place, where=place)])
    urls = {image.data.decode() for one in documents for record in one for image in _images(record)}
    with Downloaded(out_of(source.images, span.name), urls) as downloaded:
        for one in documents:
            yield [_shown(source, record, downloaded) if isinstance(record, Record) else record for record in one]


def _values(span: Span) -> Iterator[tuple[str, dict[str, Any] | Fault | None]]:
    """("FILE:NUMBER", value) of the documents of a span; None for a blank line."""
    path = span.file()
    if _is_parquet(path):
        with open_parquet(path) as file:
            columns = [name for name in (*LISTS, *METADATA) if name in file.schema_arrow.names]
        yield from rows(span, columns)
        return
    for place, line in lines(span):
        try:
            yield place, json_of(line, what="the line") if line.strip() else None
        except Fault as fault:
            yield place, fault


def _document(source: Interleaved, value: dict[str, Any] | Fault | None, *, place: str) -> Record | Dropped:
    """The document as the rules on scores and words leave it. The data of its images are their URLs."""
    if value is None or isinstance(value, Fault):
        raise value or Fault("bad_document", "it is blank")
    general = _json(value.get("general_metadata"), "general_metadata")
    fields = general if isinstance(general, dict) else {}
    url = stated(fields, "url")
    record = Record(
        id=place,
        object=(url or place).lower(),
        turns=(_turn(_parts(value)),),
        category="",
        licence=source.licence,
        provenance=f"{place} {url}".rstrip(),
        scores=finite_numbers(fields),
    )
    kept = filter_record(record, source.clean).record
    if isinstance(kept, Dropped):
        return replace(kept, is_bad=False)
    return replace(kept, turns=(_turn(_first_images(kept, source.max_images)),))


def _parts(value: dict[str, Any]) -> list[Part]:
    """Texts and images in their order. Raises Fault (bad_document)."""
    texts, images = (value.get(name) for name in LISTS)
    if not isinstance(texts, list) or not isinstance(images, list) or len(texts) != len(images):
        raise Fault("bad_document", "`texts` and `images` are two lists of one length, each with nulls for the other")
    metadata = _json(value.get("metadata"), "metadata")
    facts = metadata if isinstance(metadata, list) and len(metadata) == len(images) else [None] * len(images)
    parts: list[Part] = []
    for number, place in enumerate(zip(texts, images, facts, strict=True)):
        match place:
            case (None, None, _):
                continue
            case (str(text), None, _):
                if text.strip():
                    parts.append(checked(text.strip(), what=f"texts[{number}]"))
            case (None, str(url), of_image):
                scores = finite_numbers(of_image) if isinstance(of_image, dict) else {}
                parts.append(Image(checked(url, what=f"images[{number}]").encode(), scores))
            case (text, image, _):
                told = f"texts[{number}] is {repr(text)[:40]} and images[{number}] {repr(image)[:40]}"
                raise Fault("bad_document", f"{told}; one is null, and the other text or a URL")
    return parts


def _json(value: object, what: str) -> object:
    """A value, decoded if it is JSON in text, as in OBELICS."""
    if not isinstance(value, str):
        return value
    try:
        return DECODER.decode(value)
    except (ValueError, RecursionError) as error:
        raise Fault("bad_json", f"{what}: {error}") from error


def _images(record: Record | Dropped) -> list[Image]:
    turns = record.turns if isinstance(record, Record) else ()
    return [part for turn in turns for part in turn.parts if isinstance(part, Image)]


def _first_images(record: Record, count: int | None) -> list[Part]:
    """The parts without the images after the first `count`."""
    left = len(_images(record)) if count is None else count
    parts: list[Part] = []
    for part in record.turns[0].parts:
        left -= isinstance(part, Image)
        if isinstance(part, str) or left >= 0:
            parts.append(part)
    return parts


def _shown(source: Interleaved, record: Record, downloaded: Downloaded) -> Record | Dropped:
    """The document with its images in place of their URLs."""
    parts: list[Part] = []
    missing: Fault | None = None
    for part in record.turns[0].parts:
        if isinstance(part, str):
            parts.append(part)
            continue
        url = part.data.decode()
        data = downloaded.image(url)
        if not isinstance(data, Missing):
            parts.append(replace(part, data=data))
        else:
            missing = missing or data.fault(url)
    whole = replace(record, turns=(_turn(parts),), notes=(MISSING_IMAGE,) if missing else ())
    place = record.id
    if missing and (source.missing_images == "drop_document" or not _images(whole)):
        return replace(missing.dropped(place, where=place), scores=record.scores)
    if not _images(whole):
        return Fault("no_image", "the document has no image").dropped(place, where=place)
    if len(_images(whole)) == len(parts):
        return Fault("no_text", "the document has no text").dropped(place, where=place)
    return whole


def _turn(parts: list[Part]) -> Turn:
    """A document of these parts, with neighbouring texts as paragraphs of one."""
    joined: list[Part] = []
    for part in parts:
        if isinstance(part, str) and joined and isinstance(joined[-1], str):
            joined[-1] += f"{PARAGRAPHS}{part}" if part.strip() else ""
        else:
            joined.append(part)
    return Turn("document", tuple(joined))


def _is_parquet(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"PAR1"


def _scan(source: Interleaved, path: Path, beside: tuple[str, ...]) -> Scan:
    if _is_parquet(path):
        return _scan_parquet(path, beside)
    marks: list[int] = []
    images = count = 0
    for count, (offset, line) in enumerate(every_line(path), start=1):
        if (count - 1) % STRIDE == 0:
            marks.append(offset)
        try:
            own = json_of(line, what="the line").get("images")
        except Fault:  # reported when the document is read
            continue
        images += sum(isinstance(one, str) for one in own) if isinstance(own, list) else 0
    return Scan(count=count, images=images, marks=tuple(marks), beside=beside)


def _scan_parquet(path: Path, beside: tuple[str, ...]) -> Scan:
    with open_parquet(path) as file:
        names, count = file.schema_arrow.names, file.metadata.num_rows
        if missing := [name for name in LISTS if name not in names]:
            raise ValueError(f"{path} has no column {missing[0]!r} but {', '.join(names)}: no interleaved documents")
        kind = file.schema_arrow.field("images").type
        if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
            raise ValueError(f"{path}: column 'images' is {kind}, not a list of URLs and nulls")
        try:
            lists = [pc.list_flatten(batch.column(0)) for batch in file.iter_batches(columns=["images"])]
        except VilaError:  # of the store, not of the file
            raise
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{path} cannot be read to its end ({error}); fetch it again") from error
    return Scan(count=count, images=sum(len(one) - one.null_count for one in lists), beside=beside)
