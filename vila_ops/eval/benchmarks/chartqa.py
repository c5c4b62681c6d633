"""ChartQA: short answers about charts; see `config.benchmarks.ChartQa`.

Official files, in one folder ("ChartQA Dataset" of vis-nlp/ChartQA):

    test/test_human.json, test/test_augmented.json      arrays of imgname, query and label
    test/png/IMGNAME                                    the charts
    train/                                              the same of the train split, for demonstrations

The metric is the relaxed accuracy over both files (see `metrics.relaxed`); its slices are the files. No server and no
script of the authors takes predictions: the result files are the two files with predictions.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from vila_ops.config.benchmarks import ChartQa
from vila_ops.eval.benchmark import Item, LazyTokenizer, MetricValues, Request
from vila_ops.eval.columns import WRONG, in_columns, mean_metrics
from vila_ops.eval.metrics import relaxed
from vila_ops.eval.official import image_of, records_of
from vila_ops.eval.origins import OfficialFile, Origins
from vila_ops.eval.prompts import requests_of
from vila_ops.eval.rows import ItemRow

REVISION = 2
_GIVEN = "https://huggingface.co/datasets/ahmed-masry/ChartQA", "0.9 GB, with all splits", "GPL-3.0"
_HUB = "ahmed-masry/ChartQA/ChartQA Dataset.zip!ChartQA Dataset"
ORIGINS = Origins(
    files=tuple(
        one
        for split, items in (("test", 2_500), ("val", 1_920))
        for one in (
            OfficialFile(f"{split}/{split}_*.json", *_GIVEN, items=items, only={"split": split}, hub=_HUB),
            OfficialFile(f"{split}/png/*.png", *_GIVEN, only={"split": split}, hub=_HUB),
        )
    )
    + tuple(OfficialFile(path, *_GIVEN, hub=_HUB, is_train=True) for path in ("train/train_*.json", "train/png/*.png")),
    server="none: scored here",
    revision="42455d40dbcbb3d66ec5c6bc448c0b9c37d5650f",
)
PARTS = ("human", "augmented")


def read(source: Path, config: ChartQa) -> Iterator[Item]:
    """The questions of the two files, in their order. Raises ValueError."""
    return _items(source, config.split)


def train_items(source: Path, config: ChartQa) -> Iterator[Item]:
    """The questions of the two files of the train split, in their order. Raises ValueError."""
    return (replace(item, id=f"train-{item.id}") for item in _items(source, "train"))


def _items(source: Path, split: str) -> Iterator[Item]:
    folder = source / split
    for part in PARTS:
        for place, record in enumerate(records_of(folder / f"{split}_{part}.json", ("imgname", "query", "label"))):
            name, label = record["imgname"], str(record["label"])
            yield Item(
                id=f"{part}-{place}",
                group=name,
                parts={"image": (image_of(folder / "png" / name),), "question": (record["query"],)},
                references=label,
                answer=label,
                slices=(part,),
            )


def requests(items: Sequence[Item], config: ChartQa, tokenizer: LazyTokenizer) -> list[Request]:
    """The question of each item."""
    return requests_of(items, config.prompt)


def score(items: Sequence[Item], rows: Sequence[ItemRow], config: ChartQa) -> list[Mapping[str, float]]:
    """1 where the answer is right or near, else 0."""
    labels: dict[str, str] = {item.id: item.references for item in items}
    return [in_columns(WRONG if row.answer is None else relaxed.score(row.answer, labels[row.item])) for row in rows]


def metrics(items: Sequence[Item], rows: Sequence[ItemRow], config: ChartQa) -> list[MetricValues]:
    """The share of right answers."""
    return mean_metrics("chartqa", rows)


def official_files(items: Sequence[Item], rows: Sequence[ItemRow], config: ChartQa) -> dict[str, bytes]:
    """Both files of the split with the answer to each question as prediction."""
    answers = {row.item: row.answer or "" for row in rows}
    records: dict[str, list[dict[str, str]]] = {part: [] for part in PARTS}
    for item in items:
        (part,), (query,) = item.slices, item.parts["question"]
        label, prediction = item.references, answers[item.id]
        records[part].append({"imgname": item.group, "query": str(query), "label": label, "prediction": prediction})
    return {
        f"{config.split}_{part}.json": json.dumps(of_part, ensure_ascii=False).encode()
        for part, of_part in records.items()
    }
