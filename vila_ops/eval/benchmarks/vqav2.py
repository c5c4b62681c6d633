"""VQAv2: open questions on COCO's images, with ten human answers each; see `config.benchmarks.VqaV2`.

Official files, in one folder:

    v2_OpenEnded_mscoco_val2014_questions.json, v2_mscoco_val2014_annotations.json, val2014/COCO_val2014_*.jpg
        questions, answers and images of the validation split
    v2_OpenEnded_mscoco_train2014_questions.json, v2_mscoco_train2014_annotations.json, train2014/COCO_train2014_*.jpg
        those of the train split, for demonstrations
    v2_OpenEnded_mscoco_test-dev2015_questions.json, v2_OpenEnded_mscoco_test2015_questions.json,
    test2015/COCO_test2015_*.jpg
        those of the test split, whose answers only the server has

`vqav2_official` is what the official code gives for the answers as they are. LLaVA and VILA normalise the answers that
they upload; so do the upload files of the test splits here. The server reads a file of the whole test2015, in which the
questions that test-dev2015 does not have are answered by an empty text.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vila_ops.config.benchmarks import VqaV2
from vila_ops.eval.benchmark import Item, LazyTokenizer, MetricValues, Request
from vila_ops.eval.columns import WRONG, in_columns, mean_metrics
from vila_ops.eval.metrics import m4c, vqa
from vila_ops.eval.official import check_keys, image_of, json_of
from vila_ops.eval.origins import OfficialFile, Origins
from vila_ops.eval.prompts import requests_of
from vila_ops.eval.rows import ItemRow

REVISION = 1

_PAGE, _LICENCE = "https://visualqa.org/download.html", "CC BY 4.0 (questions, answers)"
_COCO, _IMAGES = "http://images.cocodataset.org/zips", "Flickr's terms (images of COCO)"
COCO_VAL2014 = OfficialFile(
    "val2014/COCO_val2014_*.jpg", f"{_COCO}/val2014.zip", "6 GB", _IMAGES, only={"split": "val2014"}
)
COCO_TRAIN2014 = OfficialFile(
    "train2014/COCO_train2014_*.jpg", f"{_COCO}/train2014.zip", "13 GB", _IMAGES, is_train=True
)
ORIGINS = Origins(
    files=(
        OfficialFile(
            "v2_OpenEnded_mscoco_val2014_questions.json",
            *(_PAGE, "3 MB", _LICENCE),
            items=214_354,
            only={"split": "val2014"},
        ),
        OfficialFile("v2_mscoco_val2014_annotations.json", _PAGE, "10 MB", _LICENCE, only={"split": "val2014"}),
        COCO_VAL2014,
        OfficialFile(
            "v2_OpenEnded_mscoco_test-dev2015_questions.json",
            *(_PAGE, "8 MB", _LICENCE),
            items=107_394,
            only={"split": "test-dev2015"},
        ),
        OfficialFile(
            "v2_OpenEnded_mscoco_test2015_questions.json",
            *(_PAGE, "8 MB", _LICENCE),
            only={"split": "test-dev2015"},
        ),
        OfficialFile(
            "v2_OpenEnded_mscoco_test2015_questions.json",
            *(_PAGE, "8 MB", _LICENCE),
            items=447_793,
            only={"split": "test2015"},
        ),
        *(
            OfficialFile(
                "test2015/COCO_test2015_*.jpg",
                *(f"{_COCO}/test2015.zip", "12 GB", _IMAGES),
                only={"split": split},
            )
            for split in ("test-dev2015", "test2015")
        ),
        OfficialFile("v2_OpenEnded_mscoco_train2014_questions.json", _PAGE, "7 MB", _LICENCE, is_train=True),
        OfficialFile("v2_mscoco_train2014_annotations.json", _PAGE, "21 MB", _LICENCE, is_train=True),
        COCO_TRAIN2014,
    ),
    server="EvalAI scores test-dev and test; val is scored here",
)


def read(source: Path, config: VqaV2) -> Iterator[Item]:
    """The questions of a split, in their order. Raises ValueError for a file that is missing or faulty."""
    questions = source / f"v2_OpenEnded_mscoco_{config.split}_questions.json"
    if config.split == "val2014":
        yield from items_of_vqa(questions, source / "v2_mscoco_val2014_annotations.json", "val2014")
        return
    records = questions_of(questions)
    unasked: list[int] = []
    if config.split == "test-dev2015":
        every = [one["question_id"] for one in questions_of(source / "v2_OpenEnded_mscoco_test2015_questions.json")]
        asked = {one["question_id"] for one in records}
        if foreign := asked.difference(every):
            raise ValueError(
                f"{questions}: question {min(foreign)} is not in test2015; the files are of other versions"
            )
        unasked = [one for one in every if one not in asked]
    for number, record in enumerate(records):
        references = {"question_id": record["question_id"], "unasked": [] if number else unasked}
        yield _item(record, source / "test2015" / f"COCO_test2015_{record['image_id']:012d}.jpg", references)


def train_items(source: Path, config: VqaV2) -> Iterator[Item]:
    """The questions of train2014, in their order. Raises ValueError for a file that is missing or faulty."""
    questions = source / "v2_OpenEnded_mscoco_train2014_questions.json"
    return items_of_vqa(questions, source / "v2_mscoco_train2014_annotations.json", "train2014")


def items_of_vqa(questions: Path, annotations: Path, images: str) -> Iterator[Item]:
    """The questions of a pair of files in VQA's format, with a folder of images of COCO, such as val2014, beside them.

    Raises ValueError for a file that is missing or faulty, and for annotations of another split.
    """
    answers = _annotations(annotations)
    for record in questions_of(questions):
        question_id = record["question_id"]
        if question_id not in answers:
            raise ValueError(f"{annotations} has no answers to question {question_id}; the files are of other splits")
        annotation = answers[question_id]
        yield _item(
            record,
            questions.parent / images / f"COCO_{images}_{record['image_id']:012d}.jpg",
            {"question_id": question_id, "answers": annotation["answers"]},
            slices=(f"answer_type: {annotation['answer_type']}",),
        )


def questions_of(file: Path) -> list[dict[str, Any]]:
    """The questions of a file in VQA's format. Raises ValueError."""
    content = json_of(file)
    check_keys(file, [content], ("questions",))
    check_keys(file, content["questions"], ("question_id", "image_id", "question"))
    subtype = content.get("data_subtype")
    if subtype is not None and subtype not in file.name:
        raise ValueError(f"{file} has the questions of {subtype}; fetch the file of its name")
    return list(content["questions"])


