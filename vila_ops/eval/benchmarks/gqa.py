"""GQA: compositional questions on images of Visual Genome; see `config.benchmarks.Gqa`.

Official files, in one folder:

    testdev_balanced_questions.json    questions by id, with their answers, types, groups and entailed questions
    images/IMAGE.jpg                   the images
    train_balanced_questions.json      the train split, for demonstrations

LLaVA and VILA report the accuracy on testdev_balanced (`gqa_official`). The other numbers are those of the official
script: accuracy of binary and open questions, consistency, and distribution. Validity and plausibility need a file of
choices, which testdev does not have.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from vila_ops.config.benchmarks import Gqa
from vila_ops.eval.benchmark import Item, LazyTokenizer, MetricValues, Request, Units
from vila_ops.eval.columns import WRONG, in_columns, mean_metrics, share_or_zero
from vila_ops.eval.metrics import gqa
from vila_ops.eval.official import check_keys, image_of, json_of
from vila_ops.eval.origins import OfficialFile, Origins
from vila_ops.eval.prompts import requests_of
from vila_ops.eval.rows import ItemRow
from vila_ops.eval.statistics import FloatArray

REVISION = 1
KEYS = ("question", "imageId", "answer", "isBalanced", "types", "groups", "entailed")
_PAGE, _LICENCE = "https://cs.stanford.edu/people/dorarad/gqa/download.html", "CC BY 4.0"
ORIGINS = Origins(
    files=(
        OfficialFile(
            "testdev_balanced_questions.json",
            *(_PAGE, "1.4 GB, with all splits", _LICENCE),
            items=12_578,
            only={"split": "testdev_balanced"},
        ),
        OfficialFile(
            "val_balanced_questions.json",
            *(_PAGE, "1.4 GB, with all splits", _LICENCE),
            items=132_062,
            only={"split": "val_balanced"},
        ),
        OfficialFile("images/*.jpg", _PAGE, "20 GB", "CC BY 4.0 (Visual Genome)"),
        OfficialFile("train_balanced_questions.json", _PAGE, "1.4 GB, with all splits", _LICENCE, is_train=True),
    ),
    server="EvalAI scores test; testdev and val are scored here",
)


def read(source: Path, config: Gqa) -> Iterator[Item]:
    """The questions of a split, in their order. Raises ValueError for a file that is missing or faulty."""
    return _items(source, config.split)


def train_items(source: Path, config: Gqa) -> Iterator[Item]:
    """The questions of train_balanced, in their order. Raises ValueError for a file that is missing or faulty."""
    return _items(source, "train_balanced")


def _items(source: Path, split: str) -> Iterator[Item]:
    file = source / f"{split}_questions.json"
    questions = json_of(file)
    if not isinstance(questions, dict):
        raise ValueError(f"{file} is no object of questions by id; the file is of another version")
    check_keys(file, list(questions.values()), KEYS)
    for id_, question in questions.items():
        if not question["isBalanced"]:
            raise ValueError(f"{file}: question {id_} is not balanced; take the file of balanced questions")
        types = question["types"]
        yield Item(
            id=id_,
            group=question["imageId"],
            parts={
                "image": (image_of(source / "images" / f"{question['imageId']}.jpg"),),
                "question": (question["question"],),
            },
            references={key: question[key] for key in KEYS[2:]},
            answer=question["answer"],
            slices=(f"structural: {types['structural']}", f"semantic: {types['semantic']}"),
        )


def requests(items: Sequence[Item], config: Gqa, tokenizer: LazyTokenizer) -> list[Request]:
    """The question of each item."""
    return requests_of(items, config.prompt)


def score(items: Sequence[Item], rows: Sequence[ItemRow], config: Gqa) -> list[Mapping[str, float]]:
    """1 where the answer is that of the question."""
    questions = {item.id: item.references for item in items}
    return [in_columns(WRONG if row.answer is None else gqa.score(row.answer, questions[row.item])) for row in rows]


def metrics(items: Sequence[Item], rows: Sequence[ItemRow], config: Gqa) -> list[MetricValues]:
    """The accuracies, and the further numbers of the script."""
    questions = {item.id: item.references for item in items}
    values = mean_metrics("gqa", rows)
    for name, is_open in (("gqa_binary", False), ("gqa_open", True)):
        of_kind = [row for row in rows if gqa.is_open(questions[row.item]) == is_open]
        values += [_without_slices(one) for one in mean_metrics(name, of_kind)] if of_kind else []
    return [*values, *_consistency(questions, rows), *_distribution(questions, rows)]


def _without_slices(one: MetricValues) -> MetricValues:
    return replace(one, units=replace(one.units, slices=()))


def _consistency(questions: Mapping[str, Any], rows: Sequence[ItemRow]) -> list[MetricValues]:
    """The mean, over right answers that entail others, of the share of these that are right; 0 without such."""
    is_right = {row.item: row.scores["official"] for row in rows}
    values = np.zeros((len(rows), 2))
    for number, row in enumerate(rows):
        entailed = [one for one in questions[row.item]["entailed"] if one != row.item and one in is_right]
        if entailed and is_right[row.item]:
            values[number] = np.mean([is_right[one] for one in entailed]), 1
    if not values[:, 1].any():
        return []
    units = Units(tuple(row.item for row in rows), tuple(row.group for row in rows))
    return [MetricValues("gqa_consistency", units, values, share_or_zero)]


def _distribution(questions: Mapping[str, Any], rows: Sequence[ItemRow]) -> list[MetricValues]:
    """The distance of answers from the true ones by group of questions; its units are images."""
    grouped = [row for row in rows if questions[row.item]["groups"]["global"] is not None]
    cells = sorted({_cell(questions[row.item], questions[row.item]["answer"]) for row in grouped})
    images = sorted({row.group for row in grouped})
    if not cells:
        return []
    cell_of, image_of_ = {cell: place for place, cell in enumerate(cells)}, {one: at for at, one in enumerate(images)}
    counts = np.zeros((len(images), 2 * len(cells)))
    for row in grouped:
        question, image = questions[row.item], image_of_[row.group]
        counts[image, cell_of[_cell(question, question["answer"])]] += 1
        given = cell_of.get(_cell(question, gqa.prediction(row.answer or "")))
        if given is not None:
            counts[image, len(cells) + given] += 1
    units = Units(tuple(images), tuple(images))
    statistic = ChiSquare(tuple(group for group, _ in cells))
    return [MetricValues("gqa_distribution", units, counts, statistic, unit="chi-square", lower_is_better=True)]


def _cell(question: Mapping[str, Any], answer: str) -> tuple[str, str]:
    return question["groups"]["global"], answer


@dataclass(frozen=True)
class ChiSquare:
    """The script's distance from sums of true and given answers."""

    groups: tuple[str, ...]
    """The group of each cell."""

    def __call__(self, sums: FloatArray) -> FloatArray:
        """The statistic."""
        names, group_of = np.unique(np.array(self.groups), return_inverse=True)
        member = np.eye(len(names))[group_of]  # (cells, groups)
        true, given = np.split(sums, 2, axis=-1)
        terms = np.divide((given - true) ** 2, true, out=np.zeros_like(true), where=true > 0)
        totals = true @ member
        result: FloatArray = ((terms @ member) * totals).sum(axis=-1) / totals.sum(axis=-1) / 100
        return result


def official_files(items: Sequence[Item], rows: Sequence[ItemRow], config: Gqa) -> dict[str, bytes]:
    """The predictions as the official script reads them, written as by LLaVA."""
    answers = {row.item: row.answer or "" for row in rows}
    records = [{"questionId": item.id, "prediction": gqa.prediction(answers[item.id])} for item in items]
    return {f"{config.split}_predictions.json": json.dumps(records, ensure_ascii=False).encode()}
