import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vila_ops.errors import TokenizerMissing
from vila_ops.eval.metrics import ptb
from vila_ops.eval.metrics.ptb import corrected_words, has_official_tokenizer, official_words, python_words, tokenize

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "ptb_words.json").read_text(encoding="utf-8"))["captions"]
needs_java = pytest.mark.skipif(not has_official_tokenizer(), reason="no Java here")


@pytest.mark.parametrize(("caption", "words"), GOLDEN)
def test_words_are_those_of_the_java_tokenizer(caption: str, words: str) -> None:
    assert " ".join(tokenize(caption)) == words


@given(st.text())
def test_tokenize_takes_any_text(caption: str) -> None:
    words = tokenize(caption)
    assert all(word and word == "".join(word.split()) for word in words)


@needs_java
def test_the_java_tokenizer_gives_the_recorded_words() -> None:
    captions = [one for caption, _ in GOLDEN for one in (caption, "zzz")]  # as recorded; see made_with
    assert [" ".join(" ".join(words).split()) for words in official_words(captions)[::2]] == [w for _, w in GOLDEN]


@needs_java
def test_a_line_end_in_a_caption_moves_the_words_of_later_ones_in_the_official_column_alone() -> None:
    captions = ["a cat\rsits", "a dog\nruns", "", "an ox\u2028eats"]
    assert [" ".join(words) for words in official_words(captions)] == ["a cat", "sits", "a dog runs", ""]
    assert [" ".join(words) for words in corrected_words(captions)] == ["a cat sits", "a dog runs", "", "an ox eats"]


@needs_java
def test_half_a_surrogate_pair_and_no_captions_are_read() -> None:
    assert official_words(["a \ud83d cat"])[0][-1] == "cat"
    assert official_words([]) == []


def test_the_variant_without_java_reads_each_caption_alone() -> None:
    assert python_words(["A cat.", ""]) == [("a", "cat"), ()]


def test_the_way_out_is_named_where_java_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert shutil.which("java") is None
    assert not ptb.has_official_tokenizer()
    with pytest.raises(TokenizerMissing, match="default-jre-headless"):
        official_words(["a cat"])
