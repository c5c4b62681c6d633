"""LLaVA-CC3M-Pretrain-595K: chat.json in LLaVA's layout, and metadata.json with the URLs of the images."""

from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from vila_ops.config.sources import LlavaCc3m
from vila_ops.data.raw.files import Folders, RawFile, RawMissing, Scan, Span, scan_files
from vila_ops.data.raw.json_array import elements, is_array
from vila_ops.data.raw.known import known
from vila_ops.data.raw.objects import raw_path
from vila_ops.data.records import Dropped, Record
from vila_ops.data.sources.json_files import Object, read_objects, scan_objects, stated
from vila_ops.data.sources.llava import image_paths, record_of

CHAT, METADATA = "chat.json", "metadata.json"


def raw_files(source: LlavaCc3m, folders: Folders, *, cache: Path) -> list[RawFile]:
    """chat.json, with metadata.json and the images that it depends on."""
    path = raw_path(source.path) / CHAT
    if not path.is_file() or not is_array(path):
        raise (ValueError if path.is_file() else RawMissing)(
            f"no {CHAT} with a JSON array in {source.path!r}; `path` is the folder of the downloaded files"
        )
    return scan_files([(CHAT, path)], f"llava_cc3m:{source.path}:{source.images}", lambda _: _scan(source), cache=cache)


def read(source: LlavaCc3m, folders: Folders, span: Span) -> Iterator[list[Record | Dropped]]:
    """The record of each object; its provenance ends with the image's URL, if metadata.json has it."""
    urls = _urls(raw_path(source.path) / METADATA, _stems(span))

    def make(value: Object, place: str) -> Record:
        return record_of(source, {**value, "url": urls.get(_stem(value))}, place)

    return read_objects(span, make)


def _scan(source: LlavaCc3m) -> Scan:
    scan = scan_objects(raw_path(source.path) / CHAT, lambda value: image_paths(value, source.images))
    metadata = raw_path(source.path) / METADATA
    if metadata.is_file():
        for _ in elements(metadata):  # raises here, not in the middle of a read, if the file is cut off
            pass
    # listed even if it is missing: the scan is cached, and must change when the file is added
    return Scan(scan.count, scan.images, scan.marks, beside=(str(metadata), *scan.beside))


def _stems(span: Span) -> set[str]:
    places = zip(range(span.start, span.stop), elements(span.file(), start=span.mark), strict=False)
    return {_stem(value) for number, (_, value) in places if span.takes(number)} - {""}


def _urls(metadata: Path, stems: set[str]) -> dict[str, str]:
    """URLs by image name, of these images. The file is as long as chat.json and is streamed."""
    urls: dict[str, str] = {}
    known().check(str(metadata))
    if not metadata.is_file():
        return urls
    for _, value in elements(metadata):
        stem = _stem(value)
        if stem in stems:
            urls[stem] = stated(value, "url", "URL")
            if len(urls) == len(stems):
                break
    return urls


def _stem(value: Any) -> str:
    """The image's name without its suffix, which is also the id: GCC_train_000000123."""
    name = (value.get("image") or value.get("id")) if isinstance(value, dict) else None
    return PurePosixPath(name).stem if isinstance(name, str) else ""
