"""AI2D: choice among answers about a diagram; see `config.benchmarks.Ai2d`.

Official file: AI2D_TEST.tsv or AI2D_TEST_NO_MASK.tsv of VLMEvalKit, with the columns index, question, A, B, ..., answer
and image (base64, or the index of the row that has the same image). Both numbers are in use under the same name, so
`masked` or `shown` is part of the metric's.

The columns are the letter rules of VLMEvalKit without a judge (official) and ours; see `metrics.letters`. The result is
the table that VLMEvalKit writes and scores.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from vila_ops.config.benchmarks import Ai2d
from vila_ops.eval.benchmark import Item, LazyTokenizer, MetricValues, Request
from vila_ops.eval.columns import in_columns, mean_metrics
from vila_ops.eval.metrics.columns import right
from vila_ops.eval.metrics.letters import corrected_letter, vlmeval_letter
from vila_ops.eval.official import image_in_base64, table_of
from vila_ops.eval.origins import OfficialFile, Origins
from vila_ops.eval.prompts import requests_of
from vila_ops.eval.rows import ItemRow
from vila_ops.eval.xlsx import xlsx

REVISION = 2
FILES = {"masked": "AI2D_TEST.tsv", "shown": "AI2D_TEST_NO_MASK.tsv"}
_URL, _LICENCE = "https://opencompass.openxlab.space/utils/VLMEval/", "? (diagrams of AllenAI's AI2D)"
ORIGINS = Origins(
    files=tuple(
        OfficialFile(name, _URL + name, "?", _LICENCE, items=3_088, only={"labels": labels})
        for labels, name in FILES.items()
    ),
    server="none: scored here",
)
LETTERS = "ABCDEFGH"
_LONGEST_INDEX = 64
"""An image of fewer characters is the index of another row, as in VLMEvalKit."""


def read(source: Path, config: Ai2d) -> Iterator[Item]:
    """The questions in the order of the file; options end at the first empty one. Raises ValueError."""
    file = source / FILES[config.labels]
    rows = table_of(file, ("index", "question", "A", "B", "answer", "image"))
    images = {row["index"]: row["image"] for row in rows}
    for row in rows:
        index = row["index"]
        options: list[str] = []
        for letter in LETTERS:
            if not row.get(letter):
                break
            options.append(row[letter])
        if row["answer"] not in LETTERS[: len(options)]:
            raise ValueError(f"{file}: row {index} has the answer {row['answer']!r}, which is none of its options")
        shown = row["image"] if len(row["image"]) <= _LONGEST_INDEX else index
        yield Item(
            id=index,
            group=shown,
            parts={
                "image": (image_in_base64(images.get(shown, ""), f"image of row {shown}"),),
                "question": (row["question"],),
            },
            options=tuple(options),
            references=row["answer"],
            answer=row["answer"],
        )


def requests(items: Sequence[Item], config: Ai2d, tokenizer: LazyTokenizer) -> list[Request]:
    """The question of each item with its options."""
    return requests_of(items, config.prompt)


def score(items: Sequence[Item], rows: Sequence[ItemRow], config: Ai2d) -> list[Mapping[str, float]]:
    """1 where the letter that is read is the right one, else 0."""
    by_id = {item.id: item for item in items}
    return [_outcome(by_id[row.item], row.answer or "") for row in rows]


def _outcome(item: Item, answer: str) -> dict[str, float]:
    options = dict(zip(LETTERS, item.options, strict=False))
    official, corrected = vlmeval_letter(answer, options), corrected_letter(answer, options)
    return in_columns(right(official == item.references, corrected == item.references))


def metrics(items: Sequence[Item], rows: Sequence[ItemRow], config: Ai2d) -> list[MetricValues]:
    """The share of right answers."""
    return mean_metrics(f"ai2d_{config.labels}", rows)


def official_files(items: Sequence[Item], rows: Sequence[ItemRow], config: Ai2d) -> dict[str, bytes]:
    """The table of VLMEvalKit: the rows of the file without images, and with a column of predictions."""
    answers = {row.item: row.answer or "" for row in rows}
    letters = LETTERS[: max((len(item.options) for item in items), default=0)]
    table: list[list[str | int]] = [
        [
            int(item.id) if item.id.isdecimal() else item.id,
            *map(str, item.parts["question"]),
            *(item.options + ("",) * (len(letters) - len(item.options))),
            item.references,
            answers[item.id],
        ]
        for item in items
    ]
    header = ["index", "question", *letters, "answer", "prediction"]
    return {Path(FILES[config.labels]).stem + ".xlsx": xlsx([header, *table])}
