import os
import re
from collections.abc import Callable
from itertools import groupby
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from vila_ops.data.records import Dropped, Image, Part, Record, Turn
from vila_ops.data.text.conversation import BadText, Tokenizer, Tokens, tokenise
from vila_ops.packages.tokenizer import TEMPLATE_TOKENS

SHOWN = Image(b"")
CONTROLS = ["<image>", "<|im_end|>", "<|im_start|>", "<|endoftext|>", "<|im_", "end|>", "<ima", "ge>", "\n", " "]
CONTROLS += ["</s>", "</", "s>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|begin_of_text|>"]
ODD = [
    "",
    "\0",
    "\r\n",
    "\n\n",
    "\t",
    "\x85",
    "\u3000",
    "\u200b",
    "\u2028",
    "\ufeff",
    "é",
    "e\u0301",
    "ß",
    "ŉ",
    "\U0010ffff",
]
ODD += [
    "\u202eשלום",
    "مرحبا",
    "👩\u200d👩\u200d👧",
    "🏳️\u200d🌈",
    "答え",
    "USER:",
    "ASSISTANT:",
    ".",
    "Yes",
    " No",
    "{{ bos_token }}",
]
IMAGE, END = 3, 2

words = st.text(st.characters(exclude_categories=["Cs"]), max_size=12) | st.sampled_from(CONTROLS)
parts = st.lists(words | st.just(SHOWN), min_size=1, max_size=5).map(tuple)
spoken = st.lists(st.sampled_from([*CONTROLS, *ODD, SHOWN]) | st.text(max_size=4), max_size=4).map(tuple)
turns = st.lists(st.tuples(st.sampled_from(["user", "assistant", "system"]), spoken), max_size=6)

Said = list[tuple[Any, tuple[Part, ...]]]
Make = Callable[..., PreTrainedTokenizerFast]


def record(*turns: Turn) -> Record:
    return Record(id="r", object="o", turns=turns, category="", licence="", provenance="")


def document(*given: Part) -> Record:
    return record(Turn("document", given))


def body(tokenizer: Tokenizer, parts: tuple[Part, ...]) -> str:
    """What is said, an image as its placeholder."""
    text = ""
    for is_text, group in groupby(parts, key=lambda part: isinstance(part, str)):
        run = list(group)
        text += tokenizer.neutral("".join(map(str, run))) if is_text else "<image>" * len(run)
    return text


SENTENCE = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
)

VILA_SYSTEM = (
    "<|start_header_id|>system<|end_header_id|>\n\nYou are a helpful language and vision assistant. You are able to "
    "understand the visual content that the user provides, and assist the user with a variety of tasks using natural "
    "language.<|eot_id|>"
)
"""As in NVlabs' conversation.py."""


def by_hand(template: str, said: list[tuple[str, str]], bos: str) -> list[tuple[str, bool]]:
    """The templates written by hand: pieces of text, and whether they are the assistant's."""
    if template == "chatml":
        return [
            piece
            for role, text in said
            for piece in ((f"<|im_start|>{role}\n", False), (f"{text}<|im_end|>", role == "assistant"), ("\n", False))
        ]
    if template == "llama_3":
        opened = [(f"<|start_header_id|>{role}<|end_header_id|>\n\n", False) for role, _ in said]
        closed = [(f"{text.strip()}<|eot_id|>", role == "assistant") for role, text in said]
        return [(bos, False), *[piece for pair in zip(opened, closed, strict=True) for piece in pair]]
    if template == "hermes_2":
        silent = [] if said[0][0] == "system" else [("<|im_start|>system\nAnswer the questions.<|im_end|>", False)]
        each = [
            piece
            for role, text in said
            for piece in ((f"<|im_start|>{role}\n", False), (f"{text}<|im_end|>", role == "assistant"))
        ]
        return [*silent, *each]
    if template == "llama_3_vila":
        opened = [(f"<|start_header_id|>{role}<|end_header_id|>\n\n", False) for role, _ in said]
        ends = ["<|eot_id|>"] * len(said)
        ends[-1] = "<|end_of_text|>" if said[-1][0] == "assistant" else "<|eot_id|>"
        closed = [(text + end, role == "assistant") for (role, text), end in zip(said, ends, strict=True)]
        first = [(bos, False)] if said[0][0] == "system" else [(bos + VILA_SYSTEM, False)]
        return [*first, *[piece for pair in zip(opened, closed, strict=True) for piece in pair]]
    if template == "plain":
        seen = [
            (text + "\n", True) if role == "assistant" else ("<image>" * text.count("<image>"), False)
            for role, text in said
        ]
        return [(bos, False), *seen]
    pieces = [(bos, False)] if said[0][0] == "system" else [(bos + SENTENCE, False)]
    for role, text in said:
        if role == "assistant":
            pieces += [("ASSISTANT:", False), (f" {text}</s>", True)]
        else:
            pieces.append((f"USER: {text} " if role == "user" else f"{text} ", False))
    return pieces


