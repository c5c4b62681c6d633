"""MMBench: each question is asked with its options in every order; see `config.benchmarks.MmBench`.

Official file, one table of tabs with images in base64:

    mmbench_dev_20230712.tsv      index, question, hint, A, B, C, D, answer, category, image, source, l2-category, ...
                                  (MMBench_DEV_EN_V11.tsv, MMBench_TEST_EN_V11.tsv: other versions)

A row is an item; the rotations of a question have its index plus a million each. A file that has none of them gets all.
Where an image is a number, it is that of the row with this index. Options end before the first that is blank. A metric
names its version. A question with a rotation that has no answer is incomplete, and not right (see `metrics.circular`).
"""

import hashlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from vila_ops.config.benchmarks import MmBench, MmBenchCn
from vila_ops.eval.benchmark import Item, LazyTokenizer, MetricValues, Request, Units
from vila_ops.eval.columns import WRONG, in_columns
from vila_ops.eval.metrics.circular import STRIDE, Rotation, circular
from vila_ops.eval.metrics.columns import right
from vila_ops.eval.metrics.letters import corrected_letter, vlmeval_letter
from vila_ops.eval.official import image_in_base64, table_of
from vila_ops.eval.origins import OfficialFile, Origins
from vila_ops.eval.prompts import requests_of
from vila_ops.eval.rows import ItemRow
from vila_ops.eval.xlsx import xlsx

REVISION = 3
Language = MmBench | MmBenchCn
LETTERS = "ABCD"
LONGEST_REFERENCE = 64
"""An `image` of so many characters or fewer is the index of the row that has it."""
UPLOADED = ("index", "question", *LETTERS, "prediction", "answer", "split")
FILES = {
    "mmbench": {
        "dev_20230712": "mmbench_dev_20230712.tsv",
        "dev_v11": "MMBench_DEV_EN_V11.tsv",
        "test_v11": "MMBench_TEST_EN_V11.tsv",
    },
    "mmbench_cn": {
        "dev_20231003": "mmbench_dev_cn_20231003.tsv",
        "dev_v11": "MMBench_DEV_CN_V11.tsv",
        "test_v11": "MMBench_TEST_CN_V11.tsv",
    },
}
_OLD = "https://download.openmmlab.com/mmclassification/datasets/mmbench/"
_NEW = "https://opencompass.openxlab.space/utils/VLMEval/"
_SIZES = {"mmbench_dev_20230712.tsv": ("138 MB", 4_329), "mmbench_dev_cn_20231003.tsv": ("136 MB", 4_329)}
ORIGINS = Origins(
    files=tuple(
        OfficialFile(
            name,
            (_OLD if name in _SIZES else _NEW) + name,
            _SIZES.get(name, ("?", None))[0],
            "Apache-2.0 (questions), images of several sources",
            items=_SIZES.get(name, ("?", None))[1],
            only={"kind": kind, "version": version},
        )
        for kind, names in FILES.items()
        for version, name in names.items()
    ),
    server="closed on 2026-03-31; the answers of the tests of V1.1 are public, so all is scored here",
)


def read(source: Path, config: Language) -> Iterator[Item]:
    """The rows of a file, in their order, and the rotations that it lacks if it has none at all. Raises ValueError."""
    file = source / FILES[config.kind][config.version]
    rows = table_of(file, ("index", "question", "A", "B", "image"))
    if short := [number for number, row in enumerate(rows, 1) if None in row or None in row.values()]:
        raise ValueError(f"{file}: row {short[0]} has another number of cells than the header; fetch the file again")
    if odd := [row["index"] for row in rows if not row["index"].isdecimal()]:
        raise ValueError(f"{file}: {odd[0]!r} is no index; the file is of another version")
    if not any(int(row["index"]) >= STRIDE for row in rows):
        rows = [rotated for row in rows for rotated in _rotations(row)]
    texts = {row["index"]: row["image"] for row in rows}
    counts: dict[int, int] = {}  # of the options of a question, whichever of them is the last in a rotation
    for row in rows:
        question = int(row["index"]) % STRIDE
        counts[question] = max(counts.get(question, 0), len(_options(row)))
    for row in rows:
        own = row["image"].strip()
        text = texts.get(own, "") if 0 < len(own) <= LONGEST_REFERENCE else own
        yield _item(file, row, text, [row.get(letter, "") for letter in LETTERS[: counts[int(row["index"]) % STRIDE]]])


def _rotations(row: Mapping[str, str]) -> list[dict[str, str]]:
    """A question with its options moved to the front one by one, and its right letter with them."""
    options = _options(row)
    answer = row.get("answer", "")
    place = LETTERS.find(answer) if answer else -1
    return [
        {
            **row,
            "index": str(int(row["index"]) + STRIDE * number),
            **dict(zip(LETTERS, options[number:] + options[:number], strict=False)),
            **({"answer": LETTERS[(place - number) % len(options)]} if place >= 0 else {}),
        }
        for number in range(len(options))
    ]


