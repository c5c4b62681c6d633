"""BIG-Bench Hard: 23 tasks of reasoning (27 files); see `config.benchmarks.Bbh`.

Official files, in one folder (suzgunmirac/BIG-Bench-Hard):

    bbh/TASK.json               examples: input and target
    cot-prompts/TASK.txt        two lines of notice, then the task's description and three worked examples

The direct style shows the same examples with their answer in place of the steps to it, as open-instruct derives them,
but without the full stop that ends the statement. Metrics name the style; the macro mean, over the files, is the one
that the paper prints. No script of the authors reads predictions: the result files are those of open-instruct.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from vila_ops.config.benchmarks import Bbh
from vila_ops.eval.benchmark import Item, LazyTokenizer, MetricValues, Request
from vila_ops.eval.columns import WRONG, in_columns, macro_metrics, mean_metrics
from vila_ops.eval.metrics import bbh
from vila_ops.eval.official import check_keys, json_of, text_of
from vila_ops.eval.origins import OfficialFile, Origins
from vila_ops.eval.prompts import requests_of
from vila_ops.eval.rows import ItemRow

REVISION = 2
_URL, _LICENCE = "https://github.com/suzgunmirac/BIG-Bench-Hard", "MIT"
ORIGINS = Origins(
    files=(
        OfficialFile("bbh/*.json", _URL, "?", _LICENCE, items=6_511),
        OfficialFile("cot-prompts/*.txt", _URL, "?", _LICENCE),
    ),
    server="none: scored here",
)
_NOTICE = re.compile(r"\A.*\n-+\n")
_STEPS = re.compile(r"\nA: .*?So the answer is (.*?)\.?\s*\Z", re.DOTALL)


def read(source: Path, config: Bbh) -> Iterator[Item]:
    """The questions of all tasks in alphabetical order. Raises ValueError."""
    files = sorted((source / "bbh").glob("*.json"))
    if not files:
        raise ValueError(f"{source}/bbh has no TASK.json; `vila-ops benchmark list` says where they come from")
    for file in files:
        content = json_of(file)
        records = content.get("examples", []) if isinstance(content, dict) else []
        check_keys(file, records, ("input", "target"))
        examples = worked_examples(source / "cot-prompts" / f"{file.stem}.txt", config)
        for number, record in enumerate(records):
            yield Item(
                id=f"{file.stem}-{number}",
                group=f"{file.stem}-{number}",
                parts={"examples": (examples,), "question": (record["input"],)},
                references=record["target"],
                answer=record["target"],
                slices=(file.stem,),
            )


def worked_examples(file: Path, config: Bbh) -> str:
    """A task's description and examples in the style of the config. Raises ValueError for another format."""
    text = _NOTICE.sub("", text_of(file)).strip()
    if config.style == "chain_of_thought":
        return text
    description, *examples = text.split("\n\nQ: ")
    direct = [_STEPS.sub(r"\nA: \1", example) for example in examples]
    if not examples or any(one == before for one, before in zip(direct, examples, strict=True)):
        raise ValueError(f'{file} has an example without "A:" and "So the answer is"; fetch the file again')
    return "\n\nQ: ".join([description, *direct])


def requests(items: Sequence[Item], config: Bbh, tokenizer: LazyTokenizer) -> list[Request]:
    """The question of each item after its task's examples."""
    return requests_of(items, config.prompt)


def score(items: Sequence[Item], rows: Sequence[ItemRow], config: Bbh) -> list[Mapping[str, float]]:
    """1 where the answer is the target, else 0."""
    targets: dict[str, str] = {item.id: item.references for item in items}
    return [
        in_columns(WRONG if row.answer is None else bbh.score(row.answer, targets[row.item], prompt=config.style))
        for row in rows
    ]


def metrics(items: Sequence[Item], rows: Sequence[ItemRow], config: Bbh) -> list[MetricValues]:
    """The share of right answers over all questions, and its mean over the tasks."""
    return [*mean_metrics(f"bbh_{config.style}", rows), *macro_metrics(f"bbh_{config.style}", rows)]


def official_files(items: Sequence[Item], rows: Sequence[ItemRow], config: Bbh) -> dict[str, bytes]:
    """TASK.jsonl as open-instruct's `run_eval.py` writes it: the records of the file with the answer as prediction."""
    answers = {row.item: row.answer or "" for row in rows}
    lines: dict[str, list[str]] = {}
    for item in items:
        (task,), (question,) = item.slices, item.parts["question"]
        record = {"input": question, "target": item.references, "prediction": answers[item.id]}
        lines.setdefault(task, []).append(json.dumps(record, ensure_ascii=False) + "\n")
    return {f"{task}.jsonl": "".join(of_task).encode() for task, of_task in lines.items()}