def tokens_by_hand(fast: PreTrainedTokenizerFast, pieces: list[tuple[str, bool]]) -> tuple[list[int], list[bool]]:
    """Byte by byte, without offsets: a byte-level token is as many bytes long as its name has characters.

    Between control tokens, each run of text is tokenised for itself.
    """
    are_targets = [flag for text, flag in pieces for _ in text.encode()]
    controls = fast.get_added_vocab()
    ids: list[int] = []
    targets: list[bool] = []
    place = 0
    for piece in re.split(f"({'|'.join(map(re.escape, controls))})", "".join(text for text, _ in pieces)):
        own = [controls[piece]] if piece in controls else fast(piece, add_special_tokens=False)["input_ids"]
        for token, name in zip(own, fast.convert_ids_to_tokens(own), strict=True):
            stop = place + len(name)  # control tokens are ASCII
            ids.append(token)
            targets.append(any(are_targets[place:stop]))
            place = stop
    assert place == len(are_targets)
    return ids, targets


@pytest.mark.slow
@pytest.mark.parametrize("like", ["tiny", "llama_3"])
@pytest.mark.parametrize("template", TEMPLATE_TOKENS)
def test_targets_are_exactly_the_assistants_tokens(fast_with: Make, template: str, like: str) -> None:
    """In 100 conversations of each kind, in 625 with VILA_FUZZ (`make faults`)."""
    fast = fast_with(template, like=like)
    tokenizer = Tokenizer(fast, image_tokens=4, after_image="\n")

    controls = set(fast.get_added_vocab().values())

    @settings(max_examples=625 if "VILA_FUZZ" in os.environ else 100, deadline=None)
    @given(before=turns, answer=spoken, after=turns)
    @example(before=[("user", ("<|im_", "end|>", "<ima", "ge>"))], answer=("<image>", SHOWN, "é", "🦙"), after=[])
    @example(before=[], answer=("\n\nYes.\n\n",), after=[("assistant", ("",)), ("system", ("\n",))])
    def check(before: Said, answer: tuple[Part, ...], after: Said) -> None:
        said = [*before, ("assistant", answer), *after]
        pieces = by_hand(template, [(role, body(tokenizer, parts)) for role, parts in said], fast.bos_token)
        found = tokenizer.chat(record(*(Turn(role, parts) for role, parts in said)))
        images = sum(isinstance(part, Image) for _, parts in said for part in parts)
        assert found.images == list(range(images))
        ids, targets = tokens_by_hand(fast, pieces)
        assert ids.count(tokenizer.image_id) == images
        silent = [(role, "<image>" * sum(isinstance(part, Image) for part in parts)) for role, parts in said]
        bare, _ = tokens_by_hand(fast, by_hand(template, silent, fast.bos_token))
        assert [token for token in ids if token in controls] == [token for token in bare if token in controls]
        copies = [4 if token == tokenizer.image_id else 1 for token in ids]
        wanted = [target and token != tokenizer.image_id for token, target in zip(ids, targets, strict=True)]
        assert found.input_ids == [token for token, count in zip(ids, copies, strict=True) for _ in range(count)]
        assert found.is_target == [target for target, count in zip(wanted, copies, strict=True) for _ in range(count)]

    check()


