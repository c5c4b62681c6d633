"""Visual instructions with images as base64, one on each line, with the keys of M3IT or of VILA's VFLAN.

    {"instruction": "What is it? ", "inputs": "", "image_base64_str": ["..."], "outputs": "A cat."}
    {"question": "What is it?", "answer": "A cat.", "image": ["..."]}

As in VILA's loader, instruction and inputs are concatenated, placeholders in the text are removed, and all images come
before the question, each followed by a newline; visual dialogs are split into their turns.
"""

from collections.abc import Iterator
from pathlib import Path

from vila_ops.config.sources import Vflan
from vila_ops.data.raw.files import Folders, RawFile, Span, files_below, paths, scan_files
from vila_ops.data.raw.objects import raw_path
from vila_ops.data.records import Dropped, Part, Record, Turn
from vila_ops.data.sources.conversations import PLACEHOLDER, check_text
from vila_ops.data.sources.faults import Fault
from vila_ops.data.sources.images import from_base64, path_inside, read_image
from vila_ops.data.sources.json_files import SUFFIXES, Object, read_objects, record, scan_objects
from vila_ops.data.sources.media import is_absent, refuse_unread

PICKLES = (".pkl", ".pickle")
QUESTIONS, ANSWERS = ("question",), ("answer", "answer:", "outputs")
IMAGES = ("image", "image:", "image_base64_str")
_TEXTS = ("instruction", "inputs", *QUESTIONS, *ANSWERS)
DIALOG = "Image Descriptions"
"""Occurs in every question of M3IT's visual dialogs."""


def raw_files(source: Vflan, folders: Folders, *, cache: Path) -> list[RawFile]:
    """The JSON files. Raises ValueError if a pickle is among them."""
    root = raw_path(source.path)
    for path in sorted(path for _, path in files_below(root)) if root.is_dir() else [root]:
        if path.name.lower().endswith(PICKLES):
            raise ValueError(
                f"{path} is a pickle, and reading a pickle runs its author's code. If you trust it, "
                f"write it as jsonl, one {{question, answer, image}} on each line, and move the pickle elsewhere"
            )
    return scan_files(
        paths(root, SUFFIXES),
        f"vflan:{source.images}",
        lambda path: scan_objects(path, lambda value: _image_paths(value, source.images)),
        cache=cache,
    )


def read(source: Vflan, folders: Folders, span: Span) -> Iterator[list[Record | Dropped]]:
    """The conversation of each object."""
    return read_objects(span, lambda value, place: _record(source, value, place))


def _record(source: Vflan, value: Object, place: str) -> Record:
    question, answer = _question(value), _text(value, ANSWERS).rstrip()
    texts = [question, answer] if DIALOG not in question else _dialog(question, answer)
    key, encoded = _images(value)
    shown = [one if _is_path(one) else "" for one in encoded]
    refuse_unread(value, read=(*_TEXTS, key), ignore=source.ignore, shown=shown)
    if len(encoded) > source.max_images:
        raise Fault("too_many_images", f"{len(encoded)} images; max_images is {source.max_images}")
    for number, text in enumerate(texts, start=1):
        check_text(("assistant", "user")[number % 2], text, number=number, images=len(encoded))
    images = [read_image(source.images, one) if _is_path(one) else from_base64(one) for one in encoded]
    front = [part for image in images for part in (image, "\n")]
    turns = tuple(_turn(number, text, front if number == 0 else []) for number, text in enumerate(texts))
    name = encoded[0] if encoded and _is_path(encoded[0]) else None
    return record(value, place, turns=turns, image=name, licence=source.licence)


def _turn(number: int, text: str, front: list[Part]) -> Turn:
    parts = [*front, text] if text else front
    return Turn("assistant" if number % 2 else "user", tuple(parts))


def _question(value: Object) -> str:
    """The question without placeholders and the newline beside each (VILA's LazyVFlanDataset)."""
    if "instruction" in value:
        text = _text(value, ("instruction",)) + _text(value, ("inputs",))
    else:
        text = _text(value, QUESTIONS)
    text = text.rstrip()
    for placeholder in (f"{PLACEHOLDER}\n", f"\n{PLACEHOLDER}", PLACEHOLDER):
        text = text.replace(placeholder, "")
    return text


def _dialog(question: str, answer: str) -> list[str]:
    """The turns of "...\\nQuestion: q\\nAnswer: a\\nQuestion: q" and the last answer."""
    rounds = [one.split("\nAnswer: ") for one in question.split("\nQuestion: ")[1:]]
    if not rounds or len(rounds[-1]) != 1 or any(len(one) != 2 for one in rounds[:-1]):
        raise Fault(
            "malformed_turns", "a visual dialog is '\\nQuestion: ...\\nAnswer: ...' again and again, then a question"
        )
    rounds[-1] = [rounds[-1][0].replace("\n", ""), answer]
    return [text for one in rounds for text in one]


def _text(value: Object, keys: tuple[str, ...]) -> str:
    text = next((value[key] for key in keys if key in value), None)
    if not isinstance(text, str):
        stated = ", ".join(map(repr, value))
        raise Fault("malformed_turns", f"{keys[0]!r} is missing or not text; the record has {stated[:200]}")
    return text


def _images(value: Object) -> tuple[str, list[str]]:
    """The key of the images, and what is under it."""
    key = next((key for key in IMAGES if not is_absent(value.get(key))), IMAGES[0])
    match value.get(key):
        case None | "":
            return key, []
        case str(one):
            return key, [one]
        case list(many) if all(isinstance(one, str) for one in many):
            return key, many
        case stated:
            raise Fault("malformed_image", f"images are base64 or a list of it, not {repr(stated)[:80]}")


def _is_path(image: str) -> bool:
    return "." in image[-5:]  # base64 has no dot


def _image_paths(value: Object, images: str | None) -> list[Path | None]:
    return [path_inside(images, one) if _is_path(one) else None for one in _images(value)[1]]
