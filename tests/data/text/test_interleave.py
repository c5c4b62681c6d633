import copy
from collections.abc import Callable
from itertools import chain
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vila_ops.data.records import Image, Part, Record, Turn
from vila_ops.data.text.conversation import Tokenizer, tokenise
from vila_ops.data.text.interleave import image_first, pairs, place

A, B, C, D, E, F, G, H = (Image(bytes([number])) for number in range(8))
IMAGE = 3

sentences = st.lists(st.text("ab ", max_size=4), min_size=1, max_size=6)
documents = sentences.flatmap(
    lambda said: st.tuples(
        st.just(said),
        st.lists(st.integers(0, len(said) - 1), max_size=8).map(
            lambda matches: [(match, Image(bytes([number]))) for number, match in enumerate(matches)]
        ),
    )
)


def record(parts: tuple[Part, ...]) -> Record:
    return Record(id="r", object="o", turns=(Turn("document", parts),), category="", licence="", provenance="")


def tokens(tokenizer: Tokenizer, parts: tuple[Part, ...], *, max_tokens: int = 999) -> list[int]:
    (sample,) = tokenise(record(parts), tokenizer, max_tokens=max_tokens, split=False)
    assert sample.input_ids.count(IMAGE) == 4 * len(sample.images)
    return sample.input_ids


def loader(said: list[str], images: list[tuple[int, Image]]) -> tuple[str, list[Image]]:
    """VILA's loader restated on strings: "#" stands for an image."""
    said = list(said)
    matches = [match for match, _ in images[:6]]
    order = sorted(range(len(matches)), key=matches.__getitem__)
    for match in matches:
        said[match] = "#" + said[match]
    return " ".join(said).replace("# ", "#").replace(" #", "#"), [images[number][1] for number in order]


def test_the_worked_example_of_mmc4(tokenizer: Tokenizer) -> None:
    """Intro.<image>A red ball. The end.</s>"""
    parts = place(["Intro.", "A red ball.", "The end."], [(1, A)])
    assert parts == ("Intro.", A, "A red ball. The end.")
    intro, rest = tokenizer.text_ids("Intro."), tokenizer.text_ids("A red ball. The end.")
    sample = tokenizer.document(record(parts))
    assert sample.input_ids == [1, *intro, *[IMAGE] * 4, *rest, 2]
    assert sample.is_target == [False, *[True] * len(intro), *[False] * 4, *[True] * len(rest), True]


def test_the_worked_example_of_coyo(tokenizer: Tokenizer) -> None:
    """<image>a green tree</s>"""
    sample = tokenizer.document(record((A, "a green tree")))
    text = tokenizer.text_ids("a green tree")
    assert sample.input_ids == [1, *[IMAGE] * 4, *text, 2]
    assert sample.is_target == [False, *[False] * 4, *[True] * len(text), True]
    assert sample.images == [0]


def test_images_of_one_sentence_stack_up_in_front_of_it_in_file_order() -> None:
    found = place(["One.", "Two.", "Three."], [(2, A), (1, B), (2, C), (0, D), (2, E)])
    assert found == (D, "One.", B, "Two.", A, C, E, "Three.")


def test_six_of_eight_images_are_taken_by_their_place_in_the_file() -> None:
    said = [f"{number}." for number in range(8)]
    images = [(7 - number, image) for number, image in enumerate((A, B, C, D, E, F, G, H))]
    assert place(said, images) == ("0. 1.", F, "2.", E, "3.", D, "4.", C, "5.", B, "6.", A, "7.")
    assert place(said, images, max_images=1) == ("0. 1. 2. 3. 4. 5. 6.", A, "7.")


def test_a_literal_placeholder_is_words(tokenizer: Tokenizer) -> None:
    parts = place(["See <image> here.", "A ball."], [(1, A)])
    found = tokens(tokenizer, parts)
    assert found == [1, *tokenizer.text_ids("See <IMAGE> here."), *[IMAGE] * 4, *tokenizer.text_ids("A ball."), 2]


