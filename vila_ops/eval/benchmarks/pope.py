"""POPE on COCO: is there a X in the image; see `config.benchmarks.Pope`.

Official files, in one folder:

    coco_pope_random.json, coco_pope_popular.json, coco_pope_adversarial.json
        JSON lines with question_id, image, text and label; output/coco/ of RUCAIBox/POPE
    val2014/COCO_val2014_*.jpg
        the images, from COCO

The 8,910 lines are 5,043 distinct questions on 500 images. A question is asked once and counts in each file that has
it. Metrics are those of the official script for each file, and the mean F1 of the three, which VILA reports.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vila_ops.config.benchmarks import Pope
from vila_ops.eval.benchmark import Item, LazyTokenizer, MetricValues, Request, Units
from vila_ops.eval.metrics import pope
from vila_ops.eval.official import image_of, records_of
from vila_ops.eval.origins import OfficialFile, Origins
from vila_ops.eval.prompts import requests_of
from vila_ops.eval.rows import ItemRow
from vila_ops.eval.statistics import FloatArray

REVISION = 3
_URL, _LICENCE = "https://github.com/RUCAIBox/POPE, output/coco at the commit of `version`", "MIT"
ORIGINS = Origins(
    files=(
        OfficialFile("coco_pope_random.json", _URL, "1 MB", _LICENCE),
        OfficialFile("coco_pope_popular.json", _URL, "1 MB", _LICENCE),
        OfficialFile("coco_pope_adversarial.json", _URL, "1 MB", _LICENCE),
        OfficialFile(
            "val2014/COCO_val2014_*.jpg",
            "http://images.cocodataset.org/zips/val2014.zip",
            "6 GB",
            "Flickr's terms (images of COCO)",
        ),
    ),
    server="none: scored here",
)
SETS = ("random", "popular", "adversarial")
COUNTS = ("true_positive", "false_positive", "true_negative", "false_negative")
STATISTICS = {"accuracy": pope.accuracy, "precision": pope.precision, "recall": pope.recall, "f1": pope.f1}
STATISTICS |= {"yes_ratio": pope.yes_ratio}
PARSERS: dict[str, Any] = {"official": pope.parse_answer, "corrected": pope.corrected_answer}


def read(source: Path, config: Pope) -> Iterator[Item]:
    """The distinct questions, in the order of the files. Their slices say which files have them.

    Raises ValueError for a file that is missing, faulty, or of another length than its version has.
    """
    lines: dict[tuple[str, str], dict[str, Any]] = {}
    places: dict[tuple[str, str], list[list[Any]]] = {}
    for name in SETS:
        file = source / f"coco_pope_{name}.json"
        records = records_of(file, ("question_id", "image", "text", "label"))
        if config.version and len(records) != (expected := pope.QUESTIONS[config.version][name]):
            raise ValueError(
                f"{file} has {len(records)} questions, and version {config.version} has {expected}: take the file of "
                f"this commit, or set `version`"
            )
        for place, record in enumerate(records):
            key = (record["image"], record["text"])
            if lines.setdefault(key, record)["label"] != record["label"]:
                raise ValueError(
                    f"{file}: {record['text']!r} on {record['image']} has another label than in another file"
                )
            places.setdefault(key, []).append([name, record["question_id"], place])
    for (image, text), record in lines.items():
        yield Item(
            id=f"{image}:{text}",
            group=image,
            parts={"image": (image_of(source / "val2014" / image),), "question": (text,)},
            references={"label": record["label"], "places": places[image, text]},
            answer=record["label"].capitalize(),
            slices=tuple(name for name, *_ in places[image, text]),
        )


def requests(items: Sequence[Item], config: Pope, tokenizer: LazyTokenizer) -> list[Request]:
    """The question of each item."""
    return requests_of(items, config.prompt)


def score(items: Sequence[Item], rows: Sequence[ItemRow], config: Pope) -> list[Mapping[str, float]]:
    """The outcome as one of four counts, by each column; a failed row has the outcome of the wrong answer."""
    labels: dict[str, pope.YesNo] = {item.id: item.references["label"] for item in items}
    return [
        {
            f"{count}_{column}": value
            for column, parse in PARSERS.items()
            for count, value in _outcome(row, labels, parse)
        }
        for row in rows
    ]


def _outcome(row: ItemRow, labels: Mapping[str, pope.YesNo], parse: Any) -> list[tuple[str, float]]:
    def neither(text: str) -> None:
        return None

    counts = pope.count(
        [(row.item, row.answer or "")],
        [(row.item, labels[row.item])],
        parse=neither if row.answer is None else parse,
    )
    return list(zip(COUNTS, counts[0].tolist(), strict=True))


def metrics(items: Sequence[Item], rows: Sequence[ItemRow], config: Pope) -> list[MetricValues]:
    """The script's numbers for each of the three files, and the mean F1 of the files."""
    values = []
    for column in PARSERS:
        for name in SETS:
            of_set = [row for row in rows if name in row.slices]
            counts = _counts(of_set, column)
            values += [
                MetricValues(f"pope_{name}_{measure}_{column}", _units(of_set), counts, statistic)
                for measure, statistic in STATISTICS.items()
            ]
        by_set = [_counts(rows, column) * np.array([[float(name in row.slices)] for row in rows]) for name in SETS]
        values.append(MetricValues(f"pope_f1_{column}", _units(rows), np.concatenate(by_set, axis=1), mean_f1))
    return values


def _units(rows: Sequence[ItemRow]) -> Units:
    """The items without slices: these are metrics of their own, whose questions overlap."""
    return Units(tuple(row.item for row in rows), tuple(row.group for row in rows))


def mean_f1(sums: FloatArray) -> FloatArray:
    """The mean over the three files of F1, from their counts side by side: (..., 12) -> (...)."""
    mean: FloatArray = np.mean([pope.f1(sums[..., 4 * place : 4 * place + 4]) for place in range(len(SETS))], axis=0)
    return mean


def official_files(items: Sequence[Item], rows: Sequence[ItemRow], config: Pope) -> dict[str, bytes]:
    """The answers to each file as the official script reads them: JSON lines in the order of its questions."""
    answers = {row.item: row.answer or "" for row in rows}
    lines: dict[str, list[tuple[int, str]]] = {name: [] for name in SETS}
    for item in items:
        (question,) = item.parts["question"]
        for name, question_id, place in item.references["places"]:
            record = {"question_id": question_id, "question": question, "answer": answers[item.id]}
            lines[name].append((place, json.dumps(record, ensure_ascii=False)))
    return {
        f"coco_pope_{name}_answers.json": "".join(f"{line}\n" for _, line in sorted(of_set)).encode()
        for name, of_set in lines.items()
    }


def _counts(rows: Sequence[ItemRow], column: str) -> FloatArray:
    return np.array([[row.scores[f"{count}_{column}"] for count in COUNTS] for row in rows], float)
