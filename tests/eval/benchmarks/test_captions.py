"""Captions of COCO and Flickr30k from the official files to numbers and result files."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

from tests.eval.benchmarks.sample import SAMPLES, config_of, numbers, rows_of, sample_items
from vila_ops.config.benchmarks import CocoCaptions, Flickr30kCaptions
from vila_ops.errors import TokenizerMissing
from vila_ops.eval.benchmark import Item
from vila_ops.eval.benchmarks import captions
from vila_ops.eval.metrics.ptb import has_official_tokenizer, tokenize

PYTHON = {"tokenizers": ("ptb_python",)}
REPLIES = {"101": "A red circle, drawn on a page.", "102": "Some blue paper", "103": "The green triangle (a tent)."}


def reply(item: Item, rotation: int) -> str:
    return REPLIES[str(item.references["image_id"])]


def official(items: list[Item], words: Any) -> dict[str, float]:
    """The scores of pycocoevalcap on captions that `words` splits."""
    true = words({item.id: [{"caption": one} for one in item.references["captions"]] for item in items})
    given = words({item.id: [{"caption": reply(item, 0)}] for item in items})
    bleu, _ = Bleu(4).compute_score(true, given, verbose=0)
    scores = {"cider": Cider().compute_score(true, given)[0], "bleu_4": bleu[3]}
    return scores | {"rouge_l": Rouge().compute_score(true, given)[0]}


def python_words(captions: dict[str, Any]) -> dict[str, list[str]]:
    return {id_: [" ".join(tokenize(one["caption"])) for one in ones] for id_, ones in captions.items()}


@pytest.mark.skipif(not has_official_tokenizer(), reason="no Java here")
def test_the_numbers_are_those_of_pycocoevalcap_with_both_tokenizers() -> None:
    config = config_of(CocoCaptions)
    items = sample_items(config)
    by_name = numbers(rows_of(items, config, reply), items, config)
    assert len(by_name) == 3 * 2 * 2
    for tokenizer, words in (("ptb", PTBTokenizer().tokenize), ("ptb_python", python_words)):
        expected = {
            f"coco_captions_{name}_{tokenizer}_official": value for name, value in official(items, words).items()
        }
        assert {name: by_name[name] for name in expected} == pytest.approx(expected, abs=1e-6)


def test_the_result_file_is_cocos_and_the_split_is_karpathys() -> None:
    config = config_of(CocoCaptions, **PYTHON)
    items = sample_items(config)
    assert [item.id for item in items] == [f"COCO_val2014_000000000{number}.jpg" for number in (101, 102, 103)]
    (name, content), *others = captions.official_files(items, rows_of(items, config, reply), config).items()
    assert (name, others) == ("captions_val2014_vila-ops_results.json", [])
    assert json.loads(content) == [{"image_id": int(number), "caption": REPLIES[number]} for number in REPLIES]


def test_flickr30k_is_read_alike_and_true_captions_score_best() -> None:
    config = config_of(Flickr30kCaptions, **PYTHON)
    items = sample_items(config)
    assert [item.problem() for item in items] == [None] * 3
    by_name = numbers(rows_of(items, config, lambda item, _: item.answer), items, config)
    assert by_name["flickr30k_captions_bleu_4_ptb_python_official"] == pytest.approx(1)
    # The first of two references is the caption itself, so recall and precision are 1 with it.
    assert by_name["flickr30k_captions_rouge_l_ptb_python_corrected"] == 1
    (content,) = captions.official_files(items, rows_of(items, config, lambda item, _: "a"), config).values()
    assert json.loads(content)[0] == {"image_id": "2000002.jpg", "caption": "a"}


def test_a_failed_caption_is_empty_or_the_set_is_another_one() -> None:
    config, left_out = config_of(CocoCaptions, **PYTHON), config_of(CocoCaptions, **PYTHON, failed_items="left_out")
    items = sample_items(config)
    rows = rows_of(items, config, lambda item, _: None if item is items[1] else item.answer)
    rouge = "coco_captions_rouge_l_ptb_python_corrected"
    assert numbers(rows, items, config)[rouge] == pytest.approx(2 / 3)
    answered = numbers(rows, items, left_out)
    assert answered[f"{rouge}_answered"] == 1
    cider = "coco_captions_cider_ptb_python_official"
    two = [items[0], items[2]]
    alone = numbers([row for row in rows if row.item != items[1].id], two, config)
    assert answered[f"{cider}_answered"] == pytest.approx(alone[cider]), "rarity among the two that answered"


def test_a_missing_java_is_named_before_the_first_image(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    config = config_of(CocoCaptions)
    with pytest.raises(TokenizerMissing, match="'coco_captions' scores with the official tokenizer, which needs Java"):
        captions.requests(sample_items(config), config, lambda: pytest.fail("no tokenizer is needed"))


def test_a_file_of_another_version_is_named(tmp_path: Path) -> None:
    config = config_of(CocoCaptions, **PYTHON)
    folder = Path(shutil.copytree(SAMPLES / "coco_captions", tmp_path / "coco_captions"))
    file = folder / "dataset_coco.json"
    file.write_text(file.read_text().replace('"test"', '"restval"'))
    with pytest.raises(ValueError, match=r"dataset_coco.json has no image of the split test"):
        list(captions.read(folder, config))
    file.write_text("[]")
    with pytest.raises(ValueError, match=r"dataset_coco.json has no images"):
        list(captions.read(folder, config))