@pytest.mark.parametrize("like", ["tiny", "llama_3"])
@pytest.mark.parametrize("template", TEMPLATE_TOKENS)
def test_a_prompt_and_the_target_tokens_are_what_is_trained(fast_with: Make, template: str, like: str) -> None:
    """Generation sees the tokens that training saw, up to the answer, and stops where the answer's turn ends."""
    tokenizer = Tokenizer(fast_with(template, like=like), image_tokens=4, after_image="")
    said: Said = [
        ("system", ("Be brief.",)),
        ("user", (SHOWN, "What is it?")),
        ("assistant", ("A dog 🦙.",)),
        ("user", ("And ", SHOWN, "?\n")),
        ("assistant", ("A cat.",)),
    ]
    for stop in (3, 5):
        trained = tokenizer.chat(record(*(Turn(role, parts) for role, parts in said[:stop])))
        prompt = tokenizer.prompt(said[: stop - 1])
        assert trained.input_ids[: len(prompt)] == prompt
        end = len(trained.is_target) - trained.is_target[::-1].index(True)
        assert all(trained.is_target[len(prompt) : end])
        answer = trained.input_ids[len(prompt) : end]
        if template != "plain":
            assert answer.pop() in tokenizer.stop_ids
        assert not set(answer) & tokenizer.stop_ids
        assert tokenizer.decode(answer).strip() == said[stop - 1][1][0]
        assert tokenizer.answer_ids(str(said[stop - 1][1][0])) == answer


def test_an_answer_ends_at_eos_and_at_the_end_of_a_turn(fast_with: Make) -> None:
    stops = {}
    for template in TEMPLATE_TOKENS:
        tokenizer = Tokenizer(fast_with(template), image_tokens=4, after_image="")
        stops[template] = tokenizer.fast.convert_ids_to_tokens(sorted(tokenizer.stop_ids))
    eos = ["<|im_end|>"]
    assert stops == {
        "chatml": eos,
        "hermes_2": eos,
        "llama_3": [*eos, "<|eot_id|>"],
        "llama_3_vila": [*eos, "<|end_of_text|>"],
        "plain": eos,
        "vicuna_v1": [*eos, "</s>"],
    }


def test_a_control_token_that_swallows_blanks_is_not_the_assistants(fast_with: Make) -> None:
    """Phi-3's `<|assistant|>` strips the blanks behind it, into the answer."""
    template = "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}{% endfor %}"
    fast = fast_with(template)
    fast.add_tokens([AddedToken(f"<|{name}|>", rstrip=True, special=True) for name in ("user", "assistant", "end")])
    tokenizer = Tokenizer(fast, image_tokens=4, after_image="")
    found = tokenizer.chat(record(Turn("user", ("Dog?",)), Turn("assistant", ("  Yes.",))))
    target_ids = [token for token, target in zip(found.input_ids, found.is_target, strict=True) if target]
    assert fast.decode(target_ids) == "Yes.<|end|>"


def test_blanks_at_the_end_of_an_answer_are_learnt(fast_with: Make) -> None:
    """A post-processor like Llama 3's trims them off the offsets, and this template marks nothing behind them."""
    marked = "{% generation %}{{ m.content }}{% endgeneration %}"
    fast = fast_with(f"{{% for m in messages %}}{marked}{{{{ '</s>' }}}}{{% endfor %}}", like="llama_3")
    found = Tokenizer(fast, image_tokens=4, after_image="").chat(record(Turn("assistant", ("Yes. ",))))
    target_ids = [token for token, target in zip(found.input_ids, found.is_target, strict=True) if target]
    assert fast.decode(target_ids) == "Yes. "


