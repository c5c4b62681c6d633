"""VizWiz: questions of blind people on their photos; some have no answer. See `config.benchmarks.VizWiz`.

Official files, in one folder:

    val.json, val/VizWiz_val_*.jpg      questions, ten human answers each, and images
    test.json, test/VizWiz_test_*.jpg   those of the test split, without answers
    train.json, train/VizWiz_train_*    those of the train split, for demonstrations

`vizwiz_official` is what the official code gives on val. LLaVA and VILA upload normalised answers to the test split;
so does the upload file of test here.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from vila_ops.config.benchmarks import VizWiz
from vila_ops.eval.benchmark import Item, LazyTokenizer, MetricValues, Request, Units
from vila_ops.eval.columns import WRONG, in_columns, mean_metrics, share_or_zero
from vila_ops.eval.metrics import m4c, vizwiz
from vila_ops.eval.official import check_keys, image_of, records_of
from vila_ops.eval.origins import OfficialFile, Origins
from vila_ops.eval.prompts import requests_of
from vila_ops.eval.rows import ItemRow
from vila_ops.eval.statistics import FloatArray

REVISION = 1
_PAGE, _LICENCE = "https://vizwiz.org/tasks-and-datasets/vqa/", "CC BY 4.0"
ORIGINS = Origins(
    files=(
        OfficialFile("val.json", _PAGE, "10 MB, with all splits", _LICENCE, items=4_319, only={"split": "val"}),
        OfficialFile("val/VizWiz_val_*.jpg", _PAGE, "3 GB", _LICENCE, only={"split": "val"}),
        OfficialFile("test.json", _PAGE, "10 MB, with all splits", _LICENCE, items=8_000, only={"split": "test"}),
        OfficialFile("test/VizWiz_test_*.jpg", _PAGE, "5 GB", _LICENCE, only={"split": "test"}),
        OfficialFile("train.json", _PAGE, "10 MB, with all splits", _LICENCE, is_train=True),
        OfficialFile("train/VizWiz_train_*.jpg", _PAGE, "11 GB", _LICENCE, is_train=True),
    ),
    server="EvalAI's challenge is closed, so that test cannot be scored; val is scored here",
)


def read(source: Path, config: VizWiz) -> Iterator[Item]:
    """The questions of a split, in their order. Raises ValueError for a file that is missing or faulty."""
    return _items(source, config.split)


def train_items(source: Path, config: VizWiz) -> Iterator[Item]:
    """The questions of the train split, in their order. Raises ValueError for a file that is missing or faulty."""
    return _items(source, "train")


def _items(source: Path, split: str) -> Iterator[Item]:
    file = source / f"{split}.json"
    records = records_of(file, ("image", "question"))
    if split != "test":
        check_keys(file, records, ("answers", "answerable", "answer_type"))
    for record in records:
        if not record["image"].startswith(f"VizWiz_{split}_"):
            raise ValueError(f"{file} has the question of {record['image']}, which is of another split")
        answers = [one["answer"] for one in record["answers"]] if split != "test" else []
        yield Item(
            id=record["image"],
            group=record["image"],
            parts={
                "image": (image_of(source / split / record["image"]),),
                "question": (record["question"],),
            },
            references={"answers": answers, "answerable": bool(record.get("answerable"))},
            answer=max(answers, key=answers.count) if answers else "",
            slices=(f"answer_type: {record['answer_type']}",) if answers else (),
        )


def requests(items: Sequence[Item], config: VizWiz, tokenizer: LazyTokenizer) -> list[Request]:
    """The question of each item."""
    return requests_of(items, config.prompt)


def score(items: Sequence[Item], rows: Sequence[ItemRow], config: VizWiz) -> list[Mapping[str, float]]:
    """The accuracy of each answer, and whether it says that the question cannot be answered; none on test."""
    if config.split == "test":
        return [{} for _ in rows]
    human = {item.id: item.references["answers"] for item in items}
    return [
        {
            **in_columns(WRONG if row.answer is None else vizwiz.score(row.answer, human[row.item])),
            "says_unanswerable": float(row.answer is not None and vizwiz.says_unanswerable(row.answer)),
        }
        for row in rows
    ]


def metrics(items: Sequence[Item], rows: Sequence[ItemRow], config: VizWiz) -> list[MetricValues]:
    """The mean accuracy, and how well questions are recognised that cannot be answered."""
    if config.split == "test":
        return []
    answerable = {item.id: item.references["answerable"] for item in items}
    said = np.array([row.scores["says_unanswerable"] for row in rows])
    positive = np.array([float(not answerable[row.item]) for row in rows])
    counts = np.stack([said * positive, said, positive, np.ones(len(rows))], axis=1)
    units = Units(tuple(row.item for row in rows), tuple(row.group for row in rows))
    return [
        *mean_metrics("vizwiz", rows),
        MetricValues("vizwiz_unanswerable_f1", units, counts, unanswerable_f1),
        MetricValues("vizwiz_unanswerable_average_precision", units, counts, average_precision),
    ]


def unanswerable_f1(counts: FloatArray) -> FloatArray:
    """F1 from counts of questions: recognised, said to be unanswerable, unanswerable, all; (..., 4) -> (...)."""
    return share_or_zero(np.stack([2 * counts[..., 0], counts[..., 1] + counts[..., 2]], axis=-1))


def average_precision(counts: FloatArray) -> FloatArray:
    """Average precision from the same counts, for a model that says it or not; 0 where all can be answered."""
    both, said, positive, every = np.moveaxis(counts, -1, 0)
    precision = share_or_zero(np.stack([both, said], axis=-1))
    recall = share_or_zero(np.stack([both, positive], axis=-1))
    result: FloatArray = recall * precision + np.where(positive > 0, (1 - recall) * positive / every, 0)
    return result


def official_files(items: Sequence[Item], rows: Sequence[ItemRow], config: VizWiz) -> dict[str, bytes]:
    """The results as the official code and the server read them: image and answer, in the official order."""
    answers = {row.item: row.answer or "" for row in rows}
    if config.split == "test":
        answers = {id_: m4c.normalize(answer) for id_, answer in answers.items()}
    records = [{"image": item.id, "answer": answers[item.id]} for item in items]
    return {f"VizWiz_{config.split}_results.json": json.dumps(records, ensure_ascii=False).encode()}
