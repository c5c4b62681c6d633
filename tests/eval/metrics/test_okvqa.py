from dataclasses import dataclass

import pytest

from tests.eval.metrics.official import recorded
from vila_ops.eval.metrics.okvqa import lavis_score, lemmatised, lemmatised_variant


@dataclass(frozen=True)
class RecordedWord:
    """A token of spaCy."""

    text: str
    pos_: str
    lemma_: str


def test_scores_are_those_of_the_evaluator_of_lavis() -> None:
    for item in recorded("vqa")["items"]:
        assert round(100 * lavis_score(item["answer"], item["human"]), 12) == item["lavis"], item


def test_answers_are_lemmatised_as_by_lavis() -> None:
    for item in recorded("okvqa")["items"]:
        words = {item["answer"]: [RecordedWord(*word) for word in item["words"]]}
        assert lemmatised(item["answer"], words.__getitem__) == item["lemmatised"], item


def test_the_pipeline_is_part_of_the_name() -> None:
    meta = {"lang": "en", "name": "core_web_sm", "version": "3.8.0", "license": "MIT"}
    assert lemmatised_variant(meta) == "okvqa_lavis_lemmatised[en_core_web_sm-3.8.0]"


def test_a_question_without_human_answers_is_refused() -> None:
    with pytest.raises(ValueError, match="without human answers"):
        lavis_score("yes", [])
