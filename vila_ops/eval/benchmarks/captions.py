"""Captions of COCO and Flickr30k on the split of Karpathy; see `config.benchmarks.Captions`.

Official files, in one folder:

    dataset_coco.json, dataset_flickr30k.json   images with split and sentences; caption_datasets.zip of Karpathy
    val2014/*.jpg, train2014/*.jpg              the images of COCO
    flickr30k-images/*.jpg                      the images of Flickr30k

CIDEr-D and BLEU-4 are of a whole set: the rarity of a word, and the lengths, are those of all captions that count. So a
policy that leaves failed items out scores another set, and its metrics have other names. The tokenizer is part of the
name; ptb is the official one. SPICE and METEOR are not computed.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from vila_ops.config.benchmarks import Captions, CocoCaptions
from vila_ops.errors import TokenizerMissing
from vila_ops.eval.benchmark import Item, LazyTokenizer, MetricValues, Request, Units
from vila_ops.eval.benchmarks.vqav2 import COCO_TRAIN2014, COCO_VAL2014
from vila_ops.eval.columns import COLUMNS, named
from vila_ops.eval.metrics.bleu import bleu_4
from vila_ops.eval.metrics.captions import TOKENIZERS, CaptionScores, caption_scores
from vila_ops.eval.metrics.ptb import has_official_tokenizer
from vila_ops.eval.official import check_keys, image_of, json_of
from vila_ops.eval.origins import OfficialFile, Origins
from vila_ops.eval.prompts import requests_of
from vila_ops.eval.rows import ItemRow

REVISION = 1
_SPLITS = "https://cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip", "36 MB", "?"
_FLICKR30K = (
    *("https://shannon.cs.illinois.edu/DenotationGraph/, on request", "4 GB"),
    "research only, Flickr's terms (images)",
)
_COCO, _FLICKR = {"kind": "coco_captions"}, {"kind": "flickr30k_captions"}
ORIGINS = Origins(
    files=(
        OfficialFile("dataset_coco.json", *_SPLITS, items=5_000, only=_COCO),
        replace(COCO_VAL2014, only=_COCO),
        replace(COCO_TRAIN2014, only=_COCO),
        OfficialFile("dataset_flickr30k.json", *_SPLITS, items=1_000, only={**_FLICKR, "split": "test"}),
        OfficialFile("dataset_flickr30k.json", *_SPLITS, items=1_014, only={**_FLICKR, "split": "val"}),
        OfficialFile("flickr30k-images/*.jpg", *_FLICKR30K, only=_FLICKR),
    ),
    server="none: scored here",
)
BLEU_COUNTS = (
    *(f"{count}_{order}" for count in ("common", "ngrams") for order in (1, 2, 3, 4)),
    "words",
    "reference_words",
)


def read(source: Path, config: Captions) -> Iterator[Item]:
    """The images of a split, in the order of the file. Raises ValueError."""
    return _items(source, config, (config.split,))


def train_items(source: Path, config: Captions) -> Iterator[Item]:
    """The images of the split train, for COCO also those of restval, as the split is trained on. Raises ValueError."""
    return _items(source, config, ("train", "restval"))


def _items(source: Path, config: Captions, splits: Sequence[str]) -> Iterator[Item]:
    is_coco = isinstance(config, CocoCaptions)
    file = source / ("dataset_coco.json" if is_coco else "dataset_flickr30k.json")
    content = json_of(file)
    if not isinstance(content, dict) or "images" not in content:
        raise ValueError(f"{file} has no images; the file is of another version")
    keys = ("filepath", "cocoid") if is_coco else ()
    check_keys(file, content["images"], ("filename", "split", "sentences", *keys))
    of_split = [record for record in content["images"] if record["split"] in splits]
    if not of_split:
        raise ValueError(f"{file} has no image of the split {splits[0]}; the file is of another version")
    for record in of_split:
        captions = [sentence["raw"] for sentence in record["sentences"]]
        if not captions:
            raise ValueError(f"{file}: {record['filename']} has no sentence; the file is of another version")
        folder = record["filepath"] if is_coco else "flickr30k-images"
        yield Item(
            id=record["filename"],
            group=record["filename"],
            parts={"image": (image_of(source / folder / record["filename"]),)},
            references={"captions": captions, "image_id": record.get("cocoid", record["filename"])},
            answer=captions[0],
        )


def requests(items: Sequence[Item], config: Captions, tokenizer: LazyTokenizer) -> list[Request]:
    """A caption of each image. Raises TokenizerMissing, before the first one is asked for."""
    if "ptb" in config.tokenizers and not has_official_tokenizer():
        raise TokenizerMissing(
            f"benchmark {config.kind!r} scores with the official tokenizer, which needs Java and the package "  # type: ignore[attr-defined]
            f"pycocoevalcap; install a Java runtime (Debian: default-jre-headless), or set tokenizers to [ptb_python]"
        )
    return requests_of(items, config.prompt)


def score(items: Sequence[Item], rows: Sequence[ItemRow], config: Captions) -> list[Mapping[str, float]]:
    """CIDEr-D, ROUGE-L and the counts of BLEU for each caption, by tokenizer and column."""
    answers = {row.item: row.answer or "" for row in rows}
    references = {item.id: item.references["captions"] for item in items if item.id in answers}
    scores: dict[str, dict[str, float]] = {id_: {} for id_ in answers}
    for tokenizer in config.tokenizers:
        for column, words_of in zip(COLUMNS, TOKENIZERS[tokenizer], strict=True):
            of_set = caption_scores(answers, references, words_of=words_of)
            for id_, of_row in scores.items():
                of_row |= {f"{name}_{tokenizer}_{column}": value for name, value in _values(of_set, id_, column)}
    return [scores[row.item] for row in rows]


def _values(scores: CaptionScores, id_: str, column: str) -> Iterator[tuple[str, float]]:
    yield "cider", scores.cider.items[id_]
    yield "rouge_l", getattr(scores.rouge_l[id_], column)
    yield from zip(BLEU_COUNTS, scores.bleu.counts[id_], strict=True)


def metrics(items: Sequence[Item], rows: Sequence[ItemRow], config: Captions) -> list[MetricValues]:
    """CIDEr-D, BLEU-4 and ROUGE-L of the set, by tokenizer and column."""
    kind: str = config.kind  # type: ignore[attr-defined]
    values = []
    for tokenizer in config.tokenizers:
        for column in COLUMNS:

            def of(*names: str, variant: str = f"{tokenizer}_{column}") -> Any:
                table = np.array([[row.scores[f"{name}_{variant}"] for name in names] for row in rows])
                return table[:, 0] if len(names) == 1 else table

            name, units = named(kind, "{}", tokenizer, column), Units.of(rows)
            values += [
                MetricValues(name.format("cider"), units, of("cider"), unit="CIDEr-D (0 to 10)"),
                MetricValues(name.format("bleu_4"), units, of(*BLEU_COUNTS), bleu_4),
                MetricValues(name.format("rouge_l"), units, of("rouge_l")),
            ]
    return values


def official_files(items: Sequence[Item], rows: Sequence[ItemRow], config: Captions) -> dict[str, bytes]:
    """The results in COCO's format, an array of image_id and caption; Flickr30k's image_id is the file's name."""
    answers = {row.item: row.answer or "" for row in rows}
    records = [{"image_id": item.references["image_id"], "caption": answers[item.id]} for item in items]
    name = "val2014" if isinstance(config, CocoCaptions) else "flickr30k"
    return {f"captions_{name}_vila-ops_results.json": json.dumps(records, ensure_ascii=False).encode()}
