"""Official files of a benchmark in the store: items and images as one artifact that any worker on any node reads.

items.jsonl         the items in their official order
images.json         place of each image: [file, offset, bytes], by the sha256 of the image
images-00000.bin    images end to end
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import IO, Any, cast

from vila_ops.artifacts import attempts, store
from vila_ops.artifacts.execution import execution
from vila_ops.artifacts.kinds import BenchmarkFiles
from vila_ops.config import Resources
from vila_ops.config.benchmarks import OfficialBenchmark
from vila_ops.data.raw.files import Scan, scan_files
from vila_ops.data.records import Image
from vila_ops.eval.benchmark import Item, Part, SealedImage, Unreadable, benchmark_of

ITEMS, IMAGES = "items.jsonl", "images.json"
IMAGES_AT_ONCE = 2**28
"""Bytes of a file of images, so that a worker fetches few that its items do not need."""


def folder_of(kind: str, resources: Resources) -> Path:
    """Where the official files of a benchmark are looked for."""
    return Path(resources.storage.benchmarks) / kind


def seal_files(config: OfficialBenchmark, resources: Resources, *, train: bool = False) -> BenchmarkFiles:
    """The official files of a benchmark as a sealed artifact; reads them only if they have changed.

    `train`: its train file, for demonstrations. Raises ValueError, which names the file and the way out, for files that
    are missing or of another version, and for a benchmark without a train file.
    """
    at, root = address_of(config, resources, train=train), resources.storage.store
    if done := store.find(BenchmarkFiles, at, store=root):
        return done
    kind: str = config.kind  # type: ignore[attr-defined]
    read = _train_items(kind) if train else benchmark_of(kind).read
    with attempts.attempt(at, store=root) as attempt:
        facts = write_items(attempt, read(folder_of(kind, resources), config))
    facts |= {"benchmark": kind}
    return store.seal(
        BenchmarkFiles, at, attempt, facts=facts, execution=execution(launch=resources.launch, seconds=0, ran=[])
    )


def address_of(config: OfficialBenchmark, resources: Resources, *, train: bool = False) -> store.Address:
    """Where the sealed files are. Raises ValueError where there is no folder of them."""
    kind: str = config.kind  # type: ignore[attr-defined]
    folder = folder_of(kind, resources)
    if not folder.is_dir():
        raise ValueError(
            f"benchmark {kind!r} reads its official files from {folder}, which does not exist; put them there, or set "
            f"resources.storage.benchmarks (`vila-ops benchmark list` says where they come from)"
        )
    recipe = _recipe(config, folder, resources) | ({"part": "train"} if train else {})
    return store.address(BenchmarkFiles, revision=benchmark_of(kind).REVISION, recipe=recipe, parents=())


def _train_items(kind: str) -> Callable[[Path, Any], Iterable[Item]]:
    if read := getattr(benchmark_of(kind), "train_items", None):
        return cast("Callable[[Path, Any], Iterable[Item]]", read)
    raise ValueError(
        f"benchmark {kind!r} has no train file to take demonstrations from; set few_shot.pool to kind mixture, in a "
        f"suite with a mixture"
    )


def _recipe(config: OfficialBenchmark, folder: Path, resources: Resources) -> dict[str, Any]:
    """What the items are made of: the files, and the settings other than prompt and policy."""
    names = sorted(
        (Path(place) / name).relative_to(folder).as_posix()
        for place, _, files in os.walk(folder, followlinks=True)
        for name in files
        if not name.startswith(".")
    )
    found = scan_files(
        [(name, folder / name) for name in names],
        "benchmark",
        lambda _: Scan(count=0, images=0),
        cache=resources.storage.cache_folder(),
    )
    settings = config.model_dump(mode="json", exclude=set(OfficialBenchmark.model_fields))
    return {"settings": settings, "files": [[file.name, file.digest] for file in found]}


def write_items(folder: Path, items: Iterable[Item]) -> dict[str, Any]:
    """Write items and their images into an attempt's folder; returns the facts of the artifact. Raises ValueError."""
    places: dict[str, tuple[str, int, int]] = {}
    seen: set[str] = set()
    problems = 0
    with (folder / ITEMS).open("w") as lines, _Pack(folder) as pack:
        for item in items:
            if item.id in seen:
                raise ValueError(f"item {item.id!r} is there twice; the files mix several versions or splits")
            seen.add(item.id)
            problems += item.problem() is not None
            parts = {name: [_sealed(part, pack, places) for part in parts] for name, parts in item.parts.items()}
            record = {
                "id": item.id,
                "group": item.group,
                "parts": parts,
                "options": item.options,
                "references": item.references,
                "answer": item.answer,
                "slices": item.slices,
            }
            lines.write(json.dumps(record, ensure_ascii=False) + "\n")
    if not seen:
        raise ValueError("the files have no item")
    (folder / IMAGES).write_text(json.dumps(places, indent=0, sort_keys=True))
    return {"num_items": len(seen), "num_unreadable": problems}


class _Pack:
    """Files of images, the next one begun where one is full."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._number, self._offset = folder, -1, IMAGES_AT_ONCE
        self._file: IO[bytes] | None = None

    def __enter__(self) -> "_Pack":
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def add(self, data: bytes) -> tuple[str, int, int]:
        """Append an image; returns its place."""
        if self._file is None or self._offset >= IMAGES_AT_ONCE:
            self.__exit__()
            self._number, self._offset = self._number + 1, 0
            self._file = (self._folder / f"images-{self._number:05d}.bin").open("wb")
        place = (f"images-{self._number:05d}.bin", self._offset, len(data))
        self._file.write(data)
        self._offset += len(data)
        return place


def _sealed(part: Part, pack: _Pack, places: dict[str, tuple[str, int, int]]) -> Any:
    match part:
        case str():
            return part
        case Unreadable(reason):
            return {"unreadable": reason}
        case SealedImage(key):
            return {"image": key}
        case Image(data):
            key = hashlib.sha256(data).hexdigest()
            if key not in places:
                places[key] = pack.add(data)
            return {"image": key}


def items_of(files: BenchmarkFiles, *, first: int | None = None) -> tuple[Item, ...]:
    """The items of a sealed benchmark, or only so many of the first. Raises CorruptArtifact."""
    with store.file(files, ITEMS).open() as lines:
        return tuple(_item(json.loads(line)) for number, line in enumerate(lines) if first is None or number < first)


def _item(record: Mapping[str, Any]) -> Item:
    parts = {name: tuple(_read(part) for part in parts) for name, parts in record["parts"].items()}
    return Item(
        id=record["id"],
        group=record["group"],
        parts=parts,
        options=tuple(record["options"]),
        references=record["references"],
        answer=record["answer"],
        slices=tuple(record["slices"]),
    )


def _read(part: Any) -> Part:
    if isinstance(part, str):
        return part
    return SealedImage(part["image"]) if "image" in part else Unreadable(part["unreadable"])


class SealedImages:
    """Images of a sealed benchmark and its train file, read when they are asked for."""

    def __init__(self, *sealed: BenchmarkFiles) -> None:
        self._places: dict[str, tuple[BenchmarkFiles, str, int, int]] = {
            key: (files, *place)
            for files in sealed
            for key, place in json.loads(store.file(files, IMAGES).read_text()).items()
        }

    def __call__(self, image: SealedImage) -> bytes:
        """The file of an image. Raises CorruptArtifact."""
        files, name, offset, size = self._places[image.key]
        with store.file(files, name).open("rb") as file:
            file.seek(offset)
            return file.read(size)
