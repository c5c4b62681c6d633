"""DocVQA, task 1: short answers about the page of a document; see `config.benchmarks.DocVqa`.

Official files, in one folder (RRC, challenge 17):

    val_v1.0.json, test_v1.0.json       data: questionId, question, image and, but for test, answers
    documents/*.png                     the pages
    train_v1.0.json                     the train split, for demonstrations

Files of the later download, named val_v1.0_withQT.json and spdocvqa_images/*.png, are read as well.

The metric is ANLS (see `metrics.anls`). Answers of the test split are with its server: the result is its upload file.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vila_ops.config.benchmarks import DocVqa
from vila_ops.eval.benchmark import Item, LazyTokenizer, MetricValues, Request
from vila_ops.eval.columns import WRONG, in_columns, mean_metrics
from vila_ops.eval.metrics import anls
from vila_ops.eval.official import check_keys, image_of, json_of
from vila_ops.eval.origins import OfficialFile, Origins
from vila_ops.eval.prompts import requests_of
from vila_ops.eval.rows import ItemRow

REVISION = 1
_GIVEN = "https://rrc.cvc.uab.es/?ch=17&com=downloads, after registration", "?", "?"
ORIGINS = Origins(
    files=(
        OfficialFile("val_v1.0*.json", *_GIVEN, items=5_349, only={"split": "val"}),
        OfficialFile("test_v1.0*.json", *_GIVEN, items=5_188, only={"split": "test"}),
        OfficialFile("*/*.png", *_GIVEN),
        OfficialFile("train_v1.0*.json", *_GIVEN, is_train=True),
    ),
    server="RRC scores test; val is scored here",
)


def read(source: Path, config: DocVqa) -> Iterator[Item]:
    """The questions of a split, in the order of its file. Raises ValueError, also for a file of another split."""
    return _items(source, config.split)


def train_items(source: Path, config: DocVqa) -> Iterator[Item]:
    """The questions of the train split, as by `read`. Raises ValueError."""
    return _items(source, "train")


def _items(source: Path, expected: str) -> Iterator[Item]:
    later = source / f"{expected}_v1.0_withQT.json"
    file = later if later.is_file() else source / f"{expected}_v1.0.json"
    content = json_of(file)
    if not isinstance(content, dict) or "data" not in content:
        raise ValueError(f"{file} has no data; the file is of another version")
    if (split := content.get("dataset_split", expected)) != expected:
        raise ValueError(f"{file} is of the split {split}, and {expected} is asked for; take the file of that split")
    answers = () if expected == "test" else ("answers",)
    check_keys(file, content["data"], ("questionId", "question", "image", *answers))
    for record in content["data"]:
        yield _item(source, record, file)


def _item(source: Path, record: Mapping[str, Any], file: Path) -> Item:
    later = source / "spdocvqa_images"
    image = later / Path(record["image"]).name if later.is_dir() else source / record["image"]
    truths = [str(one) for one in record.get("answers") or ()]
    if "answers" in record and not truths:
        raise ValueError(f"{file}: question {record['questionId']} has no answers; the file is of another version")
    return Item(
        id=str(record["questionId"]),
        group=record["image"],
        parts={"image": (image_of(image),), "question": (record["question"],)},
        references={"answers": truths, "questionId": record["questionId"]},
        answer=truths[0] if truths else "",
        slices=tuple(f"type: {one}" for one in record.get("question_types") or ()),
    )


def requests(items: Sequence[Item], config: DocVqa, tokenizer: LazyTokenizer) -> list[Request]:
    """The question of each item."""
    return requests_of(items, config.prompt)


def score(items: Sequence[Item], rows: Sequence[ItemRow], config: DocVqa) -> list[Mapping[str, float]]:
    """The similarity of each answer; nothing where the answers are not public."""
    truths: dict[str, list[str]] = {item.id: item.references["answers"] for item in items}
    return [_similarity(row, truths[row.item]) for row in rows]


def _similarity(row: ItemRow, truths: Sequence[str]) -> dict[str, float]:
    if not truths:
        return {}
    return in_columns(WRONG if row.answer is None else anls.score(row.answer, truths))


def metrics(items: Sequence[Item], rows: Sequence[ItemRow], config: DocVqa) -> list[MetricValues]:
    """The mean similarity; none for the test split."""
    return mean_metrics("docvqa_anls", rows) if config.split == "val" else []


def official_files(items: Sequence[Item], rows: Sequence[ItemRow], config: DocVqa) -> dict[str, bytes]:
    """The upload of the server: an array of questionId and answer with every question."""
    answers = {row.item: row.answer or "" for row in rows}
    records = [{"questionId": item.references["questionId"], "answer": answers[item.id]} for item in items]
    return {f"docvqa_{config.split}_results.json": json.dumps(records, ensure_ascii=False).encode()}
