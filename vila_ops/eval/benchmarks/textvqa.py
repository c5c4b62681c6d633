"""TextVQA: questions on images whose text has to be read; see `config.benchmarks.TextVqa`.

Official files, in one folder:

    TextVQA_0.5.1_val.json                  questions and ten human answers each (TextVQA_0.5.1_test.json: no answers)
    TextVQA_Rosetta_OCR_v0.2_val.json       what OCR reads in the images; needed where the prompt names {ocr}
    train_images/*.jpg, test_images/*.jpg   the images; those of val are among the former
    TextVQA_0.5.1_train.json, TextVQA_Rosetta_OCR_v0.2_train.json
                                            the train split, for demonstrations

With OCR tokens in the prompt LLaVA-1.5 7B has 58.2, without 45.5: these are two benchmarks. The prompt decides, and the
metric's name says which it is: `textvqa_ocr_official` (LLaVA and VILA) or `textvqa_without_ocr_official`.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vila_ops.config.benchmarks import TextVqa
from vila_ops.eval.benchmark import Item, LazyTokenizer, MetricValues, Request
from vila_ops.eval.benchmarks.vqav2 import results
from vila_ops.eval.columns import WRONG, in_columns, mean_metrics
from vila_ops.eval.metrics import m4c
from vila_ops.eval.official import check_keys, image_of, json_of
from vila_ops.eval.origins import OfficialFile, Origins
from vila_ops.eval.prompts import requests_of
from vila_ops.eval.rows import ItemRow

REVISION = 1
_PAGE, _LICENCE, _IMAGES = "https://textvqa.org/dataset/", "CC BY 4.0", "CC BY 2.0 (Open Images)"
ORIGINS = Origins(
    files=(
        OfficialFile("TextVQA_0.5.1_val.json", _PAGE, "16 MB", _LICENCE, items=5_000, only={"split": "val"}),
        OfficialFile("TextVQA_Rosetta_OCR_v0.2_val.json", _PAGE, "?", _LICENCE, only={"split": "val"}),
        OfficialFile("train_images/*.jpg", _PAGE, "7 GB", _IMAGES, only={"split": "val"}),
        OfficialFile("TextVQA_0.5.1_test.json", _PAGE, "14 MB", _LICENCE, items=5_734, only={"split": "test"}),
        OfficialFile("TextVQA_Rosetta_OCR_v0.2_test.json", _PAGE, "?", _LICENCE, only={"split": "test"}),
        OfficialFile("test_images/*.jpg", _PAGE, "1 GB", _IMAGES, only={"split": "test"}),
        OfficialFile("TextVQA_0.5.1_train.json", _PAGE, "103 MB", _LICENCE, is_train=True),
        OfficialFile("TextVQA_Rosetta_OCR_v0.2_train.json", _PAGE, "?", _LICENCE, is_train=True),
    ),
    server="EvalAI scores test; val is scored here",
)


def read(source: Path, config: TextVqa) -> Iterator[Item]:
    """The questions of a split, in their order. Raises ValueError for a file that is missing or faulty.

    Without the file of OCR tokens items have no part `ocr`, so that a prompt that names it is refused.
    """
    return _items(source, config.split)


def train_items(source: Path, config: TextVqa) -> Iterator[Item]:
    """The questions of the train split, as by `read`. Raises ValueError."""
    return _items(source, "train")


def _items(source: Path, split: str) -> Iterator[Item]:
    file = source / f"TextVQA_0.5.1_{split}.json"
    records = _data(file, ("image_id", "question_id", "question"), split)
    if split != "test":
        check_keys(file, records, ("answers",))
    ocr_file = source / f"TextVQA_Rosetta_OCR_v0.2_{split}.json"
    has_ocr = ocr_file.is_file()
    tokens = {one["image_id"]: one["ocr_tokens"] for one in _data(ocr_file, OCR_KEYS, split)} if has_ocr else {}
    images = source / ("test_images" if split == "test" else "train_images")
    for record in records:
        answers, image = record.get("answers", []), record["image_id"]
        if split != "test" and len(answers) != m4c.TEXTVQA_ANSWERS:
            raise ValueError(f"{file}: question {record['question_id']} has {len(answers)} answers, not ten")
        if has_ocr and image not in tokens:
            raise ValueError(f"{ocr_file} has no tokens of image {image}; the files are of other splits")
        yield Item(
            id=str(record["question_id"]),
            group=image,
            parts={
                "image": (image_of(images / f"{image}.jpg"),),
                "question": (record["question"],),
                **({"ocr": (", ".join(tokens[image]),)} if has_ocr else {}),
            },
            references={"question_id": record["question_id"], "answers": answers},
            answer=max(answers, key=answers.count) if answers else "",
        )


OCR_KEYS = ("image_id", "ocr_tokens")


def _data(file: Path, keys: Sequence[str], split: str) -> list[dict[str, Any]]:
    content = json_of(file)
    check_keys(file, [content], ("data",))
    check_keys(file, content["data"], keys)
    if content.get("dataset_type", split) != split:
        raise ValueError(f"{file} has the split {content['dataset_type']}; fetch the file of its name")
    return list(content["data"])


def requests(items: Sequence[Item], config: TextVqa, tokenizer: LazyTokenizer) -> list[Request]:
    """The question of each item."""
    return requests_of(items, config.prompt)


def score(items: Sequence[Item], rows: Sequence[ItemRow], config: TextVqa) -> list[Mapping[str, float]]:
    """The accuracy of each answer; none on test."""
    if config.split == "test":
        return [{} for _ in rows]
    human = {item.id: item.references["answers"] for item in items}
    return [in_columns(WRONG if row.answer is None else m4c.textvqa(row.answer, human[row.item])) for row in rows]


def metrics(items: Sequence[Item], rows: Sequence[ItemRow], config: TextVqa) -> list[MetricValues]:
    """The mean accuracy of the variant that the prompt is."""
    name = "textvqa_ocr" if "ocr" in config.prompt.fields() else "textvqa_without_ocr"
    return [] if config.split == "test" else mean_metrics(name, rows)


def official_files(items: Sequence[Item], rows: Sequence[ItemRow], config: TextVqa) -> dict[str, bytes]:
    """The results as the server reads them: question_id and answer."""
    return {f"TextVQA_0.5.1_{config.split}_results.json": results(items, {row.item: row.answer or "" for row in rows})}