def test_placing_twice_gives_the_same_and_changes_nothing(tokenizer: Tokenizer) -> None:
    """VILA's loader edits the sentences that it keeps, so that the second epoch reads "<image><IMAGE>A red ball."."""
    said, images = ["Intro.", "A red ball."], [(1, A), (0, B)]
    before = copy.deepcopy((said, images))
    first = [order(said, images) for order in (place, pairs, image_first)]
    assert (said, images) == before
    assert [order(said, images) for order in (place, pairs, image_first)] == first
    assert tokens(tokenizer, place(said, images)) == tokens(tokenizer, place(said, images))


def test_an_image_that_no_word_follows_stays(tokenizer: Tokenizer) -> None:
    parts = place(["One.", "Two.", ""], [(1, A), (2, B), (2, C)])
    assert parts == ("One.", A, "Two.", B, C)
    assert tokens(tokenizer, parts)[-9:] == [*[IMAGE] * 8, 2]
    assert place(["", ""], [(0, A)]) == image_first([""], [(0, A)]) == (A,)


def test_truncation_cuts_a_trailing_image_whole(tokenizer: Tokenizer) -> None:
    parts = place(["Dog.", "Cat."], [(0, A), (1, B)])
    dog = tokenizer.text_ids("Dog.")
    for max_tokens in range(1 + 4 + len(dog), 1 + 4 + len(dog) + 4 + 1):
        assert tokens(tokenizer, parts, max_tokens=max_tokens) == [1, *[IMAGE] * 4, *dog]


@pytest.mark.parametrize("order", [place, pairs, image_first])
@pytest.mark.parametrize("match", [-1, 2, 1.0, True, "1", None])
def test_a_match_that_is_no_index_is_named(order: Callable[..., Any], match: Any) -> None:
    with pytest.raises(ValueError, match=rf"image 1 is matched to sentence {match!r}, .* index of one of the 2"):
        order(["One.", "Two."], [(0, A), (match, B)])


def test_the_worked_example_of_pairs() -> None:
    """text1 img1 text2 text3 img2 text4"""
    said = ["text1", "text2", "text3", "text4"]
    images = [(3, B), (1, A)]
    assert place(said, images) == ("text1", A, "text2 text3", B, "text4")
    assert pairs(said, images) == [(A, "text2"), (B, "text4")]
    assert image_first(said, images) == (A, B, "text1 text2 text3 text4")


def test_pairs_of_one_sentence_and_of_a_blank_one() -> None:
    assert pairs(["One.", " ", "Two."], [(2, A), (1, B), (2, C)]) == [(A, "Two."), (C, "Two.")]


def test_text_without_images_stays_as_it_is() -> None:
    assert place([" One. ", "", "Two"], []) == image_first([" One. ", "", "Two"], []) == (" One.   Two",)
    assert pairs(["One."], []) == []


@pytest.mark.slow
@given(document=documents)
def test_placed_as_vilas_loader_does(document: tuple[list[str], list[tuple[int, Image]]]) -> None:
    text, order = loader(*document)
    parts = place(*document)
    assert "".join("#" if isinstance(part, Image) else part for part in parts) == text
    assert [part for part in parts if isinstance(part, Image)] == order
    assert all(part != "" for part in parts)


@given(document=documents)
def test_every_order_shows_the_same_images_in_the_same_order(
    document: tuple[list[str], list[tuple[int, Image]]],
) -> None:
    said, images = document
    worded = [*said, "word"]
    shown = [part for part in place(worded, images) if isinstance(part, Image)]
    assert list(image_first(worded, images)[: len(shown)]) == shown
    in_pairs = list(chain.from_iterable(pairs([sentence or "x" for sentence in said], images)))
    blank = [match for match, _ in images if said[match] and not said[match].strip()]
    if not blank:
        assert in_pairs[::2] == shown
