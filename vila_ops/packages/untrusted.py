"""Check third-party model folders before use: files, settings and headers. Nothing is run, no tensor allocated."""

import json
import math
import os
import re
import stat
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

from vila_ops.errors import CorruptArtifact

READ = frozenset({".json", ".safetensors", ".txt", ".model", ".jinja"})
"""Endings of the files of a model folder that are read."""
INERT = frozenset({"", ".md", ".png", ".jpg", ".jpeg", ".gif", ".svg", ".pdf", ".csv", ".yaml", ".yml", ".log"})
"""Endings of other files that a model folder may hold; they are never opened."""
MAX_FILES = 10_000
MAX_DEPTH = 64
"""Levels of nesting in a JSON file."""
CONFIG_BYTES = 4 * 2**20
"""Largest JSON file of settings."""
TOKENIZER_BYTES = 256 * 2**20
"""Largest tokenizer.json or index: vocabularies of 256 000 entries take about 35 MB."""
HEADER_BYTES = 16 * 2**20
"""Largest safetensors header (100 bytes a tensor); the format allows 100 MB."""
SETTINGS = ("config.json", "special_tokens_map.json", "chat_template.json")
"""Endings of the JSON files from which transformers takes settings."""
INDEX = "model.safetensors.index.json"
WEIGHTS = "model.safetensors"
BYTES_OF = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
OTHER_BYTES_OF = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "I16": 2, "U16": 2, "I32": 4, "U32": 4, "I64": 8, "U64": 8,
}  # fmt: skip
"""Bytes of a number in the dtypes of weights, and in the format's other dtypes: those of buffers, and of quantised
weights, which are not supported."""
CODE_KEYS = ("auto_map", "custom_pipelines", "trust_remote_code")
CLASS_KEYS = (
    "architectures", "processor_class", "tokenizer_class", "image_processor_type", "feature_extractor_type",
    "video_processor_type",
)  # fmt: skip
OWN_CLASSES = frozenset({"VilaForConditionalGeneration", "VilaProcessor"})
OLD_CLASSES = re.compile(r"[A-Z]\w*FeatureExtractor")
"""Class names of image processors until transformers 4.26."""
COUNT_LIMITS = {"layers": 1024, "experts": 4096, "heads": 4096, "layer": 1024}
"""Largest value of a config's field, by the last word of its name; each layer costs time even without memory."""
LAYERS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers")
SIZE_LIMIT = 2**24
"""Largest value of any other count: the longest context of a public model is 10 million."""
COUNTS = re.compile(r"(num|n)_\w+|\w+_(size|dim|layers|heads|channels|length|experts|groups)|max_position_embeddings")


@dataclass(frozen=True)
class Stored:
    """A tensor as a safetensors header states it."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


def check_folder(folder: Path) -> None:
    """Raise CorruptArtifact, with the way out, for files other than data and for settings that ask for code."""
    if not folder.is_dir():
        raise CorruptArtifact(f"{folder} is not a folder; give the folder that holds config.json")
    for count, path in enumerate(_walk(folder)):
        if count == MAX_FILES:
            raise CorruptArtifact(f"{folder} holds more than {MAX_FILES} files; a model folder has a few dozen")
        _check_file(path, folder)
    for path in sorted(folder.glob("*.json")):
        if path.name.endswith(SETTINGS):
            settings = read_json(path)
            _check_settings(settings, path)
            check_counts(settings, path)


def read_json(path: Path, *, at_most: int = CONFIG_BYTES) -> dict[str, Any]:
    """A JSON object of at most `at_most` bytes. Raises CorruptArtifact for NaN, a repeated key or too deep nesting."""
    if not path.is_file():
        raise CorruptArtifact(f"{path} is missing; a model folder needs it")
    if (size := path.stat().st_size) > at_most:
        raise CorruptArtifact(f"{path} has {size} bytes; at most {at_most} bytes of such a file are read")
    return _strict(path.read_bytes(), str(path))


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """Every tensor of a folder by name, from the headers of its safetensors files. Raises CorruptArtifact."""
    stray = {path.name for path in folder.glob("*.safetensors") if not path.name.startswith("consolidated")}
    if (folder / INDEX).is_file():
        return _by_index(folder, stray)
    if extra := sorted(stray - {WEIGHTS}):
        raise CorruptArtifact(
            f"{folder} holds {extra[:3]}, which no {INDEX} names; add the index, or keep {WEIGHTS} alone"
        )
    if WEIGHTS not in stray:
        raise CorruptArtifact(f"{folder} holds no {WEIGHTS} and no {INDEX}; only weights in safetensors are read")
    return read_header(folder / WEIGHTS)


def read_header(path: Path) -> dict[str, Stored]:
    """The tensors in a safetensors header, which must cover every byte of the file. Raises CorruptArtifact.

    Layout: 8 bytes little-endian length, a JSON object of that length, the data
    (huggingface.co/docs/safetensors, "Format").
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        if len(start) < 8:
            raise CorruptArtifact(f"{path} has {size} bytes, too few for a safetensors file")
        (length,) = struct.unpack("<Q", start)
        if length > min(HEADER_BYTES, size - 8):
            raise CorruptArtifact(
                f"{path} states a header of {length} bytes; the file has {size}, and at most {HEADER_BYTES} are read"
            )
        header = _strict(file.read(length), f"the header of {path}")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CorruptArtifact(f"{path}: __metadata__ must map texts to texts")
    _check_extents([_extent(name, entry, path) for name, entry in header.items()], size - 8 - length, path)
    return {name: Stored(path, entry["dtype"], tuple(entry["shape"])) for name, entry in header.items()}


