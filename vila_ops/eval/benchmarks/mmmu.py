"""MMMU: questions of college exams; see `config.benchmarks.Mmmu`.

Official files, in one folder (the data set MMMU/MMMU):

    SUBJECT/validation-*.parquet    id, question, options (a Python list as text), image_1 to image_7, answer,
                                    question_type; 30 subjects
    SUBJECT/dev-*.parquet           the same, for demonstrations

Images stand where the question names them ("<image 1>"); those that only an option names come before it, in their
order. Scores are those of one pass over the subjects in alphabetical order, as the official script makes (see
`metrics.mmmu`, whose official column depends on the order). A failed question is wrong and draws nothing.
"""

import ast
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vila_ops.config.benchmarks import Mmmu
from vila_ops.eval.benchmark import Item, LazyTokenizer, MetricValues, Part, Parts, Request, Unreadable
from vila_ops.eval.columns import WRONG, in_columns, mean_metrics
from vila_ops.eval.metrics.mmmu import MmmuItem, mmmu
from vila_ops.eval.official import image_in, parquet_of
from vila_ops.eval.origins import OfficialFile, Origins
from vila_ops.eval.prompts import requests_of
from vila_ops.eval.rows import ItemRow

REVISION = 2
_HUB, _LICENCE = "MMMU/MMMU", "Apache-2.0"
_URL = f"https://huggingface.co/datasets/{_HUB}"
_VALIDATION, _DEV = "*/validation-*.parquet", "*/dev-*.parquet"
ORIGINS = Origins(
    files=(
        OfficialFile(
            *(_VALIDATION, _URL, "0.3 GB", _LICENCE),
            items=900,
            only={"split": "validation"},
            hub=f"{_HUB}/{_VALIDATION}",
        ),
        OfficialFile(_DEV, _URL, "57 MB", _LICENCE, items=150, only={"split": "dev"}, hub=f"{_HUB}/{_DEV}"),
        OfficialFile(_DEV, _URL, "57 MB", _LICENCE, hub=f"{_HUB}/{_DEV}", is_train=True),
    ),
    server="EvalAI scores test, whose answers have been public since February 2026; validation is scored here",
    revision="98e6ac0cb9b7b2cd2c991b85a50762edc4aedc68",
)
CHOICE, OPEN = "multiple-choice", "open"
_IMAGE = re.compile(r"<image (\d)>")


def read(source: Path, config: Mmmu) -> Iterator[Item]:
    """The questions of all subjects in alphabetical order. Raises ValueError."""
    return _items(source, config.split)


def train_items(source: Path, config: Mmmu) -> Iterator[Item]:
    """The questions of dev, which is meant for demonstrations, as by `read`. Raises ValueError."""
    return _items(source, "dev")


def _items(source: Path, split: str) -> Iterator[Item]:
    files = sorted(source.glob(f"*/{split}-*.parquet"))
    if not files:
        raise ValueError(
            f"{source} has no SUBJECT/{split}-*.parquet; `vila-ops benchmark list` says where they come from"
        )
    for file in files:
        for record in parquet_of(file, ("id", "question", "options", "answer", "question_type", "image_1")):
            yield _item(record, file)


def _item(record: Mapping[str, Any], file: Path) -> Item:
    options = tuple(str(one) for one in _list(record["options"], record["id"], file))
    is_open = record["question_type"] == OPEN
    if record["question_type"] not in (CHOICE, OPEN) or bool(options) == is_open:
        raise ValueError(
            f"{file}: question {record['id']} has the type {record['question_type']!r} and {len(options)} options"
        )
    answer: str = record["answer"]
    truths = [str(one) for one in _list(answer, record["id"], file)] if answer.startswith("[") else [answer]
    asked = _IMAGE.findall(record["question"])
    others = sorted(set(_IMAGE.findall(" ".join(options))) - set(asked))
    return Item(
        id=record["id"],
        group=record["id"],
        parts={
            "image": tuple(_image(record, number) for number in others) or ("",),
            "question": _interleaved(record, asked),
        },
        options=options,
        references={"answer": truths, "type": record["question_type"]},
        answer=truths[0],
        slices=(file.parent.name, record["question_type"]),
    )


def _list(text: str, id_: str, file: Path) -> list[Any]:
    """A list that is written as Python writes it. Raises ValueError."""
    try:
        value = ast.literal_eval(text)
    except (SyntaxError, ValueError) as error:
        raise ValueError(
            f"{file}: question {id_} has {text[:60]!r} in place of a list; fetch the file again"
        ) from error
    return list(value)


def _interleaved(record: Mapping[str, Any], asked: Sequence[str]) -> Parts:
    """The question with its images in their places; an image that is named again is not shown again."""
    parts: list[Part] = []
    shown: set[str] = set()
    for place, piece in enumerate(_IMAGE.split(record["question"])):  # text, number, text, ...
        if place % 2 == 0:
            parts.append(piece)
        elif piece in shown:
            parts.append(f"<image {piece}>")
        else:
            shown.add(piece)
            parts.append(_image(record, piece))
    return tuple(parts)


def _image(record: Mapping[str, Any], number: str) -> Part:
    name = f"image_{number}"
    image = record.get(name)
    return image_in(image["bytes"], f"{record['id']} {name}") if image else Unreadable(f"{record['id']} has no {name}")


def requests(items: Sequence[Item], config: Mmmu, tokenizer: LazyTokenizer) -> list[Request]:
    """Each question by the prompt of its type."""
    prompts = {CHOICE: config.prompt, OPEN: config.open_prompt}
    return [request for item in items for request in requests_of([item], prompts[item.references["type"]])]


def score(items: Sequence[Item], rows: Sequence[ItemRow], config: Mmmu) -> list[Mapping[str, float]]:
    """1 where the answer is right, else 0, by one pass in the order of the items."""
    answers = {row.item: row.answer for row in rows if row.answer is not None}
    passed = [item for item in items if item.id in answers]
    scores = mmmu([MmmuItem(one.options, tuple(one.references["answer"]), answers[one.id]) for one in passed])
    by_id = {item.id: columns for item, columns in zip(passed, scores, strict=True)}
    return [in_columns(by_id.get(row.item, WRONG)) for row in rows]


def metrics(items: Sequence[Item], rows: Sequence[ItemRow], config: Mmmu) -> list[MetricValues]:
    """The share of right answers; the subjects are slices."""
    return mean_metrics(f"mmmu_{config.split}", rows)


def official_files(items: Sequence[Item], rows: Sequence[ItemRow], config: Mmmu) -> dict[str, bytes]:
    """SUBJECT/output.json as the official `main_parse_and_eval.py` reads them."""
    answers = {row.item: row.answer or "" for row in rows}
    outputs: dict[str, list[dict[str, Any]]] = {}
    for item in items:
        truths = item.references["answer"]
        record = {"id": item.id, "question_type": item.references["type"], "answer": truths}
        if item.options:
            letters = [chr(ord("A") + number) for number in range(len(item.options))]
            record |= {"answer": truths[0], "all_choices": letters}
            record |= {"index2ans": dict(zip(letters, item.options, strict=True))}
        outputs.setdefault(item.slices[0], []).append(record | {"response": answers[item.id]})
    return {
        f"{subject}/output.json": json.dumps(records, indent=4, ensure_ascii=False).encode()
        for subject, records in outputs.items()
    }
