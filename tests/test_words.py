"""The words of the design are kept: one name is one class, and words that were replaced do not come back."""

import re
import subprocess
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
REPLACED = {
    r"\blearnt\b": "target tokens, target mask",
    r"\banew\b": "again, rebuilt",
    r"\bmend(s|ed)?\b": "fix",
    r"\bsomebody else": "third-party, another process",
    r"\bis at it\b": "locked by PID N on HOST",
    r"\bof one's own\b": "its own, your",
    r"\b(picture|pictures)\b": "image",
    r"\b(room|rooms)\b": "task, space, free resources",
    r"(?<!in-)\bhouse\b": "repository layout",
    r"\bderanged\b|\banother's image\b|\bown image\b": "shuffled image, matched image",
    r"\brow_tokens\b": "sequence_length",
    r"\bimage_fit\b": "image_aspect_ratio",
    r"\bsquash\b": "resize",
    r"\brate_factors?\b": "lr_multiplier",
    r"\bmax_loss\b": "max_regression",
    r"^(suite|probe):": "final_suite, stage_suite",
    r"\bkept_apart\b": "document_mask",
    r"\bdata[./](making|view|cleaning|order|work)\b": "preprocess, inspect, filtering (and its like), loading",
    r"\bshel(f|ves)\b": "storage",
    r"\bSee Shelf\b": "See CheckpointStorage",
}
"""Replaced words as regular expressions, with what to write instead."""
CLASSES = (
    *("Asked", "AskedHere", "Batches", "Bench", "Blame", "Checkpoints", "Desk", "Handle", "Live", "Meter", "Place"),
    *("Rows", "Seen", "Share", "Shelf", "SlotCache", "Tally", "Told", "Watch"),
)
"""Class names that were replaced; a leading underscore does not count."""
ALLOWED = {
    "CHANGELOG.md": ".",  # it names what was replaced
    "tests/test_words.py": ".",
    "tests/data/sources/": "<picture|picture|house|[Ss]omebody",  # HTML's element, and words of published texts
    "tests/data/text/": "picture|house",  # words of prompts
    "tests/": "picture of|the picture|house|bedroom",  # words of prompts and answers
    "vila_ops/data/sources/html": "picture",  # HTML's element
    "vila_ops/data/sources/media.py": "picture",  # a word of keys that name images
    "vila_ops/data/text/questions.py": "picture",  # words of prompts
}
"""By the start of a path: what a line has to match to keep a replaced word, with the reason."""


@pytest.mark.slow
def test_one_name_is_one_class() -> None:
    places = defaultdict(list)
    for path, name in classes():
        places[name].append(path.relative_to(ROOT).as_posix())
    assert {name: paths for name, paths in places.items() if len(paths) > 1} == {}


def test_no_class_has_a_replaced_name() -> None:
    assert [f"{path.name}: {name}" for path, name in classes() if name.lstrip("_") in CLASSES] == []


@pytest.mark.parametrize("word", REPLACED, ids=lambda word: word.replace("\\b", ""))
def test_a_replaced_word_is_in_no_tracked_text(word: str) -> None:
    hits = [
        f"{path}:{number}: {line.strip()[:100]}"
        for path in tracked_texts()
        for number, line in enumerate((ROOT / path).read_text().splitlines(), 1)
        if re.search(word, line) and not is_allowed(path, line)
    ]
    assert not hits, "\n".join([f"write {REPLACED[word]} in", *hits])


def classes() -> Iterator[tuple[Path, str]]:
    for folder in ("vila_ops", "flows"):
        for path in (ROOT / folder).rglob("*.py"):
            yield from ((path, name) for name in re.findall(r"^\s*class (\w+)[:(\[]", path.read_text(), re.MULTILINE))


def tracked_texts() -> list[str]:
    """Code, configs, docs, tests and the README; command help and error messages are in the code."""
    command = ["git", "ls-files", "--", "*.py", "*.yaml", "*.md", "*.toml", "*.jinja", "Makefile", ".ci/run"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()


def is_allowed(path: str, line: str) -> bool:
    return any(path.startswith(start) and re.search(words, line) for start, words in ALLOWED.items())
