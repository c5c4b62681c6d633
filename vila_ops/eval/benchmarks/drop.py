"""DROP: numbers, dates and spans that follow from a passage; see `config.benchmarks.DropQuestions`.

Official files, in one folder (drop_dataset.zip of AllenAI):

    drop_dataset_dev.json       passages by id: passage and qa_pairs with question, query_id, answer, validated_answers
    drop_dataset_train.json     the same; the first questions are the shots

An answer is read as one span, as lm-evaluation-harness does; see `metrics.drop` for the scores. Prompt and shots are
those of InstructEval. A stop at "." would cut decimals; the prompt stops at the line's end.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from vila_ops.config.benchmarks import DropQuestions
from vila_ops.eval.benchmark import Item, LazyTokenizer, MetricValues, Request
from vila_ops.eval.columns import WRONG, in_columns, mean_metrics
from vila_ops.eval.metrics import drop
from vila_ops.eval.official import check_keys, json_of
from vila_ops.eval.origins import OfficialFile, Origins
from vila_ops.eval.prompts import requests_of
from vila_ops.eval.rows import ItemRow

REVISION = 1
_GIVEN = (
    *("https://s3-us-west-2.amazonaws.com/allennlp/datasets/drop/drop_dataset.zip", "8 MB, with both files"),
    "CC BY-SA 4.0",
)
ORIGINS = Origins(
    files=(
        OfficialFile("drop_dataset_dev.json", *_GIVEN, items=9_536),
        OfficialFile("drop_dataset_train.json", *_GIVEN),
    ),
    server="AllenAI's leaderboard scores test; dev is scored here",
)
_NO_SCORE = drop.DropScores(exact_match=WRONG, f1=WRONG)


def read(source: Path, config: DropQuestions) -> Iterator[Item]:
    """The questions in the order of the file. Raises ValueError."""
    examples = ""
    if config.shots:
        train = source / "drop_dataset_train.json"
        shots = list(islice(_questions(train), config.shots))
        if len(shots) < config.shots:
            raise ValueError(f"{train} has {len(shots)} questions; set shots to at most as many")
        examples = "".join(_example(passage, pair, train) for _, passage, pair in shots)
    file = source / "drop_dataset_dev.json"
    for passage_id, passage, pair in _questions(file):
        truths = _truths(pair, file)
        yield Item(
            id=pair["query_id"],
            group=passage_id,
            parts={"examples": (examples,), "passage": (passage.strip(),), "question": (pair["question"].strip(),)},
            references=truths,
            answer=", ".join(truths[0]),
            slices=(_kind(pair["answer"]),),
        )


def _questions(file: Path) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Id and text of the passage, and the record, of each question."""
    content = json_of(file)
    if not isinstance(content, dict):
        raise ValueError(f"{file} is no object of passages; the file is of another version")
    check_keys(file, list(content.values()), ("passage", "qa_pairs"))
    for passage_id, record in content.items():
        if record["qa_pairs"]:
            check_keys(file, record["qa_pairs"], ("question", "query_id", "answer"))
        for pair in record["qa_pairs"]:
            yield passage_id, record["passage"], pair


def _truths(pair: Mapping[str, Any], file: Path) -> list[list[str]]:
    """The spans of the answer and of each validated answer."""
    try:
        return [list(drop.true_spans(one)) for one in (pair["answer"], *pair.get("validated_answers", ()))]
    except (KeyError, ValueError) as error:
        raise ValueError(f"{file}: question {pair['query_id']}: {error}") from error


def _example(passage: str, pair: Mapping[str, Any], file: Path) -> str:
    answer = ", ".join(_truths(pair, file)[0])
    return f"{passage.strip()} {pair['question'].strip()}\nAnswer: {answer}\n\n"


def _kind(answer: Mapping[str, Any]) -> str:
    if answer.get("number"):
        return "number"
    return ("span" if len(answer["spans"]) == 1 else "spans") if answer.get("spans") else "date"


def requests(items: Sequence[Item], config: DropQuestions, tokenizer: LazyTokenizer) -> list[Request]:
    """The question of each item after its passage and the shots."""
    return requests_of(items, config.prompt)


def score(items: Sequence[Item], rows: Sequence[ItemRow], config: DropQuestions) -> list[Mapping[str, float]]:
    """Exact match and F1 of each answer."""
    truths: dict[str, list[list[str]]] = {item.id: item.references for item in items}
    listed: list[Mapping[str, float]] = []
    for row in rows:
        scores = _NO_SCORE if row.answer is None else drop.score([row.answer], truths[row.item])
        listed.append(in_columns(scores.exact_match, "exact_match") | in_columns(scores.f1, "f1"))
    return listed


def metrics(items: Sequence[Item], rows: Sequence[ItemRow], config: DropQuestions) -> list[MetricValues]:
    """The means of exact match and F1; the type of the answer is a slice."""
    name = f"drop_{config.shots}shot"
    return [*mean_metrics(name, rows, "exact_match"), *mean_metrics(name, rows, "f1")]


def official_files(items: Sequence[Item], rows: Sequence[ItemRow], config: DropQuestions) -> dict[str, bytes]:
    """The predictions as the official `drop_eval.py` reads them: answers by query_id."""
    answers = {row.item: row.answer or "" for row in rows}
    return {"drop_predictions.json": json.dumps({item.id: answers[item.id] for item in items}, indent=1).encode()}