def check_counts(settings: Any, path: Path) -> None:
    """Raise CorruptArtifact for a number of settings, at any depth, that counts something and is no sensible count."""
    if isinstance(settings, list):
        for item in settings:
            check_counts(item, path)
    for key, value in settings.items() if isinstance(settings, dict) else ():
        if type(value) in (int, float) and COUNTS.fullmatch(key):  # a boolean is a switch, whatever its name ends in
            _check_count(key, value, path)
        check_counts(value, path)


def check_layers(settings: Any, tensors: int, path: Path) -> None:
    """Raise CorruptArtifact for more layers than tensors: building a layer takes time even without memory."""
    for key, value in settings.items() if isinstance(settings, dict) else ():
        if key in LAYERS and isinstance(value, int) and value > tensors:
            raise CorruptArtifact(f"{path}: {key} is {value}, but the folder holds {tensors} tensors in all")
        check_layers(value, tensors, path)


def _walk(folder: Path) -> Iterator[Path]:
    for root, folders, files in os.walk(folder):
        yield from (Path(root, name) for name in (*folders, *files))


def _check_file(path: Path, folder: Path) -> None:
    if path.is_symlink() and not _stays(path, folder):
        raise CorruptArtifact(f"{path} is a link out of the folder; put the file itself there")
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise CorruptArtifact(f"{path} cannot be read ({error.strerror}); remove it") from error
    known = path.suffix.lower() in READ
    if stat.S_ISDIR(mode) and not known:
        return
    if not stat.S_ISREG(mode):
        raise CorruptArtifact(f"{path} is not a regular file; remove it")
    if not known and path.suffix.lower() not in INERT:
        raise CorruptArtifact(
            f"{path} may hold code or pickled objects; a model folder may hold {', '.join(sorted(READ))}: "
            f"remove the file, or save its weights as safetensors"
        )


def _stays(path: Path, folder: Path) -> bool:
    """Whether a link ends in the folder, or in the blobs of the hub cache that the folder is a snapshot of."""
    target, home = Path(os.path.realpath(path)), Path(os.path.realpath(folder))  # Path.resolve raises on a loop
    in_cache = home.parent.name == "snapshots" and target.is_relative_to(home.parent.parent / "blobs")
    return target.is_relative_to(home) or in_cache


def _check_settings(settings: Any, path: Path) -> None:
    """Raise CorruptArtifact for code and unknown classes in settings, at any depth."""
    if isinstance(settings, list):
        for item in settings:
            _check_settings(item, path)
    if not isinstance(settings, dict):
        return
    for key, value in settings.items():
        if key in CODE_KEYS and value:
            raise CorruptArtifact(
                f"{path}: {key} asks for code of the folder, which is never run; convert the model with its own code "
                f"and remove the field"
            )
        if key in CLASS_KEYS:
            _check_classes(key, value, path)
        _check_settings(value, path)


@cache
def _public_names() -> frozenset[str]:
    """Public names of transformers; none of them is imported."""
    import transformers  # heavy

    return frozenset(dir(transformers))


