from itertools import groupby
from typing import Any

from hypothesis import example, given, settings
from hypothesis import strategies as st

from vila_ops.data.conversation import Tokenizer, Tokens, tokenise
from vila_ops.data.records import Dropped, Image, Part, Record, Turn

PICTURE = Image(b"")
CONTROLS = ["<image>", "<|im_end|>", "<|im_start|>", "<|endoftext|>", "<|im_", "end|>", "<ima", "ge>", "\n", " "]
IMAGE, END = 3, 2

words = st.text(st.characters(exclude_categories=["Cs"]), max_size=12) | st.sampled_from(CONTROLS)
parts = st.lists(words | st.just(PICTURE), min_size=1, max_size=5).map(tuple)
turns = st.lists(st.tuples(st.sampled_from(["system", "user", "assistant"]), parts), min_size=1, max_size=5)


def record(*turns: Turn) -> Record:
    return Record(id="r", object="o", turns=turns, category="", licence="", provenance="")


def document(*given: Part) -> Record:
    return record(Turn("document", given))


def by_hand(tokenizer: Tokenizer, said: list[tuple[Any, tuple[Part, ...]]]) -> tuple[str, list[tuple[int, int]]]:
    """ChatML written by hand: the text, and the character spans of what the assistant says."""
    text, spans = "", []
    for role, spoken in said:
        body = ""
        for is_text, group in groupby(spoken, key=lambda part: isinstance(part, str)):
            run = list(group)
            body += tokenizer.neutral("".join(map(str, run))) if is_text else "<image>" * len(run)
        text += f"<|im_start|>{role}\n"
        if role == "assistant":
            spans.append((len(text), len(text) + len(body) + len("<|im_end|>")))
        text += f"{body}<|im_end|>\n"
    return text, spans


@settings(max_examples=300, deadline=None)
@given(said=turns)
@example(said=[("user", ("<|im_", "end|>", "<ima", "ge>")), ("assistant", ("<image>", PICTURE, "é", "🦙"))])
def test_targets_are_exactly_the_assistants_tokens(tokenizer: Tokenizer, said: list[tuple[Any, Any]]) -> None:
    if all(role != "assistant" for role, _ in said):
        said = [*said, ("assistant", ("Yes.",))]
    text, spans = by_hand(tokenizer, said)
    encoded = tokenizer.fast(text, add_special_tokens=False, return_offsets_mapping=True)
    ids: list[int] = []
    targets: list[bool] = []
    for token, (start, stop) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
        inside = any(start < last and stop > first for first, last in spans)
        copies = 4 if token == IMAGE else 1
        ids += [token] * copies
        targets += [inside and token != IMAGE] * copies
    found = tokenizer.chat(record(*(Turn(role, given) for role, given in said)))
    assert found.input_ids == ids
    assert found.is_target == targets
    pictures = sum(isinstance(part, Image) for _, given in said for part in given)
    assert ids.count(IMAGE) == 4 * pictures
    assert found.images == list(range(pictures))
    assert ids.count(END) == len(said)
    prompt = tokenizer.prompt(said)
    assert prompt[: len(ids)] == ids
    assert tokenizer.fast.decode(prompt[len(ids) :]) == "<|im_start|>assistant\n"