def test_a_mask_that_cannot_be_built_names_the_record(fast_with: Make) -> None:
    tokenizer = Tokenizer(
        fast_with("{% for m in messages %}{{ m.content }}{% endfor %}"), image_tokens=4, after_image=""
    )
    with pytest.raises(ValueError, match=r"record 'r': the chat template writes '' after an answer and no end-of-turn"):
        tokenizer.chat(record(Turn("user", ("Dog?",)), Turn("assistant", ("Yes.",))))


def test_a_template_that_loses_a_image_is_refused(fast_with: Make) -> None:
    template = "{% for m in messages %}{{ (m.content if m.role == 'assistant' else '') + '</s>' }}{% endfor %}"
    tokenizer = Tokenizer(fast_with(template), image_tokens=4, after_image="")
    with pytest.raises(ValueError, match="record 'r': 1 images but 0 placeholders"):
        tokenizer.chat(record(Turn("user", (SHOWN,)), Turn("assistant", ("Yes.",))))


@pytest.mark.parametrize("role", ["document", "assistant", "user"])
def test_half_a_surrogate_pair_is_dropped_with_its_place(tokenizer: Tokenizer, role: Any) -> None:
    broken = record(Turn(role, ("A \ud83d dog",)), Turn("assistant", ("Yes.",)))
    found = tokenise(broken, tokenizer, max_tokens=99, split=True)
    assert isinstance(found, Dropped)
    assert (found.reason, found.id) == ("bad_text", "r")
    assert "'\\ud83d' at character 2" in found.detail
    with pytest.raises(BadText):
        tokenizer.prompt([("user", ("\ud83d",))])


def test_a_conversation_without_an_answer_is_dropped(tokenizer: Tokenizer) -> None:
    found = tokenise(record(Turn("user", ("Dog?",))), tokenizer, max_tokens=99, split=True)
    assert isinstance(found, Dropped)
    assert found.reason == "no_target"