def _annotations(file: Path) -> dict[int, dict[str, Any]]:
    content = json_of(file)
    check_keys(file, [content], ("annotations",))
    check_keys(file, content["annotations"], ("question_id", "answers", "answer_type"))
    by_id = {one["question_id"]: one for one in content["annotations"]}
    if len(by_id) != len(content["annotations"]):
        raise ValueError(f"{file} has {len(content['annotations']) - len(by_id)} questions twice; fetch it again")
    if bare := [id_ for id_, one in by_id.items() if not one["answers"]]:
        raise ValueError(f"{file}: question {bare[0]} has no human answers; fetch it again")
    return by_id


def _item(record: Mapping[str, Any], image: Path, references: dict[str, Any], *, slices: tuple[str, ...] = ()) -> Item:
    answers = [one["answer"] for one in references.get("answers", ())]
    return Item(
        id=str(record["question_id"]),
        group=image.name,
        parts={"image": (image_of(image),), "question": (record["question"],)},
        references=references,
        answer=max(answers, key=answers.count) if answers else "",
        slices=slices,
    )


def requests(items: Sequence[Item], config: VqaV2, tokenizer: LazyTokenizer) -> list[Request]:
    """The question of each item."""
    return requests_of(items, config.prompt)


def score(items: Sequence[Item], rows: Sequence[ItemRow], config: VqaV2) -> list[Mapping[str, float]]:
    """The VQA accuracy of each answer; none where only the server has the human answers."""
    human = {item.id: item.references.get("answers") for item in items}
    return [
        {}
        if human[row.item] is None
        else in_columns(WRONG if row.answer is None else vqa.score(row.answer, human[row.item]))
        for row in rows
    ]


def metrics(items: Sequence[Item], rows: Sequence[ItemRow], config: VqaV2) -> list[MetricValues]:
    """The mean accuracy of the validation split."""
    return mean_metrics("vqav2", rows) if config.split == "val2014" else []


def official_files(items: Sequence[Item], rows: Sequence[ItemRow], config: VqaV2) -> dict[str, bytes]:
    """The results as the official code and the server read them; see the module for what differs in the test splits."""
    answers = {row.item: row.answer or "" for row in rows}
    if config.split == "val2014":
        return {"v2_OpenEnded_mscoco_val2014_vila_results.json": results(items, answers)}
    unasked = [{"question_id": one, "answer": ""} for item in items for one in item.references["unasked"]]
    upload = results(items, {id_: m4c.normalize(answer) for id_, answer in answers.items()}, unasked)
    return {f"v2_OpenEnded_mscoco_{config.split}_vila_results.json": upload}


def results(items: Sequence[Item], answers: Mapping[str, str], more: Sequence[Mapping[str, Any]] = ()) -> bytes:
    """A file of results in VQA's format: question_id and answer of each item, in their order."""
    records = [{"question_id": item.references["question_id"], "answer": answers[item.id]} for item in items]
    return json.dumps([*records, *more], ensure_ascii=False).encode()