@settings(max_examples=200, deadline=None)
@given(text=st.lists(words, max_size=6).map("".join))
def test_no_text_becomes_a_control_token_and_only_case_changes(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.text_ids(text)
    assert not set(ids) & {0, 1, 2, 3}
    assert tokenizer.fast.decode(ids).lower() == text.lower()


def test_text_without_control_tokens_is_left_alone(tokenizer: Tokenizer) -> None:
    text = "A <b>dog</b> | <|x|> image, STRASSE straße ﬁ"
    assert tokenizer.neutral(text) == text
    assert tokenizer.neutral("a <image> b<|im_end|>") == "a <IMAGE> b<|IM_END|>"


def test_a_document_by_hand(tokenizer: Tokenizer) -> None:
    a, b, newline = tokenizer.text_ids("Dog."), tokenizer.text_ids(" Cat"), tokenizer.text_ids("\n")
    assert len(newline) == 1
    found = tokenizer.document(document("Dog.", PICTURE, " Cat", PICTURE, PICTURE, "Dog."))
    picture = [*[IMAGE] * 4, *newline]
    assert found.input_ids == [1, *a, *picture, *b, *picture, *picture, *a, 2]
    text, skip = [True] * len(a), [False] * 5
    assert found.is_target == [False, *text, *skip, *[True] * len(b), *skip, *skip, *text, True]
    assert found.images == [0, 1, 2]


def check_pieces(pieces: list[Tokens], whole: Tokens, *, max_tokens: int) -> None:
    for number, piece in enumerate(pieces):
        assert 0 < len(piece.input_ids) <= max_tokens
        assert piece.input_ids[0] == 1
        assert not piece.is_target[0]
        assert piece.is_target[-1]
        blocks = [len(list(run)) for is_image, run in groupby(piece.input_ids, lambda t: t == IMAGE) if is_image]
        assert all(length % 4 == 0 for length in blocks)
        assert sum(blocks) == 4 * len(piece.images)
        if number == 0:
            assert piece.input_ids == whole.input_ids[: len(piece.input_ids)]


@settings(max_examples=300, deadline=None)
@given(given=st.lists(words | st.just(PICTURE), min_size=1, max_size=25).map(tuple), max_tokens=st.integers(12, 60))
def test_long_documents_are_cut_between_pictures_and_nothing_learnt_is_lost(
    tokenizer: Tokenizer, given: tuple[Part, ...], max_tokens: int
) -> None:
    made = document(*given)
    whole = tokenizer.document(made)
    cut = tokenise(made, tokenizer, max_tokens=max_tokens, split=False)
    if isinstance(cut, Dropped):
        assert not any(whole.is_target[:max_tokens])
    else:
        (piece,) = cut
        check_pieces([piece], whole, max_tokens=max_tokens)
        assert sum(piece.is_target) == sum(whole.is_target[:max_tokens])
    pieces = tokenise(made, tokenizer, max_tokens=max_tokens, split=True)
    assert not isinstance(pieces, Dropped)
    check_pieces(pieces, whole, max_tokens=max_tokens) if not isinstance(cut, Dropped) else None
    learnt = [t for p in pieces for t, is_target in zip(p.input_ids, p.is_target, strict=True) if is_target]
    assert learnt == [t for t, is_target in zip(whole.input_ids, whole.is_target, strict=True) if is_target]
    images = [image for piece in pieces for image in piece.images]
    assert images == sorted(set(images))


def test_pictures_stay_with_their_places_when_some_are_passed_over(tokenizer: Tokenizer) -> None:
    """Three pictures in a row do not fit into 12 tokens: they are passed over, and the fourth is still the fourth."""
    made = document("Dog.", *[PICTURE] * 3, "Cat.", PICTURE, "Dog.")
    pieces = tokenise(made, tokenizer, max_tokens=12, split=True)
    assert isinstance(pieces, list)
    assert [piece.images for piece in pieces if piece.images] == [[3]]


def test_a_long_conversation_is_truncated_and_without_an_answer_left_it_is_dropped(tokenizer: Tokenizer) -> None:
    said = record(Turn("user", ("Dog?",)), Turn("assistant", ("Yes. " * 30,)), Turn("user", ("Cat?",)))
    (piece,) = tokenise(said, tokenizer, max_tokens=40, split=True)
    assert len(piece.input_ids) == 40
    assert piece.is_target[-1]
    question = record(Turn("user", ("Dog? " * 30,)), Turn("assistant", ("Yes.",)))
    assert tokenise(question, tokenizer, max_tokens=40, split=True) == Dropped("r", "no_target")
