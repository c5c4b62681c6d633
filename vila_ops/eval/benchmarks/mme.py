"""MME: two questions on each image, one to be answered yes and one no; see `config.benchmarks.Mme`.

Official files, as its zip has them:

    MME_Benchmark_release_version/SUBTASK/NAME.txt with NAME.jpg or NAME.png beside it, or
    MME_Benchmark_release_version/SUBTASK/questions_answers_YN/NAME.txt with images/NAME.jpg
        two lines for each image: a question, a tab, Yes or No; later zips have one more folder, MME_Benchmark

`mme_perception_official` is what LLaVA and VILA report: the sum of ten subtasks, at most 2000. Runs of one model differ
by about 20 (LLaVA#680). LLaVA's prompt leaves out "Please answer yes or no.", so the part `question` has no such end;
`official_question` has.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from vila_ops.config.benchmarks import Mme
from vila_ops.eval.benchmark import Item, LazyTokenizer, MetricValues, Request, Units
from vila_ops.eval.columns import COLUMNS, WRONG, in_columns
from vila_ops.eval.metrics import mme
from vila_ops.eval.official import image_of, text_of
from vila_ops.eval.origins import OfficialFile, Origins
from vila_ops.eval.prompts import requests_of
from vila_ops.eval.rows import ItemRow
from vila_ops.eval.statistics import FloatArray

REVISION = 2
ROOT = "MME_Benchmark_release_version"
SUFFIX = "Please answer yes or no."
_HUB = "darkyarding/MME/MME_Benchmark_release_version.zip"
_GIVEN = "https://huggingface.co/datasets/darkyarding/MME", "0.2 to 0.8 GB", "research only, images of several sources"
ORIGINS = Origins(
    files=(
        OfficialFile(f"{ROOT}/**/*.txt", *_GIVEN, items=2_374, hub=_HUB),
        OfficialFile(f"{ROOT}/**/*.[jp][pn]g", *_GIVEN, hub=_HUB),
    ),
    server="none: scored here",
)
_GROUPS = {"perception": mme.PERCEPTION, "cognition": mme.COGNITION}


def read(source: Path, config: Mme) -> Iterator[Item]:
    """The questions of all subtasks, perception first, and images by name. Raises ValueError.

    A subtask without files, and an image without exactly two questions, are errors.
    """
    root = source / ROOT / "MME_Benchmark"
    root = root if root.is_dir() else source / ROOT
    for subtask in (*mme.PERCEPTION, *mme.COGNITION):
        apart = root / subtask / "questions_answers_YN"
        texts = sorted((apart if apart.is_dir() else root / subtask).glob("*.txt"))
        if not texts:
            raise ValueError(f"{root / subtask} has no questions; `vila-ops benchmark list` says where they come from")
        for text in texts:
            yield from _items(subtask, text, root / subtask / "images" if apart.is_dir() else root / subtask)


def _items(subtask: str, file: Path, images: Path) -> Iterator[Item]:
    lines = [line.split("\t") for line in text_of(file).splitlines() if line.strip()]
    if len(lines) != mme.QUESTIONS_OF_AN_IMAGE or any(len(line) != 2 for line in lines):
        raise ValueError(f"{file} has {len(lines)} lines, not two of a question, a tab and Yes or No; fetch it again")
    present = [images / f"{file.stem}{end}" for end in (".jpg", ".png") if (images / f"{file.stem}{end}").is_file()]
    image = (present or [images / f"{file.stem}.jpg"])[0]
    for number, (question, truth) in enumerate(lines):
        if truth.strip() not in ("Yes", "No"):
            raise ValueError(f"{file}: {truth.strip()!r} is neither Yes nor No; fetch it again")
        yield Item(
            id=f"{subtask}/{image.name}/{number}",
            group=f"{subtask}/{image.name}",
            parts={
                "image": (image_of(image),),
                "question": (question.strip().removesuffix(SUFFIX).strip(),),
                "official_question": (question.strip(),),
            },
            references={"subtask": subtask, "image": image.name, "truth": truth.strip()},
            answer=truth.strip(),
        )


def requests(items: Sequence[Item], config: Mme, tokenizer: LazyTokenizer) -> list[Request]:
    """The question of each item."""
    return requests_of(items, config.prompt)


def score(items: Sequence[Item], rows: Sequence[ItemRow], config: Mme) -> list[Mapping[str, float]]:
    """1 where the answer is right."""
    by_id = {item.id: item for item in items}
    return [
        in_columns(WRONG if row.answer is None else mme.score(_answered(by_id[row.item], row.answer))) for row in rows
    ]


def _answered(item: Item, answer: str) -> mme.MmeItem:
    truth: Literal["yes", "no"] = "yes" if item.references["truth"] == "Yes" else "no"
    return mme.MmeItem(item.references["subtask"], item.references["image"], truth, answer)


def metrics(items: Sequence[Item], rows: Sequence[ItemRow], config: Mme) -> list[MetricValues]:
    """The score of each subtask, and the sums for perception and cognition where all subtasks are there.

    Their units are images with both questions answered: an image with one, where failed items are left out, does not
    count. A subtask with fewer than two images has no interval, and no score of its own.
    """
    subtask_of = {item.group: item.references["subtask"] for item in items}
    values = []
    for column in COLUMNS:
        scores: dict[str, list[float]] = {}
        for row in rows:
            scores.setdefault(row.group, []).append(row.scores[column])
        pairs = {image: pair for image, pair in scores.items() if len(pair) == mme.QUESTIONS_OF_AN_IMAGE}
        images = Counter(subtask_of[image] for image in pairs)
        whole = {name: subtasks for name, subtasks in _GROUPS.items() if images.keys() >= set(subtasks)}
        own = {name: (name,) for name, number in images.items() if number >= 2}
        for name, subtasks in {**own, **whole}.items():
            values.append(_score_of(f"mme_{name}_{column}", subtasks, pairs, subtask_of))
    return values


def _score_of(
    name: str, subtasks: Sequence[str], pairs: Mapping[str, Sequence[float]], subtask_of: Mapping[str, str]
) -> MetricValues:
    """The sum of the scores of subtasks, from the counts of each image in the columns of its subtask."""
    images = tuple(image for image in pairs if subtask_of[image] in subtasks)
    counts = np.zeros((len(images), len(subtasks), 3))
    for number, image in enumerate(images):
        counts[number, subtasks.index(subtask_of[image])] = sum(pairs[image]) / 2, min(pairs[image]), 1
    flat = counts.reshape(len(images), -1)
    return MetricValues(name, Units(images, images), flat, SumOfScores(len(subtasks)), unit="points")


@dataclass(frozen=True)
class SumOfScores:
    """The sum over subtasks of 100 x (accuracy + accuracy plus), from sums of both and of images: (..., 3 S) -> (...).

    A resample that has no image of a subtask takes the mean of the others for it.
    """

    subtasks: int

    def __call__(self, sums: FloatArray) -> FloatArray:
        """The statistic."""
        accuracy, plus, images = np.moveaxis(sums.reshape(*sums.shape[:-1], self.subtasks, 3), -1, 0)
        scores = np.divide(100 * (accuracy + plus), images, out=np.zeros(images.shape), where=images > 0)
        result: FloatArray = scores.sum(axis=-1) * self.subtasks / (images > 0).sum(axis=-1)
        return result


def official_files(items: Sequence[Item], rows: Sequence[ItemRow], config: Mme) -> dict[str, bytes]:
    """A file for each subtask as the official script reads it: image, question, truth, and the answer on one line."""
    answers = {row.item: row.answer or "" for row in rows}
    lines: dict[str, list[str]] = {}
    for item in items:
        (question,) = item.parts["official_question"]
        cells = (item.references["image"], str(question), item.references["truth"], answers[item.id])
        line = "\t".join(" ".join(cell.split()) for cell in cells)
        lines.setdefault(item.references["subtask"], []).append(line + "\n")
    return {f"{name}.txt": "".join(of_subtask).encode() for name, of_subtask in lines.items()}
