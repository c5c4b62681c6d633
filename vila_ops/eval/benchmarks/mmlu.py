"""MMLU: choice among four answers in 57 subjects; see `config.benchmarks.Mmlu`.

Official files, in one folder (data.tar of hendrycks/test):

    test/SUBJECT_test.csv, dev/SUBJECT_dev.csv      question, four options and the letter; no header

The answer is the letter with the highest likelihood after "Answer:", after the first `shots` questions of the dev file
(official). A prompt that generates gives other numbers, which are named `generated`: there the first character counts
(official), or the letter that `letters.corrected_letter` reads. The official total is the mean over all questions
(micro); macro is that over the subjects.
"""

import csv
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from vila_ops.config.benchmarks import GenerateAnswer, Mmlu
from vila_ops.eval.benchmark import Item, LazyTokenizer, MetricValues, Request
from vila_ops.eval.columns import WRONG, in_columns, macro_metrics, mean_metrics, named
from vila_ops.eval.metrics import mmlu
from vila_ops.eval.metrics.columns import Columns, right
from vila_ops.eval.metrics.letters import corrected_letter, first_letter
from vila_ops.eval.official import text_of
from vila_ops.eval.origins import OfficialFile, Origins
from vila_ops.eval.prompts import requests_of
from vila_ops.eval.rows import ItemRow

REVISION = 2
_GIVEN = "https://people.eecs.berkeley.edu/~hendrycks/data.tar", "166 MB, with all splits", "MIT"
ORIGINS = Origins(
    files=(
        OfficialFile("test/*_test.csv", *_GIVEN, items=14_042),
        OfficialFile("dev/*_dev.csv", *_GIVEN),
    ),
    server="none: scored here",
)
LETTERS = "ABCD"
COLUMNS = len(LETTERS) + 2


def read(source: Path, config: Mmlu) -> Iterator[Item]:
    """The questions of all subjects in alphabetical order. Raises ValueError."""
    files = sorted((source / "test").glob("*_test.csv"))
    if not files:
        raise ValueError(f"{source}/test has no SUBJECT_test.csv; `vila-ops benchmark list` says where they come from")
    for file in files:
        subject = file.name.removesuffix("_test.csv")
        shots = _rows(source / "dev" / f"{subject}_dev.csv")[: config.shots] if config.shots else []
        if len(shots) < config.shots:
            raise ValueError(f"{source}/dev/{subject}_dev.csv has {len(shots)} questions; set shots to at most as many")
        for number, row in enumerate(_rows(file)):
            question, *options, answer = row
            yield Item(
                id=f"{subject}-{number}",
                group=f"{subject}-{number}",
                parts={
                    "subject": (f" {subject.replace('_', ' ')}",),
                    "examples": ("".join(_example(shot) for shot in shots),),
                    "question": (question,),
                },
                options=tuple(options),
                references=LETTERS.index(answer),
                answer=answer,
                slices=(subject,),
            )


def _rows(file: Path) -> list[list[str]]:
    rows = list(csv.reader(io.StringIO(text_of(file), newline="")))
    for number, row in enumerate(rows, 1):
        if len(row) != COLUMNS or row[-1] not in tuple(LETTERS):
            raise ValueError(
                f"{file}: row {number} has {len(row)} columns and ends in {row[-1:]}; it needs a question, four "
                f"options and a letter: fetch the file again"
            )
    return rows


def _example(row: Sequence[str]) -> str:
    """A question with its answer, as the official prompt shows it."""
    question, *options, answer = row
    lines = [f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=True)]
    return "\n".join([question, *lines, f"Answer: {answer}\n\n"])


def requests(items: Sequence[Item], config: Mmlu, tokenizer: LazyTokenizer) -> list[Request]:
    """The question of each item after those of the dev file."""
    return requests_of(items, config.prompt)


def score(items: Sequence[Item], rows: Sequence[ItemRow], config: Mmlu) -> list[Mapping[str, float]]:
    """1 where the likeliest, or the generated, letter is right, else 0; corrected: letters that tie share the point."""
    by_id = {item.id: item for item in items}
    return [in_columns(_score(row, by_id[row.item])) for row in rows]


def _score(row: ItemRow, item: Item) -> Columns:
    if row.answer is None:
        return WRONG
    if row.response.nats:
        return mmlu.score([-nats for nats in row.response.nats], item.references, item=item.id)
    truth, options = LETTERS[item.references], dict(zip(LETTERS, item.options, strict=True))
    return right(first_letter(row.answer) == truth, corrected_letter(row.answer, options) == truth)


def metrics(items: Sequence[Item], rows: Sequence[ItemRow], config: Mmlu) -> list[MetricValues]:
    """The share of right answers over all questions, and its mean over the subjects."""
    how = "generated" if isinstance(config.prompt.answer, GenerateAnswer) else ""
    name = named("mmlu", f"{config.shots}shot", how)
    return [*mean_metrics(name, rows), *macro_metrics(name, rows)]


def official_files(items: Sequence[Item], rows: Sequence[ItemRow], config: Mmlu) -> dict[str, bytes]:
    """SUBJECT.csv as the official `evaluate.py` writes it: the question, whether it is right, and probabilities."""
    row_of = {row.item: row for row in rows}
    tables: dict[str, list[list[str]]] = {}
    for item in items:
        row, (subject,) = row_of[item.id], item.slices
        letter = LETTERS[item.references]
        right_or_not = str(bool(row.scores.get("official")))
        own = [*item.parts["question"], *item.options, letter, right_or_not, *_probabilities(row.response.nats)]
        tables.setdefault(subject, []).append([str(value) for value in own])
    return {f"{subject}.csv": _csv(table) for subject, table in tables.items()}


def _probabilities(nats: Sequence[float]) -> list[float]:
    """The softmax over the letters; nothing where no likelihood was asked for."""
    weights = [math.exp(min(nats) - one) for one in nats]
    return [weight / sum(weights) for weight in weights]


def _csv(table: Sequence[Sequence[str]]) -> bytes:
    text = io.StringIO()
    header = [*map(str, range(COLUMNS)), "vila-ops_correct", *(f"vila-ops_choice{one}_probs" for one in LETTERS)]
    csv.writer(text, lineterminator="\n").writerows([header, *table])
    return text.getvalue().encode()