@pytest.mark.parametrize("role", ["document", "assistant", "user"])
@pytest.mark.parametrize("piece", ["A dog and a cat. ", "a", "\n", "👩\u200d👩\u200d👧", "<image>"])
def test_text_of_many_megabytes_is_truncated_as_shorter_text_is(tokenizer: Tokenizer, role: Any, piece: str) -> None:
    def samples(length: int) -> list[Tokens] | Dropped:
        text = piece * (length // len(piece.encode()))
        said = record(Turn(role, (text, SHOWN)), Turn("document" if role == "document" else "assistant", ("Yes.",)))
        return tokenise(said, tokenizer, max_tokens=256, split=False)

    assert samples(10_000_000) == samples(20_000)


@given(text=st.lists(words, max_size=6).map("".join))
def test_no_text_becomes_a_control_token_and_only_case_changes(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.text_ids(text)
    assert not set(ids) & {0, 1, 2, 3}
    assert tokenizer.fast.decode(ids).lower() == text.lower()


def test_text_without_control_tokens_is_left_alone(tokenizer: Tokenizer) -> None:
    text = "A <b>dog</b> | <|x|> image, STRASSE straße ﬁ"
    assert tokenizer.neutral(text) == text
    assert tokenizer.neutral("a <image> b<|im_end|>") == "a <IMAGE> b<|IM_END|>"


def test_a_control_token_without_letters_and_one_in_both_cases_are_read_as_words(fast_with: Make) -> None:
    fast = fast_with("chatml")
    fast.add_tokens(["<|1|>", "<a>", "<A>", "§", "   "], special_tokens=True)
    tokenizer = Tokenizer(fast, image_tokens=4, after_image="")
    assert tokenizer.neutral("<|1|> <a>§<A>   ") == "< |1|> < a> < A>   "
    assert not set(tokenizer.text_ids("<|1|><a>§<A>")) & set(fast.get_added_vocab().values())


@pytest.mark.parametrize("after_image", ["", "\n"])
def test_a_document_by_hand(tokenizer: Tokenizer, after_image: str) -> None:
    tokenizer = Tokenizer(tokenizer.fast, image_tokens=4, after_image=after_image)
    a, b, after = tokenizer.text_ids("Dog."), tokenizer.text_ids(" Cat"), tokenizer.text_ids(after_image)
    assert len(after) == len(after_image)
    found = tokenizer.document(document("Do", "g.", SHOWN, " Cat", SHOWN, SHOWN, "Dog."))
    shown = [*[IMAGE] * 4, *after]
    assert found.input_ids == [1, *a, *shown, *b, *shown, *shown, *a, 2]
    text, skip = [True] * len(a), [False] * len(shown)
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


@pytest.mark.slow
@given(given=st.lists(words | st.just(SHOWN), min_size=1, max_size=25).map(tuple), max_tokens=st.integers(12, 60))
def test_long_documents_are_cut_between_images_and_nothing_learnt_is_lost(
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
    targets = [t for p in pieces for t, is_target in zip(p.input_ids, p.is_target, strict=True) if is_target]
    assert targets == [t for t, is_target in zip(whole.input_ids, whole.is_target, strict=True) if is_target]
    images = [image for piece in pieces for image in piece.images]
    assert images == sorted(set(images))


def test_images_stay_with_their_places_when_some_are_passed_over(tokenizer: Tokenizer) -> None:
    """Three images in a row do not fit into 12 tokens: they are passed over, and the fourth is still the fourth."""
    made = document("Dog.", *[SHOWN] * 3, "Cat.", SHOWN, "Dog.")
    pieces = tokenise(made, tokenizer, max_tokens=12, split=True)
    assert isinstance(pieces, list)
    assert [piece.images for piece in pieces if piece.images] == [[3]]


def test_a_long_conversation_is_truncated_and_without_an_answer_left_it_is_dropped(tokenizer: Tokenizer) -> None:
    said = record(Turn("user", ("Dog?",)), Turn("assistant", ("Yes. " * 30,)), Turn("user", ("Cat?",)))
    (piece,) = tokenise(said, tokenizer, max_tokens=40, split=True)
    assert len(piece.input_ids) == 40
    assert piece.is_target[-1]
    question = record(Turn("user", ("Dog? " * 30,)), Turn("assistant", ("Yes.",)))
    dropped = tokenise(question, tokenizer, max_tokens=40, split=True)
    assert isinstance(dropped, Dropped)
    assert (dropped.id, dropped.reason) == ("r", "no_target")
    assert "no target in its first 40 tokens; shorten what comes before the answer" in dropped.detail


THINKS = ["<think>", "</think>", "<tool_call>", "<|box|>"]


def test_added_tokens_that_are_no_control_tokens_stay_in_text_and_are_targets(fast_with: Make) -> None:
    """Qwen3's <think> and </think> have `special: false` in its tokenizer.json."""
    fast = fast_with("chatml")
    fast.add_tokens([AddedToken(token, special=False, normalized=False) for token in THINKS])
    tokenizer = Tokenizer(fast, image_tokens=4, after_image="")
    answer = "<think>\nIt looks red.\n</think>\n\n<|box|>Red."
    made = record(Turn("user", (SHOWN, "Which <think>?")), Turn("assistant", (answer,)))
    found = tokenizer.chat(made)
    targets = [token for token, target in zip(found.input_ids, found.is_target, strict=True) if target]
    assert fast.decode(targets) == answer + "<|im_end|>"
    assert {fast.convert_tokens_to_ids(token) for token in THINKS[:2]} < set(targets)
    assert tokenizer.answer_ids(answer) == targets[:-1]
    assert tokenizer.decode(targets[:-1]) == answer
    assert not tokenizer.spells_control(made)
    assert fast.convert_tokens_to_ids("<think>") in tokenizer.text_ids("a <think> b")


def test_special_tokens_and_those_that_the_template_writes_are_neutralised_and_counted(fast_with: Make) -> None:
    template = (
        "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    )
    fast = fast_with(template)
    framing = [f"<|{name}|>" for name in ("system", "user", "assistant", "end")]
    fast.add_tokens([AddedToken(token, special=False, normalized=False) for token in [*framing, *THINKS]])
    tokenizer = Tokenizer(fast, image_tokens=4, after_image="")
    assert tokenizer.neutral("".join([*framing, *THINKS, "</s>"])) == "".join(
        [*(token.upper() for token in framing), *THINKS, "</S>"]
    )
    for said, is_spelt in (("</s>", True), ("<|user|>", True), ("<think></think><|tool_call|>", False)):
        assert tokenizer.spells_control(record(Turn("user", ("Q?",)), Turn("assistant", (said,)))) is is_spelt
    split = record(Turn("user", ("Q?",)), Turn("assistant", ("<|us", "er|>")))
    assert tokenizer.spells_control(split)


def without_bos(fast: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """As Qwen2.5's tokenizer_config.json has it."""
    fast.bos_token = None
    return fast


@pytest.mark.parametrize("like", ["tiny", "llama_3"])
@pytest.mark.parametrize("template", ["chatml", "vicuna_v1", "llama_3", "plain"])
def test_without_a_bos_token_conversations_are_the_same_but_for_it(fast_with: Make, template: str, like: str) -> None:
    with_it = Tokenizer(fast_with(template, like=like), image_tokens=4, after_image="")
    tokenizer = Tokenizer(without_bos(fast_with(template, like=like)), image_tokens=4, after_image="")
    said = record(Turn("user", (SHOWN, "Dog?")), Turn("assistant", ("Yes.",)), Turn("user", ("And now?",)))
    first = 0 if template == "chatml" else 1
    assert tokenizer.chat(said).input_ids == with_it.chat(said).input_ids[first:]
    assert tokenizer.chat(said).is_target == with_it.chat(said).is_target[first:]
    asked = [(turn.role, turn.parts) for turn in said.turns[:1]]
    assert tokenizer.prompt(asked) == with_it.prompt(asked)[first:]
    assert tokenizer.stop_ids == with_it.stop_ids
    assert tokenizer.prompt([("user", ("Dog?",))])


def test_without_a_bos_token_a_document_begins_with_its_first_part(fast_with: Make) -> None:
    """As VILA's LazyMMC4Dataset: `... if self.tokenizer.bos_token_id is not None`. Nothing predicts the first token."""
    tokenizer = Tokenizer(without_bos(fast_with("chatml")), image_tokens=4, after_image="")
    text = tokenizer.text_ids("Dog.")
    assert len(text) > 1
    found = tokenizer.document(document("Dog.", SHOWN, "Dog."))
    assert found.input_ids == [*text, *[IMAGE] * 4, *text, END]
    assert found.is_target == [False, *[True] * (len(text) - 1), *[False] * 4, *[True] * len(text), True]
    assert tokenizer.document(document(SHOWN, "Dog.")).is_target == [*[False] * 4, *[True] * len(text), True]
    assert (tokenizer.bos, tokenizer.context) == ([], [END])


def test_without_a_bos_token_a_long_document_is_cut_with_all_its_text(fast_with: Make) -> None:
    """But for an eos that a cut leaves alone: nothing predicts it."""
    tokenizer = Tokenizer(without_bos(fast_with("chatml")), image_tokens=4, after_image="")
    made = document(*["Dog. Cat. ", SHOWN] * 9, "Dog.")
    whole = tokenizer.document(made)
    pieces = tokenise(made, tokenizer, max_tokens=20, split=True)
    assert isinstance(pieces, list)
    ids = [token for piece in pieces for token in piece.input_ids]
    assert [*ids, END] == whole.input_ids
    assert [image for piece in pieces for image in piece.images] == whole.images
    assert all(len(piece.input_ids) <= 20 and not piece.is_target[0] for piece in pieces)


def test_a_tokenizer_without_an_eos_token_is_refused(fast_with: Make) -> None:
    fast = fast_with("chatml")
    fast.eos_token = None
    with pytest.raises(ValueError, match="has no eos token"):
        Tokenizer(fast, image_tokens=4, after_image="")
