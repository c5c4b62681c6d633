"""OK-VQA: questions on COCO's images that need knowledge; see `config.benchmarks.OkVqa`.

Official files, in one folder:

    OpenEnded_mscoco_val2014_questions.json, mscoco_val2014_annotations.json
        in the format of VQA, each answer stemmed in `answer` and as it was given in `raw_answer`
    val2014/COCO_val2014_*.jpg
        the images, from COCO
    OpenEnded_mscoco_train2014_questions.json, mscoco_train2014_annotations.json, train2014/COCO_train2014_*.jpg
        those of the train split, for demonstrations

Papers score in several ways, which give other numbers: `okvqa_official` and `okvqa_corrected` as VQAv2 is scored,
`okvqa_lavis` by the evaluator of BLIP-2, and with a pipeline of spaCy `okvqa_lavis_lemmatised[PIPELINE-VERSION]` on the
lemmatised answer. A baseline stands beside its own variant only.
"""

import functools
import importlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vila_ops.config.benchmarks import OkVqa
from vila_ops.eval.benchmark import Item, LazyTokenizer, MetricValues, Request
from vila_ops.eval.benchmarks.vqav2 import COCO_TRAIN2014, COCO_VAL2014, items_of_vqa, results
from vila_ops.eval.columns import WRONG, in_columns, mean_metric, mean_metrics
from vila_ops.eval.metrics import okvqa, vqa
from vila_ops.eval.origins import OfficialFile, Origins
from vila_ops.eval.prompts import requests_of
from vila_ops.eval.rows import ItemRow

REVISION = 1
_PAGE, _LICENCE = "https://okvqa.allenai.org/download.html", "CC BY 4.0 (questions, answers)"
ORIGINS = Origins(
    files=(
        OfficialFile("OpenEnded_mscoco_val2014_questions.json", _PAGE, "1 MB", _LICENCE, items=5_046),
        OfficialFile("mscoco_val2014_annotations.json", _PAGE, "1 MB", _LICENCE),
        OfficialFile(COCO_VAL2014.path, COCO_VAL2014.url, COCO_VAL2014.size, COCO_VAL2014.licence),
        OfficialFile("OpenEnded_mscoco_train2014_questions.json", _PAGE, "1 MB", _LICENCE, is_train=True),
        OfficialFile("mscoco_train2014_annotations.json", _PAGE, "2 MB", _LICENCE, is_train=True),
        COCO_TRAIN2014,
    ),
    server="none: scored here",
)


def read(source: Path, config: OkVqa) -> Iterator[Item]:
    """The questions of val2014, in their order. Raises ValueError for a file that is missing or faulty."""
    return _items(source, "val2014")


def train_items(source: Path, config: OkVqa) -> Iterator[Item]:
    """The questions of train2014, in their order. Raises ValueError for a file that is missing or faulty."""
    return _items(source, "train2014")


def _items(source: Path, split: str) -> Iterator[Item]:
    questions = source / f"OpenEnded_mscoco_{split}_questions.json"
    return items_of_vqa(questions, source / f"mscoco_{split}_annotations.json", split)


def requests(items: Sequence[Item], config: OkVqa, tokenizer: LazyTokenizer) -> list[Request]:
    """The question of each item."""
    return requests_of(items, config.prompt)


def score(items: Sequence[Item], rows: Sequence[ItemRow], config: OkVqa) -> list[Mapping[str, float]]:
    """The accuracy of each answer by each variant."""
    human = {item.id: item.references["answers"] for item in items}
    return [_score(row.answer, human[row.item], config) for row in rows]


def _score(answer: str | None, human: Sequence[vqa.HumanAnswer], config: OkVqa) -> Mapping[str, float]:
    scores = dict(in_columns(WRONG if answer is None else vqa.score(answer, human)))
    scores["lavis"] = 0.0 if answer is None else okvqa.lavis_score(answer, human)
    if config.spacy_pipeline is not None:
        analyse = _pipeline(config.spacy_pipeline)
        lemmatised = "" if answer is None else okvqa.lemmatised(answer, analyse)
        scores["lavis_lemmatised"] = 0.0 if answer is None else okvqa.lavis_score(lemmatised, human)
    return scores


@functools.cache
def _pipeline(name: str) -> Any:
    """A pipeline of spaCy that is installed. Raises ValueError."""
    try:
        return importlib.import_module("spacy").load(name)
    except (ImportError, OSError) as error:
        raise ValueError(
            f"the pipeline {name!r} of spaCy is not installed ({error}); install spacy and the pipeline's package, or "
            f"set spacy_pipeline: null"
        ) from error


def metrics(items: Sequence[Item], rows: Sequence[ItemRow], config: OkVqa) -> list[MetricValues]:
    """The mean accuracy by each variant."""
    values = mean_metrics("okvqa", rows)
    values.append(mean_metric("okvqa_lavis", rows, "lavis"))
    if config.spacy_pipeline is not None:
        name = okvqa.lemmatised_variant(_pipeline(config.spacy_pipeline).meta)
        values.append(mean_metric(name, rows, "lavis_lemmatised"))
    return values


def official_files(items: Sequence[Item], rows: Sequence[ItemRow], config: OkVqa) -> dict[str, bytes]:
    """The results as the official code reads them."""
    return {"OpenEnded_mscoco_val2014_vila_results.json": results(items, {row.item: row.answer or "" for row in rows})}
