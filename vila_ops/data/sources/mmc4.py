"""Multimodal C4: jsonl of documents, each a list of sentences and images matched to them.

{"url": "http://ex.test/p", "text_list": ["Intro.", "A red ball.", "The end."],
 "image_info": [{"image_name": "ab12.jpg", "raw_url": "http://ex.test/b.jpg", "matched_text_index": 1,
                 "matched_sim": 0.31, "face_detections": null}],
 "similarity_matrix": [[0.18, 0.31, 0.12]], "could_have_url_duplicate": 0}

The matrix has a row for each image and a column for each sentence. Shards may be zipped, as they are published, or
gzipped. The images come from the downloader.
"""

import logging
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import assert_never

from pydantic import BaseModel, Field, FiniteFloat, NonNegativeInt, ValidationError, model_validator

from vila_ops.config.sources import Mmc4
from vila_ops.data.raw.downloaded import Downloaded, Missing, scan_downloaded
from vila_ops.data.raw.files import STRIDE, Folders, RawFile, Scan, Span
from vila_ops.data.raw.lines import every_line, lines
from vila_ops.data.raw.objects import raw_path
from vila_ops.data.raw.url_files import out_of
from vila_ops.data.records import MISSING_IMAGE, Dropped, Image, Part, Record, Turn
from vila_ops.data.sources.faults import Fault, checked, json_of
from vila_ops.data.text.interleave import Match, image_first, pairs, place

URL_FILES = (".jsonl", ".jsonl.zip", ".jsonl.gz")
log = logging.getLogger(__name__)


class ImageInfo(BaseModel, frozen=True, strict=True):
    """One element of image_info."""

    raw_url: str = Field(min_length=1)
    matched_text_index: NonNegativeInt
    matched_sim: FiniteFloat


class Document(BaseModel, frozen=True, strict=True):
    """One line; other keys (faces, shard numbers) are ignored."""

    url: str = ""
    text_list: list[str] = Field(min_length=1)
    image_info: list[ImageInfo]
    similarity_matrix: list[list[FiniteFloat]]

    @model_validator(mode="after")
    def _fits_together(self) -> "Document":
        images, sentences = len(self.image_info), len(self.text_list)
        widths = {len(row) for row in self.similarity_matrix}
        if len(self.similarity_matrix) != images or widths - {sentences}:
            raise ValueError(f"similarity_matrix is not {images} rows (image_info) of {sentences} numbers (text_list)")
        beyond = [image.matched_text_index for image in self.image_info if image.matched_text_index >= sentences]
        if beyond:
            raise ValueError(f"matched_text_index {beyond[0]}, but text_list has {sentences} sentences, counted from 0")
        return self


def image_urls(source: Mmc4, path: Path) -> Iterator[object]:
    """The URL of each image that is similar enough. A damaged line, which `prepare` drops, is logged and skipped."""
    damaged = good = 0
    least = source.min_similarity
    for number, (_, line) in enumerate(every_line(path), 1):
        try:
            images = json_of(line, what="the line")["image_info"]
            urls = [image["raw_url"] for image in images if least is None or image["matched_sim"] >= least]
        except (Fault, KeyError, TypeError) as error:
            damaged += 1
            log.warning("%s:%d is not an MMC4 document with image_info[].raw_url (%r)", path, number, error)
            continue
        good += 1
        yield from urls
    if damaged and not good:
        raise ValueError(f"{path}: none of {damaged} lines is an MMC4 document with image_info[].raw_url")


def raw_files(source: Mmc4, folders: Folders, *, cache: Path) -> list[RawFile]:
    """The shards, each with its tar and manifest. Raises ValueError for a shard whose images were not downloaded."""
    kind = f"{source.kind}:{source.images}:{source.max_images}:{source.min_similarity}"
    scan = partial(_scan, source)
    return scan_downloaded(raw_path(source.path), URL_FILES, kind, scan, images=source.images, cache=cache)


