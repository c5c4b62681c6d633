"""ScienceQA: school questions with options, half of them with an image; see `config.benchmarks.ScienceQa`.

Official files, in one folder:

    problems.json, pid_splits.json    questions by id, and the ids of each split
    test/PID/image.png                the images
    train/PID/image.png               those of the train split, for demonstrations

LLaVA and VILA report the accuracy on the questions of test that have an image (SQA-I): `scienceqa_image_official`. The
prompt has LLaVA's form CQM: context, question, options on one line.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vila_ops.config.benchmarks import ScienceQa
from vila_ops.eval.benchmark import Item, LazyTokenizer, MetricValues, Parts, Request, Units
from vila_ops.eval.columns import in_columns, mean_metrics, share_or_zero
from vila_ops.eval.metrics import scienceqa
from vila_ops.eval.official import check_keys, image_of, json_of
from vila_ops.eval.origins import OfficialFile, Origins
from vila_ops.eval.prompts import requests_of
from vila_ops.eval.rows import ItemRow

REVISION = 2
_PAGE, _LICENCE = "https://github.com/lupantech/ScienceQA (data/scienceqa)", "CC BY-NC-SA 4.0"
_IMAGES = "https://scienceqa.s3.us-west-1.amazonaws.com/images/test.zip"
ORIGINS = Origins(
    files=(
        OfficialFile("problems.json", _PAGE, "30 MB", _LICENCE, items=2_017, only={"subset": "image"}),
        OfficialFile("problems.json", _PAGE, "30 MB", _LICENCE, items=4_241, only={"subset": "all"}),
        OfficialFile("pid_splits.json", _PAGE, "1 MB", _LICENCE),
        OfficialFile("test/*/image.png", _IMAGES, "?", _LICENCE),
        OfficialFile("train/*/image.png", _IMAGES.replace("test.zip", "train.zip"), "?", _LICENCE, is_train=True),
    ),
    server="none: scored here",
)


def read(source: Path, config: ScienceQa) -> Iterator[Item]:
    """The questions of test, in the order of its ids. Raises ValueError for a file that is missing or faulty."""
    return _items(source, config, "test")


def train_items(source: Path, config: ScienceQa) -> Iterator[Item]:
    """The questions of train, in the order of its ids. Raises ValueError for a file that is missing or faulty."""
    return _items(source, config, "train")


def _items(source: Path, config: ScienceQa, split: str) -> Iterator[Item]:
    file = source / "problems.json"
    problems, splits = json_of(file), json_of(source / "pid_splits.json")
    check_keys(source / "pid_splits.json", [splits], (split,))
    if foreign := [pid for pid in splits[split] if pid not in problems]:
        raise ValueError(f"{file} has no problem {foreign[0]} of the split; the files are of other versions")
    chosen = {pid: problems[pid] for pid in splits[split]}
    check_keys(file, list(chosen.values()), ("question", "choices", "answer", "hint", "image", "subject", "grade"))
    for pid, problem in chosen.items():
        if not 0 <= problem["answer"] < len(problem["choices"]) <= len(scienceqa.LETTERS):
            raise ValueError(
                f"{file}: problem {pid} has {len(problem['choices'])} choices and answer {problem['answer']}"
            )
        if problem["image"] or config.subset == "all":
            yield _item(pid, problem, source / split / pid)


def _item(pid: str, problem: Mapping[str, Any], folder: Path) -> Item:
    choices, has_image = tuple(problem["choices"]), bool(problem["image"])
    lettered = " ".join(f"({letter}) {choice}" for letter, choice in zip(scienceqa.LETTERS, choices, strict=False))
    image: Parts = (image_of(folder / problem["image"]),) if has_image else ()
    return Item(
        id=pid,
        group=pid,
        parts={
            "image": image,
            "context": (problem["hint"].strip() or "N/A",),
            "question": (problem["question"],),
            "choices": (lettered,),
        },
        options=choices,
        references={"choices": list(choices), "answer": problem["answer"], "has_image": has_image},
        answer=scienceqa.LETTERS[problem["answer"]],
        slices=(f"subject: {problem['subject']}", f"grade: {problem['grade'].removeprefix('grade')}"),
    )


def requests(items: Sequence[Item], config: ScienceQa, tokenizer: LazyTokenizer) -> list[Request]:
    """The question of each item."""
    return requests_of(items, config.prompt)


def score(items: Sequence[Item], rows: Sequence[ItemRow], config: ScienceQa) -> list[Mapping[str, float]]:
    """1 where the answer is right."""
    problems = {item.id: _problem(item) for item in items}
    return [
        {**in_columns(scienceqa.score(problems[row.item], row.answer)), "answered": float(row.answer is not None)}
        for row in rows
    ]


def _problem(item: Item) -> scienceqa.Problem:
    own = item.references
    return scienceqa.Problem(tuple(own["choices"]), own["answer"], own["has_image"])


def metrics(items: Sequence[Item], rows: Sequence[ItemRow], config: ScienceQa) -> list[MetricValues]:
    """The accuracy on the questions with an image, and with all questions also on these.

    In the official column of the former, a question without an answer leaves the subset, as in LLaVA's script.
    """
    has_image = {item.id for item in items if item.references["has_image"]}
    with_image = [row for row in rows if row.item in has_image]
    values = mean_metrics("scienceqa", rows) if config.subset == "all" else []
    if not any(row.scores["answered"] for row in with_image):
        return values
    pairs = np.array([[row.scores["official"], row.scores["answered"]] for row in with_image])
    official = MetricValues("scienceqa_image_official", Units.of(with_image), pairs, share_or_zero)
    return [*values, official, *mean_metrics("scienceqa_image", with_image)[1:]]


def official_files(items: Sequence[Item], rows: Sequence[ItemRow], config: ScienceQa) -> dict[str, bytes]:
    """The results as LLaVA's script writes them: the number of each chosen option, -1 where the answer names none."""
    answers = {row.item: row.answer for row in rows}
    results = {item.id: _chosen(item, answers[item.id]) for item in items}
    correct = sum(results[item.id] == item.references["answer"] for item in items)
    content = {
        "acc": 100 * correct / len(items),
        "correct": correct,
        "count": len(items),
        "results": results,
        "outputs": {item.id: "FAILED" if answers[item.id] is None else answers[item.id] for item in items},
    }
    return {"test_results.json": json.dumps(content, ensure_ascii=False, indent=2).encode()}


def _chosen(item: Item, answer: str | None) -> int:
    letter = None if answer is None else scienceqa.official_letter(answer)
    return scienceqa.LETTERS.index(letter) if letter and letter in scienceqa.LETTERS[: len(item.options)] else -1
