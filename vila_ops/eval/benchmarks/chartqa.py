"""ChartQA: short answers about charts; see `config.benchmarks.ChartQa`.

Official files, in one folder ("ChartQA Dataset" of vis-nlp/ChartQA):

    test/test_human.json, test/test_augmented.json      arrays of imgname, query and label
    test/png/IMGNAME                                    the charts
    train/                                              the same of the train split, for demonstrations

The metric is the relaxed accuracy over both files (see `metrics.relaxed`); its slices are the files.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from vila_ops.config.benchmarks import ChartQa
from vila_ops.eval.benchmark import Item, LazyTokenizer, MetricValues, Request
from vila_ops.eval.columns import WRONG, in_columns, mean_metrics
from vila_ops.eval.metrics import relaxed
from vila_ops.eval.official import image_of, records_of
from vila_ops.eval.prompts import requests_of
from vila_ops.eval.rows import ItemRow

REVISION = 1
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
