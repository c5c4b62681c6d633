"""MM-Vet: open answers that a judge grades from 0 to 1; see `config.benchmarks.MmVet`.

Official files, in one folder (mm-vet.zip, and the notebook of yuweihao/MM-Vet):

    mm-vet.json                 by id: imagename, question, answer (with <AND> and <OR>) and capability
    images/*
    mm-vet_evaluator.ipynb      has the judge's prompt as the string `prompt`; nothing in it is run

The metric is the mean grade of one run, as in the notebook; the paper's is the mean of five. Its slices are the
capabilities and their combinations. A reply that is no grade is left out. A failed answer is graded as an empty one,
unless it is left out.
"""

import ast
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vila_ops.config.benchmarks import MmVet
from vila_ops.eval.benchmark import GenerateRequest, Item, LazyTokenizer, MetricValues, Request
from vila_ops.eval.columns import mean_metric
from vila_ops.eval.judge import judge_request, judged_by, readable
from vila_ops.eval.metrics.judged import grade
from vila_ops.eval.official import check_keys, image_of, json_of
from vila_ops.eval.origins import OfficialFile, Origins
from vila_ops.eval.prompts import requests_of
from vila_ops.eval.rows import ItemRow

REVISION = 1
NOTEBOOK = "mm-vet_evaluator.ipynb"
_GIVEN = "https://github.com/yuweihao/MM-Vet/releases/download/v1/mm-vet.zip", "?", "CC BY-NC 4.0"
ORIGINS = Origins(
    files=(
        OfficialFile("mm-vet.json", *_GIVEN, items=218),
        OfficialFile("images/*", *_GIVEN),
        OfficialFile(NOTEBOOK, "https://github.com/yuweihao/MM-Vet", "?", "Apache-2.0"),
    ),
    server="none: a judge of your own scores; the paper's is gpt-4-0613",
)


def read(source: Path, config: MmVet) -> Iterator[Item]:
    """The questions in the order of the file. Raises ValueError."""
    prompt = judge_prompt(source / NOTEBOOK)
    file = source / "mm-vet.json"
    content = json_of(file)
    if not isinstance(content, dict):
        raise ValueError(f"{file} is no object of questions; the file is of another version")
    check_keys(file, list(content.values()), ("imagename", "question", "answer", "capability"))
    for id_, record in content.items():
        capabilities = sorted(set(record["capability"]))
        yield Item(
            id=id_,
            group=record["imagename"],
            parts={"image": (image_of(source / "images" / record["imagename"]),), "question": (record["question"],)},
            references={"answer": record["answer"], "prompt": prompt},
            answer=record["answer"],
            slices=tuple(dict.fromkeys((*capabilities, "+".join(capabilities)))),
        )


def judge_prompt(file: Path) -> str:
    """The string that a cell of the official notebook assigns to `prompt`; the cell is parsed and not run."""
    notebook = json_of(file)
    cells = notebook.get("cells", []) if isinstance(notebook, dict) else []
    for source in ("".join(cell.get("source", ())) for cell in cells if cell.get("cell_type") == "code"):
        try:
            statements = ast.parse(source).body
        except SyntaxError:  # a cell with a command of the shell
            continue
        for one in statements:
            if (
                isinstance(one, ast.Assign)
                and [getattr(target, "id", None) for target in one.targets] == ["prompt"]
                and isinstance(one.value, ast.Constant)
                and isinstance(one.value.value, str)
            ):
                return one.value.value
    raise ValueError(f"{file} assigns no text to `prompt` in any cell; the file is of another version")


def requests(items: Sequence[Item], config: MmVet, tokenizer: LazyTokenizer) -> list[Request]:
    """The question of each item."""
    return requests_of(items, config.prompt)


def judge_requests(items: Sequence[Item], rows: Sequence[ItemRow], config: MmVet) -> list[GenerateRequest]:
    """Question, truth and answer of each row as the last line of the official prompt's table."""
    assert config.judge is not None
    by_id = {item.id: item for item in items}
    return [judge_request(row, config.judge, _graded(by_id[row.item], row.answer or "")) for row in rows]


def _graded(item: Item, answer: str) -> str:
    (question,) = item.parts["question"]
    truth = item.references["answer"].replace("<AND>", " <AND> ").replace("<OR>", " <OR> ")
    return f"{item.references['prompt']}\n{question} | {truth} | {answer} | "


def score(items: Sequence[Item], rows: Sequence[ItemRow], config: MmVet) -> list[Mapping[str, float]]:
    """The grade; nothing where the judge gave none."""
    grades = readable(rows, grade)
    return [{"grade": grades[row.item]} if row.item in grades else {} for row in rows]


def metrics(items: Sequence[Item], rows: Sequence[ItemRow], config: MmVet) -> list[MetricValues]:
    """The mean grade over the graded answers; none if no answer is."""
    graded = [row for row in rows if row.scores]
    if config.judge is None or not graded:
        return []
    name = f"mm_vet_{judged_by(config.judge, [item.references['prompt'] for item in items])}"
    return [mean_metric(name, graded, "grade")]


def official_files(items: Sequence[Item], rows: Sequence[ItemRow], config: MmVet) -> dict[str, bytes]:
    """The answers by id that the notebook reads, and with a judge the grades that it writes."""
    row_of = {row.item: row for row in rows}
    files = {"vila-ops.json": _json({item.id: row_of[item.id].answer or "" for item in items})}
    if config.judge is not None:
        model = config.judge.model
        grades = readable(rows, grade)
        files["vila-ops-grade-1runs.json"] = _json(
            {
                item.id: {"model": [model], "content": [row_of[item.id].judge_reply], "score": [grades[item.id]]}
                for item in items
                if item.id in grades
            }
        )
    return files


def _json(content: Any) -> bytes:
    return json.dumps(content, indent=4, ensure_ascii=False).encode()