def read(source: Mmc4, folders: Folders, span: Span) -> Iterator[list[Record | Dropped]]:
    """The document of each line, or its pairs; none for a blank line."""
    parsed = [
        (where, _parsed(line) if line.strip() and span.takes(number) else None)
        for number, (where, line) in enumerate(lines(span), start=span.start)
    ]
    urls = {image.raw_url for _, line in parsed if isinstance(line, Document) for image in line.image_info}
    with Downloaded(out_of(source.images, span.name), urls) as images:
        for where, line in parsed:
            try:
                yield _records(source, line, images, where=where) if line else []
            except Fault as fault:
                yield [fault.dropped(where, where=where)]


def _parsed(line: bytes) -> Document | Fault:
    try:
        document = Document.model_validate(json_of(line, what="the line"))
        for text in (document.url, *document.text_list, *(image.raw_url for image in document.image_info)):
            checked(text, what="the document")
    except Fault as fault:
        return fault
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))
        reason = "lone_surrogate" if first["type"] == "string_unicode" else "bad_document"
        return Fault(reason, f"{where}: {first['msg']}".removeprefix(": "))
    return document


def _records(source: Mmc4, line: Document | Fault, images: Downloaded, *, where: str) -> list[Record | Dropped]:
    if isinstance(line, Fault):
        raise line
    matches, notes = _matches(source, line, images)
    match source.order:
        case "interleaved":
            parts = place(line.text_list, matches, max_images=source.max_images)
            return [_record(source, line, parts, where=where, notes=notes)]
        case "image_first":
            parts = image_first(line.text_list, matches, max_images=source.max_images)
            return [_record(source, line, parts, where=where, notes=notes)]
        case "pairs":
            samples = pairs(line.text_list, matches, max_images=source.max_images)
            if not samples:
                raise Fault("no_text", "the sentences of all images are blank")
            return [_record(source, line, pair, where=where, number=n) for n, pair in enumerate(samples)]
        case _:
            assert_never(source.order)


def _record(
    source: Mmc4,
    line: Document,
    parts: Sequence[Part],
    *,
    where: str,
    number: int | None = None,
    notes: tuple[str, ...] = (),
) -> Record:
    if not any(isinstance(part, Image) for part in parts):
        raise Fault("no_image", "there is no image that may be used")
    if not any(isinstance(part, str) and part.strip() for part in parts):
        raise Fault("no_text", "no sentence has a word")
    return Record(
        id=where if number is None else f"{where}#{number}",
        object=(line.url or where).lower(),
        turns=(Turn("document", tuple(parts)),),
        category="",
        licence=source.licence,
        provenance=f"{where} {line.url}".rstrip(),
        notes=notes,
    )


def _chosen(source: Mmc4, line: Document) -> list[ImageInfo]:
    """The images that are similar enough to their sentence."""
    least = source.min_similarity
    return [image for image in line.image_info if least is None or image.matched_sim >= least]


def _matches(source: Mmc4, line: Document, images: Downloaded) -> tuple[list[Match], tuple[str, ...]]:
    """The downloaded images, and the record's notes.

    If documents are dropped for a missing image, those after max_images count too.
    """
    matches: list[Match] = []
    notes: tuple[str, ...] = ()
    for image in _chosen(source, line):
        if source.missing_images == "drop_image" and len(matches) == source.max_images:
            break
        data = images.image(image.raw_url)
        if not isinstance(data, Missing):
            if len(matches) < source.max_images:
                matches.append((image.matched_text_index, Image(data, {"similarity": image.matched_sim})))
        elif source.missing_images == "drop_document":
            raise data.fault(image.raw_url)
        else:
            notes = (MISSING_IMAGE,)
    return matches, notes


def _scan(source: Mmc4, path: Path, beside: tuple[str, ...]) -> Scan:
    """Scan every line; a faulty line has no images."""
    marks: list[int] = []
    images = counted = 0
    for counted, (offset, text) in enumerate(every_line(path), start=1):
        if (counted - 1) % STRIDE == 0:
            marks.append(offset)
        document = _parsed(text)
        if isinstance(document, Document):
            images += min(source.max_images, len(_chosen(source, document)))
    return Scan(count=counted, images=images, marks=tuple(marks), beside=beside)
