"""What two sequences have in common, and which sequences are kept."""

from itertools import takewhile

import torch
from hypothesis import given
from hypothesis import strategies as st

from vila_ops.generate.torch_engine.prefixes import MAX_SEQUENCES, Layers, PrefixCache, TokenSequence

IMAGE = 9
Piece = int | bytes
"""A token of text, or an image of three tokens."""
pieces = st.lists(st.sampled_from([1, 2, b"cat", b"dog"]), max_size=6)


def sequence(parts: list[Piece], salt: str = "") -> TokenSequence:
    ids = [token for part in parts for token in ([part] if isinstance(part, int) else [IMAGE] * 3)]
    images = tuple(part for part in parts if isinstance(part, bytes))
    return TokenSequence.of(ids, images, salt=salt, image_id=IMAGE, image_tokens=3)


def layers(length: int) -> Layers:
    return [(torch.zeros(1, length, 2), torch.zeros(1, length, 2))]


@given(pieces, pieces)
def test_the_common_tokens_are_those_of_the_common_pieces(one: list[Piece], other: list[Piece]) -> None:
    alike = takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))
    expected = sum(1 if isinstance(part, int) else 3 for part, _ in alike)
    assert sequence(one).common(sequence(other)) == expected
    assert sequence(one, "a").common(sequence(other, "b")) == 0


def test_the_last_token_and_an_image_that_is_cut_are_read_again() -> None:
    kept = PrefixCache(max_tokens=100)
    kept.keep(sequence([1, b"cat", 2]), layers(5))
    assert kept.longest(sequence([1, b"cat", 2, 2]))[0] == 5
    assert kept.longest(sequence([1, b"cat", 2]))[0] == 4
    assert kept.longest(sequence([1, b"cat"]))[0] == 1
    assert kept.longest(sequence([2])) == (0, [])


def test_a_sequence_takes_the_place_of_those_with_which_it_begins() -> None:
    kept = PrefixCache(max_tokens=100)
    kept.keep(sequence([1, 2]), layers(2))
    assert not kept.wants(sequence([1]))
    assert kept.wants(sequence([1, 2, 1]))
    kept.keep(sequence([1, 2, 1]), layers(3))
    assert kept.num_tokens == 3


def test_the_sequences_that_were_used_longest_ago_go_first() -> None:
    kept = PrefixCache(max_tokens=9)
    for first in (1, 2, 3):
        kept.keep(sequence([first, 5, 5]), layers(3))
    assert kept.longest(sequence([1, 5, 5, 5]))[0] == 3  # used now
    kept.keep(sequence([4, 5, 5]), layers(3))
    assert [kept.longest(sequence([first, 5, 5, 5]))[0] for first in (1, 2, 3, 4)] == [3, 0, 3, 3]
    assert not kept.wants(sequence([1] * 10))
    many = PrefixCache(max_tokens=10**6)
    for first in range(2 * MAX_SEQUENCES):
        many.keep(sequence([first + 10, 1]), layers(2))
    assert many.num_tokens == 2 * MAX_SEQUENCES