def _options(row: Mapping[str, str]) -> list[str]:
    """The cells before the first blank one, without those behind the last text.

    "None" and "nan" there are empty cells as pandas writes them, unless one is the right answer. Elsewhere they are
    texts, such as the answer to "How many?".
    """
    options = list(itertools.takewhile(str.strip, (row.get(letter, "") for letter in LETTERS)))
    right_place = LETTERS.find(row.get("answer", "").strip() or " ")
    while options and _is_none(options[-1]) and len(options) - 1 != right_place:
        options.pop()
    return options


def _is_none(text: str) -> bool:
    """Whether a cell is empty, as pandas writes and reads it."""
    return text.strip().lower() in ("", "nan", "none")


def _item(file: Path, row: Mapping[str, str], text: str, options: Sequence[str]) -> Item:
    index, answer = row["index"], row.get("answer", "").strip()
    answer = "" if _is_none(answer) else answer
    if not options or (answer and answer not in LETTERS[: len(options)]):
        raise ValueError(f"{file}: row {index} has {len(options)} options and the answer {answer!r}; fetch it again")
    categories = [f"{name}: {row[name]}" for name in ("category", "l2-category") if not _is_none(row.get(name, ""))]
    context = row.get("hint", "")
    return Item(
        id=index,
        group=hashlib.sha256(text.encode()).hexdigest()[:16],
        parts={
            "image": (image_in_base64(text, f"row {index}"),),
            "context": ("" if _is_none(context) else context,),
            "question": (row["question"],),
        },
        options=tuple(options),
        references={
            "answer": answer,
            "cells": {name: row[name] for name in UPLOADED if name in row},
        },
        answer=answer,
        slices=tuple(categories),
    )


def requests(items: Sequence[Item], config: Language, tokenizer: LazyTokenizer) -> list[Request]:
    """The question of each item, whose options are already in the order of its rotation."""
    return [replace(one, rotation=int(one.item) // STRIDE) for one in requests_of(items, config.prompt)]


def score(items: Sequence[Item], rows: Sequence[ItemRow], config: Language) -> list[Mapping[str, float]]:
    """1 where the answer to a row is right; none where the answers are not public."""
    by_id = {item.id: item for item in items}
    return [_score(by_id[row.item], row.answer) if by_id[row.item].answer else {} for row in rows]


def _score(item: Item, answer: str | None) -> Mapping[str, float]:
    options = dict(zip(LETTERS, item.options, strict=False))
    if answer is None:
        return in_columns(WRONG)
    return in_columns(
        right(vlmeval_letter(answer, options) == item.answer, corrected_letter(answer, options) == item.answer)
    )


def metrics(items: Sequence[Item], rows: Sequence[ItemRow], config: Language) -> list[MetricValues]:
    """The share of questions with every rotation right, and the share of those with a rotation that has no answer."""
    answered = {row.item: row.answer for row in rows}
    known = [item for item in items if item.answer]
    if not known:
        return []
    results = circular(
        [
            Rotation(int(item.id), item.answer, dict(zip(LETTERS, item.options, strict=False)), answered.get(item.id))
            for item in known
        ]
    )
    first = {int(item.id) % STRIDE: item for item in reversed(known)}
    name = f"{config.kind}_{config.version}"

    def metric(measure: str, values: Mapping[int, float], **more: Any) -> MetricValues:
        asked = [first[index] for index in values]
        units = Units(
            tuple(map(str, values)), tuple(item.group for item in asked), tuple(item.slices for item in asked)
        )
        return MetricValues(f"{name}_{measure}", units, np.array(list(values.values())), **more)

    official = {index: one.official for index, one in results.items() if one.official is not None}
    corrected = {index: one.corrected for index, one in results.items()}
    incomplete = {index: float(one.outcome == "incomplete") for index, one in results.items()}
    return [
        *([metric("official", official)] if official else []),
        metric("corrected", corrected),
        metric("incomplete", incomplete, lower_is_better=True),
    ]


def official_files(items: Sequence[Item], rows: Sequence[ItemRow], config: Language) -> dict[str, bytes]:
    """The table that MMBench's server and VLMEvalKit read: the rows of the file with a column of predictions."""
    answers = {row.item: row.answer or "" for row in rows}
    columns = [
        name for name in UPLOADED if name == "prediction" or any(name in item.references["cells"] for item in items)
    ]
    table = [[_cells(item, answers[item.id]).get(name, "") for name in columns] for item in items]
    return {Path(FILES[config.kind][config.version]).stem + ".xlsx": xlsx([columns, *table])}


def _cells(item: Item, answer: str) -> Mapping[str, str | int]:
    """The cells of a row; its index is a number, as VLMEvalKit compares it."""
    return {**item.references["cells"], "index": int(item.id), "prediction": answer}
