"""The pieces of an answer are what the stock tokenizer decodes of all its ids, up to the first stop string."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vila_ops.data.text.conversation import Tokenizer
from vila_ops.generate.engine import Engine
from vila_ops.generate.request import Delta, TokenLogprob
from vila_ops.serve.app.text_stream import AnswerText, TextPiece, logprob_content, token_bytes


@pytest.fixture(scope="module")
def tokenizer(real_engine: Engine) -> Tokenizer:
    """The tiny model's tokenizer, of bytes like GPT-2's."""
    return real_engine.tokenizer


def pieces(tokenizer: Tokenizer, ids: list[int], *, stops: list[str], size: int = 1) -> list[TextPiece]:
    """The pieces of an answer that comes so many ids at a time."""
    answer, made = AnswerText(tokenizer, 0, stops=stops), []
    for start in range(0, len(ids), size):
        made.append(answer.add(Delta(ids[start : start + size])))
        if made[-1].finish_reason:
            return made
    return [*made, answer.add(Delta([], "length"))]


@given(st.data())
def test_any_ids_give_the_text_of_all_of_them(tokenizer: Tokenizer, data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.integers(0, len(tokenizer.fast) - 1), max_size=40))
    made = pieces(tokenizer, ids, stops=[], size=data.draw(st.integers(1, 3)))
    assert "".join(piece.text for piece in made) == tokenizer.fast.decode(ids, skip_special_tokens=True)
    assert sum(piece.tokens for piece in made) == len(ids)


@given(st.text(max_size=30))
def test_no_piece_is_cut_inside_a_character(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.text_ids(text.replace("\ufffd", ""))
    for piece in pieces(tokenizer, ids, stops=[]):
        assert "\ufffd" not in piece.text


@given(
    st.text("ab\u00e9\U0001f642 ", max_size=30),
    st.lists(st.text("ab\u00e9\U0001f642", min_size=1, max_size=4), max_size=3),
)
def test_an_answer_ends_before_its_first_stop_string(tokenizer: Tokenizer, text: str, stops: list[str]) -> None:
    ids = [one for character in text for one in tokenizer.text_ids(character)]
    whole = tokenizer.fast.decode(ids)
    first = min((at for stop in stops if (at := whole.find(stop)) >= 0), default=None)
    made = pieces(tokenizer, ids, stops=stops)
    assert "".join(piece.text for piece in made) == whole[:first]
    assert made[-1].finish_reason == ("length" if first is None else "stop")


def test_tokens_have_the_bytes_that_make_up_the_text(tokenizer: Tokenizer) -> None:
    text = "Gr\u00fc\u00dfe \U0001f642, a\u0301"
    assert b"".join(token_bytes(tokenizer, token) for token in tokenizer.text_ids(text)).decode() == text


def test_logprobs_have_openais_form(tokenizer: Tokenizer) -> None:
    first, second = tokenizer.text_ids("ab")[:1] + tokenizer.text_ids("c")[:1]
    (entry,) = logprob_content(tokenizer, [TokenLogprob(first, -0.5, ((first, -0.5), (second, float("-inf"))))])
    shown = tokenizer.fast.decode([first])
    assert entry["token"] == shown
    assert bytes(entry["bytes"]).decode() == shown
    assert entry["logprob"] == -0.5
    assert [other["logprob"] for other in entry["top_logprobs"]] == [-0.5, -9999.0]
