"""LLaVA-Bench (in the Wild): a judge compares long answers with a reference's; see `config.benchmarks.LlavaBench`.

Official files, in one folder (liuhaotian/llava-bench-in-the-wild, and rule.json of LLaVA's llava/eval/table):

    questions.jsonl         question_id, image, category and text; 60 questions on 24 images
    context.jsonl           image and caption: what the judge is told of the image
    answers_gpt4.jsonl      question_id and text: the reference's answers
    rule.json               the judge's prompt for each category
    images/*.jpg

The judge scores both answers from 1 to 10, the reference first. The relative score is the sum of the model's scores by
that of the reference's, over the questions with two scores; a reply without them is left out, where LLaVA's script
averages (-1, -1). A failed answer is judged as an empty one, unless it is left out. Different judges, prompts and
temperatures are different metrics.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vila_ops.config.benchmarks import LlavaBench
from vila_ops.eval.benchmark import GenerateRequest, Item, LazyTokenizer, MetricValues, Request, Units
from vila_ops.eval.judge import judge_request, judged_by, readable
from vila_ops.eval.metrics.judged import score_pair
from vila_ops.eval.official import image_of, json_of, records_of
from vila_ops.eval.origins import OfficialFile, Origins
from vila_ops.eval.prompts import requests_of
from vila_ops.eval.rows import ItemRow

REVISION = 1
_HUB, _LICENCE = "liuhaotian/llava-bench-in-the-wild", "Apache-2.0"
_URL = f"https://huggingface.co/datasets/{_HUB}"
ORIGINS = Origins(
    files=(
        OfficialFile("questions.jsonl", _URL, "8 kB", _LICENCE, items=60, hub=f"{_HUB}/questions.jsonl"),
        OfficialFile("context.jsonl", _URL, "8 kB", _LICENCE, hub=f"{_HUB}/context.jsonl"),
        OfficialFile("answers_gpt4.jsonl", _URL, "47 kB", _LICENCE, hub=f"{_HUB}/answers_gpt4.jsonl"),
        OfficialFile("images/*.jpg", _URL, "10 MB", _LICENCE, hub=f"{_HUB}/images/*.jpg"),
        OfficialFile(
            "rule.json",
            *("https://github.com/haotian-liu/LLaVA/blob/main/llava/eval/table/rule.json", "?", _LICENCE),
        ),
    ),
    server="none: a judge of your own scores; the first one, gpt-4-0314, was shut down on 2026-03-26",
    revision="9773b6fd2be88d4ced480dcd9bfd4ce76e47f79b",
)


def read(source: Path, config: LlavaBench) -> Iterator[Item]:
    """The questions in the order of the file. Raises ValueError, also for one without reference, context or rule."""
    rules = json_of(source / "rule.json")
    contexts = {one["image"]: one for one in records_of(source / "context.jsonl", ("image", "caption"))}
    references = {one["question_id"]: one for one in records_of(source / "answers_gpt4.jsonl", ("question_id", "text"))}
    file = source / "questions.jsonl"
    for question in records_of(file, ("question_id", "image", "category", "text")):
        id_, image, category = question["question_id"], question["image"], f"llava_bench_{question['category']}"
        for name, has in (("answers_gpt4.jsonl", id_ in references), ("context.jsonl", image in contexts)):
            if not has:
                raise ValueError(f"{source / name} has nothing for question {id_}; the files are of several versions")
        if category not in rules:
            raise ValueError(f"{source / 'rule.json'} has no rule {category!r}, which question {id_} needs")
        caption = contexts[image]["caption"]
        yield Item(
            id=str(id_),
            group=image,
            parts={"image": (image_of(source / "images" / image),), "question": (question["text"],)},
            references={
                "question_id": id_,
                "answer": references[id_]["text"],
                "answer_id": references[id_].get("answer_id", id_),
                "context": caption if isinstance(caption, str) else "\n".join(caption),
                "category": category,
                **{key: rules[category][key] for key in ("role", "prompt")},
            },
            answer=references[id_]["text"],
            slices=(question["category"],),
        )


def requests(items: Sequence[Item], config: LlavaBench, tokenizer: LazyTokenizer) -> list[Request]:
    """The question of each item."""
    return requests_of(items, config.prompt)


def judge_requests(items: Sequence[Item], rows: Sequence[ItemRow], config: LlavaBench) -> list[GenerateRequest]:
    """Context, question and both answers of each row, the reference's first, as LLaVA's script writes them."""
    assert config.judge is not None
    by_id = {item.id: item for item in items}
    return [judge_request(row, config.judge, _judge_prompt(by_id[row.item], row.answer or "")) for row in rows]


def _judge_prompt(item: Item, answer: str) -> str:
    told, (question,) = item.references, item.parts["question"]
    parts = [f"[Context]\n{told['context']}", f"[Question]\n{question}"]
    for number, text in enumerate((told["answer"], answer), 1):
        name = f"{told['role']} {number}"
        parts += [f"[{name}]\n{text}", f"[End of {name}]"]
    return "".join(f"{part}\n\n" for part in (*parts, f"[System]\n{told['prompt']}"))


def score(items: Sequence[Item], rows: Sequence[ItemRow], config: LlavaBench) -> list[Mapping[str, float]]:
    """The scores of both answers; nothing where the judge gave none."""
    pairs = readable(rows, score_pair)
    return [dict(zip(("reference", "model"), pairs.get(row.item, ()), strict=False)) for row in rows]


def metrics(items: Sequence[Item], rows: Sequence[ItemRow], config: LlavaBench) -> list[MetricValues]:
    """The relative score over the judged questions; none if no question is."""
    scored = [row for row in rows if row.scores]
    if config.judge is None or not scored:
        return []
    name = f"llava_bench_{judged_by(config.judge, [item.references['prompt'] for item in items])}"
    values = np.array([[row.scores["model"], row.scores["reference"]] for row in scored])
    return [MetricValues(name, Units.of(scored), values, "ratio")]


def official_files(items: Sequence[Item], rows: Sequence[ItemRow], config: LlavaBench) -> dict[str, bytes]:
    """The answers file that LLaVA's script reads, and with a judge the reviews that it writes."""
    row_of = {row.item: row for row in rows}
    files = {"answers.jsonl": _lines([_answer(item, row_of[item.id]) for item in items])}
    if config.judge is not None:
        reviews = [_review(number, item, row_of[item.id]) for number, item in enumerate(items, 1)]
        files["reviews.jsonl"] = _lines([review for review in reviews if review["content"] is not None])
    return files


def _answer(item: Item, row: ItemRow) -> dict[str, Any]:
    (question,) = item.parts["question"]
    own = {"question_id": item.references["question_id"], "prompt": question, "text": row.answer or ""}
    return {**own, "answer_id": item.id, "model_id": "vila-ops", "metadata": {}}


def _review(number: int, item: Item, row: ItemRow) -> dict[str, Any]:
    told = item.references
    return {
        "id": number,
        "question_id": told["question_id"],
        "answer1_id": told["answer_id"],
        "answer2_id": item.id,
        "category": told["category"],
        "content": row.judge_reply,
        "tuple": list(score_pair(row.judge_reply or "") or (-1, -1)),
    }


def _lines(records: Sequence[Mapping[str, Any]]) -> bytes:
    return "".join(f"{json.dumps(record, ensure_ascii=False)}\n" for record in records).encode()
