"""SEED-Bench: choice among four answers; see `config.benchmarks.SeedBench`.

Official files, in one folder:

    SEED-Bench.json                                     questions, and question_type with the names of their types
    SEED-Bench-image/DATA_ID                            the images, as the archive has them
    SEED-Bench-video-image/TYPE_QUESTION.png            the middle frame of each video, by LLaVA's
                                                        extract_video_frames.py (subset total only)

LLaVA's script takes an answer that equals the letter (official); lmms-eval the first character (first_letter). The
image-only number of lmms-eval and the total of LLaVA are different metrics.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vila_ops.config.benchmarks import SeedBench
from vila_ops.eval.benchmark import Item, LazyTokenizer, MetricValues, Request
from vila_ops.eval.columns import mean_metric, named
from vila_ops.eval.metrics.letters import corrected_letter, exact_letter, first_letter
from vila_ops.eval.official import check_keys, image_of, json_of
from vila_ops.eval.origins import OfficialFile, Origins
from vila_ops.eval.prompts import requests_of
from vila_ops.eval.rows import ItemRow

REVISION = 2
_HUB = "AILab-CVC/SEED-Bench"
_URL, _LICENCE = f"https://huggingface.co/datasets/{_HUB}", "CC BY-NC 4.0"
_FRAMES = "https://github.com/haotian-liu/LLaVA (scripts/extract_video_frames.py), from the videos that the file names"
ORIGINS = Origins(
    files=(
        *(
            OfficialFile(
                *("SEED-Bench.json", _URL, "9 MB", _LICENCE),
                items=items,
                only={"subset": subset},
                hub=f"{_HUB}/SEED-Bench.json",
            )
            for subset, items in (("image", 14_233), ("total", 19_242))
        ),
        OfficialFile("SEED-Bench-image/*", _URL, "1.7 GB", _LICENCE, hub=f"{_HUB}/SEED-Bench-image.zip"),
        OfficialFile("SEED-Bench-video-image/*.png", _FRAMES, "?", "those of the videos", only={"subset": "total"}),
    ),
    server="a leaderboard on the hub; scored here",
    revision="41fcc42395aa5693f5b197bf7b2b65ee33c2dde5",
)
LETTERS = "ABCD"
_KEYS = ("question_id", "question", "answer", "data_type", "data_id", "question_type_id")
_CHOICES = ("choice_a", "choice_b", "choice_c", "choice_d")
_RULES = ("official", "first_letter", "corrected")


def read(source: Path, config: SeedBench) -> Iterator[Item]:
    """The questions on images, or all, in the order of the file. Raises ValueError."""
    file = source / "SEED-Bench.json"
    content = json_of(file)
    if not isinstance(content, dict) or not {"questions", "question_type"} <= content.keys():
        raise ValueError(f"{file} has no questions and question_type; the file is of another version")
    questions: list[dict[str, Any]] = content["questions"]
    check_keys(file, questions, (*_KEYS, *_CHOICES))
    names = {number: name for name, number in content["question_type"].items()}
    for question in questions:
        is_image = question["data_type"] == "image"
        if question["answer"] not in LETTERS:
            raise ValueError(f"{file}: question {question['question_id']} has the answer {question['answer']!r}")
        if not is_image and config.subset == "image":
            continue
        image = _image_path(question)
        yield Item(
            id=str(question["question_id"]),
            group=image,
            parts={"image": (image_of(source / image),), "question": (question["question"],)},
            options=tuple(str(question[choice]) for choice in _CHOICES),
            references={"answer": question["answer"], "question_id": question["question_id"]},
            answer=question["answer"],
            slices=("image" if is_image else "video", names.get(question["question_type_id"], "unknown type")),
        )


def _image_path(question: Mapping[str, Any]) -> str:
    if question["data_type"] == "image":
        return f"SEED-Bench-image/{question['data_id']}"
    return f"SEED-Bench-video-image/{question['question_type_id']}_{question['question_id']}.png"


def requests(items: Sequence[Item], config: SeedBench, tokenizer: LazyTokenizer) -> list[Request]:
    """The question of each item with its options."""
    return requests_of(items, config.prompt)


def score(items: Sequence[Item], rows: Sequence[ItemRow], config: SeedBench) -> list[Mapping[str, float]]:
    """1 where the letter that a rule reads is the right one, else 0, for each rule."""
    by_id = {item.id: item for item in items}
    return [_outcomes(by_id[row.item], row.answer or "") for row in rows]


def _outcomes(item: Item, answer: str) -> dict[str, float]:
    options = dict(zip(LETTERS, item.options, strict=True))
    letters = (exact_letter(answer), first_letter(answer), corrected_letter(answer, options))
    return {rule: float(letter == item.references["answer"]) for rule, letter in zip(_RULES, letters, strict=True)}


def metrics(items: Sequence[Item], rows: Sequence[ItemRow], config: SeedBench) -> list[MetricValues]:
    """The share of right answers to the questions on images; in subset total also on videos, and on both."""
    parts = {"image": [row for row in rows if "image" in row.slices]}
    if config.subset == "total":
        parts |= {"video": [row for row in rows if "video" in row.slices], "total": list(rows)}
    return [
        mean_metric(named("seed_bench", part, rule), of_part, rule)
        for part, of_part in parts.items()
        for rule in _RULES
        if of_part
    ]


def official_files(items: Sequence[Item], rows: Sequence[ItemRow], config: SeedBench) -> dict[str, bytes]:
    """The upload of the leaderboard: JSON lines of question_id and prediction in the order of the questions."""
    answers = {row.item: row.answer or "" for row in rows}
    lines = [
        json.dumps({"question_id": item.references["question_id"], "prediction": answers[item.id]}) for item in items
    ]
    return {"seed_bench_upload.jsonl": "".join(f"{line}\n" for line in lines).encode()}