def _check_classes(key: str, value: Any, path: Path) -> None:
    for name in value if isinstance(value, list) else [value]:
        if name is None:
            continue
        if not isinstance(name, str) or not (
            name in OWN_CLASSES or OLD_CLASSES.fullmatch(name) or name in _public_names()
        ):
            raise CorruptArtifact(f"{path}: {key} names {name!r}, which is no class of transformers or vila-ops")


def _check_count(key: str, value: float, path: Path) -> None:
    if key == "model_max_length":
        return  # 1e30 stands for "no limit"
    limit = COUNT_LIMITS.get(key.rsplit("_", 1)[-1], SIZE_LIMIT)
    if value != int(value) or not 0 <= value <= limit:
        raise CorruptArtifact(f"{path}: {key} is {value}; it counts something, so use a whole number from 0 to {limit}")


def _strict(data: bytes, where: str) -> dict[str, Any]:
    try:
        parsed = json.loads(data.decode(), object_pairs_hook=_once, parse_constant=_number, parse_float=_number)
    except (ValueError, RecursionError) as error:
        raise CorruptArtifact(f"{where} is not valid JSON ({str(error)[:200]})") from error
    if not isinstance(parsed, dict):
        raise CorruptArtifact(f"{where} is {type(parsed).__name__}, not a JSON object")
    if _depth(parsed) > MAX_DEPTH:
        raise CorruptArtifact(f"{where} is nested more than {MAX_DEPTH} levels deep")
    return parsed


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} stands twice")
    return unique


def _number(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text} is not a number")
    return value


def _depth(value: Any) -> int:
    depth, level = 0, [value]
    while level:
        depth += 1
        level = [
            item
            for container in level
            if isinstance(container, dict | list)
            for item in (container.values() if isinstance(container, dict) else container)
        ]
    return depth


def _extent(name: str, entry: Any, path: Path) -> tuple[int, int]:
    """First byte of a tensor in the data, and the byte after its last. Raises CorruptArtifact."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise CorruptArtifact(f"{path}: the header of {name!r} must have dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    width = (BYTES_OF | OTHER_BYTES_OF).get(dtype) if isinstance(dtype, str) else None
    if width is None:
        raise CorruptArtifact(f"{path}: {name!r} has the unknown dtype {dtype!r}; supported are {', '.join(BYTES_OF)}")
    if not _naturals(shape) or not _naturals(offsets) or len(offsets) != 2:
        raise CorruptArtifact(f"{path}: shape {shape!r} or data_offsets {offsets!r} of {name!r} are no counts")
    if offsets[1] - offsets[0] != math.prod(shape) * width:
        raise CorruptArtifact(f"{path}: {name!r} of shape {shape} in {dtype} does not fill its data_offsets {offsets}")
    return offsets[0], offsets[1]


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _check_extents(extents: list[tuple[int, int]], size: int, path: Path) -> None:
    """Raise CorruptArtifact unless tensors lie end to end from the first byte of the data to the last."""
    ends = [(0, 0), *sorted(extents), (size, size)]
    for (_, stop), (start, _) in pairwise(ends):
        if stop != start:
            raise CorruptArtifact(
                f"{path}: a tensor ends at byte {stop} of the data and the next (or the file's end) is at {start}: "
                f"there is a hole or an overlap, or the file is truncated"
            )


def _by_index(folder: Path, stray: set[str]) -> dict[str, Stored]:
    path = folder / INDEX
    weight_map = read_json(path, at_most=TOKENIZER_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CorruptArtifact(f"{path} has no weight_map from names to files")
    names = set(weight_map.values())
    if outside := sorted(name for name in names if name != Path(name).name or not name.endswith(".safetensors")):
        raise CorruptArtifact(f"{path} names {outside[:3]}; it may name safetensors files of its own folder only")
    if missing := sorted(names - stray):
        raise CorruptArtifact(f"{path} names {missing[:3]}, which are missing; fetch the folder again")
    if extra := sorted(stray - names):
        raise CorruptArtifact(f"{folder} holds {extra[:3]}, which {path.name} does not name; remove them")
    tensors: dict[str, Stored] = {}
    for name in sorted(names):
        held = read_header(folder / name)
        if wrong := sorted(key for key in held if weight_map.get(key) != name):
            raise CorruptArtifact(f"{folder / name} holds {wrong[:3]}, which {path.name} does not place there")
        tensors |= held
    if lost := sorted(set(weight_map) - set(tensors)):
        raise CorruptArtifact(f"{path} places {lost[:3]} in files that do not hold them")
    return tensors
