"""Records to tokens: image placeholders are expanded and target tokens are marked. Pure."""

# T tokens of a sample

import copy
import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any

from transformers import PreTrainedTokenizerFast

from vila_ops.data.records import Dropped, Image, Part, Record
from vila_ops.data.text.rendering import Message, render, render_with_targets
from vila_ops.packages.tokenizer import IMAGE_TOKEN


class BadText(ValueError):
    """Text that cannot be encoded as UTF-8, so that no tokenizer can read it."""


@dataclass(frozen=True)
class Tokens:
    """One tokenised sample: token ids, target mask and images."""

    input_ids: list[int]
    """(T,); an image is `image_tokens` copies of the image token."""
    is_target: list[bool]
    """(T,): the target mask. The loss counts the prediction of a token whose value is True."""
    images: list[int]
    """Indices of the record's images that the placeholders stand for, in order."""


class Tokenizer:
    """A fast tokenizer with a chat template, and the token form of an image."""

    def __init__(self, fast: PreTrainedTokenizerFast, *, image_tokens: int, after_image: str) -> None:
        self.fast = fast
        self.image_tokens = image_tokens
        self.image_id: int = fast.convert_tokens_to_ids(IMAGE_TOKEN)
        if fast.eos_token_id is None:
            raise ValueError(f"the tokenizer of {fast.name_or_path} has no eos token; set it in its folder")
        self.eos_id: int = fast.eos_token_id
        self.bos: list[int] = [] if fast.bos_token_id is None else [fast.bos_token_id]
        """What a document begins with: bos. Nothing if the tokenizer has none, like Qwen's, as in VILA's loader."""
        self.context = self.bos or [self.eos_id]
        """What precedes text without a prompt: bos, or else eos, as in EleutherAI's evaluation harness."""
        self._controls = _control_tokens(fast)
        self._neutral = _neutral_forms(self._controls)
        self._any_control = re.compile("|".join(map(re.escape, self._neutral)))
        self.image = [self.image_id] * image_tokens + self.text_ids(after_image)
        """The ids of an image in a document."""

    def neutral(self, text: str) -> str:
        """The text with literal control tokens upper-cased, so that they are tokenised as words (VILA's rule).

        Control tokens are the special tokens and those that the chat template writes around turns. Other added tokens,
        such as <think> and <tool_call>, are vocabulary and stay. Raises BadText for a lone surrogate.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise BadText(
                f"{text[error.start]!r} at character {error.start} is half of a surrogate pair, which is not text; "
                f"fix the encoding of the source"
            ) from error
        if self._any_control.search(text):
            for token, changed in self._neutral.items():
                text = text.replace(token, changed)
        return text

    def spells_control(self, record: Record) -> bool:
        """Whether a text of the record has a control token, which `neutral` changes."""
        parts = (part for turn in record.turns for part in _runs(turn.parts))
        return any(isinstance(part, str) and self._any_control.search(part) is not None for part in parts)

    def text_ids(self, text: str) -> list[int]:
        """The ids of plain text, without special tokens."""
        ids: list[int] = self.fast(self.neutral(text), add_special_tokens=False)["input_ids"]
        return ids

    def document(self, record: Record, *, at_most: int | None = None) -> Tokens:
        """bos, then text and images in their order, then eos. All text tokens are targets, image tokens are not.

        The first token is no target, since nothing predicts it. Only the first `at_most` tokens are guaranteed, so
        that a huge record takes no longer than a large one.
        """
        ids, targets = list(self.bos), [False] * len(self.bos)
        images = 0
        for part in _runs(part for turn in record.turns for part in turn.parts):
            if at_most is not None and len(ids) >= at_most:
                break
            is_image = isinstance(part, Image)
            block = self.image if isinstance(part, Image) else self.text_ids(part[: self._characters(at_most)])
            images += is_image
            ids += block
            targets += [not is_image] * len(block)
        targets = [*targets, True]
        targets[0] = False
        return Tokens([*ids, self.eos_id], targets, list(range(images)))

    def chat(self, record: Record, *, at_most: int | None = None) -> Tokens:
        """A conversation through the chat template; targets are the assistant's answers and their ends of turn.

        It is rendered once and tokenised once; a token is a target if it contains any character of an answer. Raises
        ValueError, with the record's id, if the answers cannot be located. Only the first `at_most` tokens are
        guaranteed.
        """
        try:
            messages = [self._message(turn.role, turn.parts) for turn in record.turns]
            ids, targets = self._ids_and_targets(messages, at_most=at_most)
        except BadText:
            raise
        except ValueError as error:
            raise ValueError(f"record {record.id!r}: {error}") from error
        ids, targets = self._expand(ids, targets)
        return Tokens(ids, targets, list(range(ids.count(self.image_id) // self.image_tokens)))

    def prompt(self, turns: Sequence[tuple[str, tuple[Part, ...]]]) -> list[int]:
        """The ids of a conversation of (role, parts) with the generation prompt for the next answer; never empty."""
        messages = [self._message(role, parts) for role, parts in turns]
        text = render(self.fast, messages, prompt=True)
        ids: list[int] = self.fast(text, add_special_tokens=False)["input_ids"]
        self._check_images(messages, text, ids)
        return self._expand(ids, [False] * len(ids))[0] or self.context

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        """Ids that end an answer: eos, and the end-of-turn token of the chat template."""
        last = self._answer("Yes.")[-1]
        return frozenset({self.eos_id, last} if last in self._controls.values() else {self.eos_id})

    def answer_ids(self, text: str) -> list[int]:
        """The target ids of an answer after a prompt, without its end-of-turn token."""
        ids = self._answer(text)
        return ids[:-1] if ids[-1] in self.stop_ids else ids

    def decode(self, ids: list[int]) -> str:
        """The text of ids without special tokens."""
        text: str = self.fast.decode(ids, skip_special_tokens=True)
        return text

    def _answer(self, text: str) -> list[int]:
        messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": self.neutral(text)}]
        ids, targets = self._ids_and_targets(messages, at_most=None)
        return [token for token, target in zip(ids, targets, strict=True) if target]

    def _ids_and_targets(self, messages: list[Message], *, at_most: int | None) -> tuple[list[int], list[bool]]:
        """The ids of a conversation, with one id for each image, and their target mask."""
        ends = [token for token in self._controls if token not in (IMAGE_TOKEN, self.fast.bos_token)]
        rendered = render_with_targets(self.fast, messages, ends=ends)
        text = rendered.text[: self._characters(at_most)]
        encoding = self._untrimmed.encode(text, add_special_tokens=False)
        ids: list[int] = encoding.ids
        self._check_images(messages, rendered.text, ids, kept=text)
        controls = set(self._controls.values())
        targets = [False] * len(ids)
        offsets = encoding.offsets
        for first, last in rendered.spans:
            start = bisect_right(offsets, first, key=lambda offset: offset[1])
            stop = bisect_left(offsets, last, key=lambda offset: offset[0])
            if start < stop and ids[start] in controls and offsets[start][0] < first:
                start += 1  # the template's token, which covers blanks of the answer because it strips them
            if start >= stop and last <= len(text):
                raise ValueError(f"no token contains the answer {text[first:last]!r}; the tokenizer does not read it")
            targets[start:stop] = [token != self.image_id for token in ids[start:stop]]
        return ids, targets

    @cached_property
    def _untrimmed(self) -> Any:
        """The tokenizer without its post-processor, which may remove blanks from the offsets, as GPT-2's does."""
        backend = copy.deepcopy(self.fast.backend_tokenizer)
        backend.post_processor = None
        backend.no_truncation()
        backend.no_padding()
        return backend

    @cached_property
    def longest(self) -> int:
        """Most characters of one token."""
        return max(map(len, self.fast.get_vocab()))

    def _characters(self, tokens: int | None) -> int | None:
        """A number of characters that contains at least so many tokens."""
        return None if tokens is None else tokens * self.longest

    def _message(self, role: str, parts: tuple[Part, ...]) -> Message:
        content = [IMAGE_TOKEN if isinstance(part, Image) else self.neutral(part) for part in _runs(parts)]
        return {"role": role, "content": "".join(content)}

    def _check_images(self, messages: list[Message], text: str, ids: list[int], *, kept: str | None = None) -> None:
        count = sum(message["content"].count(IMAGE_TOKEN) for message in messages)
        if text.count(IMAGE_TOKEN) != count or ids.count(self.image_id) != (kept or text).count(IMAGE_TOKEN):
            raise ValueError(
                f"{count} images but {text.count(IMAGE_TOKEN)} placeholders after the chat template, of which "
                f"{ids.count(self.image_id)} are image tokens; the template must write every part of a turn"
            )

    def _expand(self, ids: list[int], targets: list[bool]) -> tuple[list[int], list[bool]]:
        """Ids and targets with `image_tokens` image tokens for each image."""
        out_ids: list[int] = []
        out_targets: list[bool] = []
        for token, target in zip(ids, targets, strict=True):
            copies = self.image_tokens if token == self.image_id else 1
            out_ids += [token] * copies
            out_targets += [target] * copies
        return out_ids, out_targets


def tokenise(record: Record, tokenizer: Tokenizer, *, max_tokens: int, split: bool) -> list[Tokens] | Dropped:
    """The samples of one record, none longer than max_tokens.

    A long document is truncated, or split into several samples if `split`. An image is never cut, and an image that no
    text follows is left out. A long conversation is truncated. A record is dropped if its text has half a surrogate
    pair (bad_text), or if it has no target tokens, or none before it is truncated (no_target).
    """
    is_document = record.turns[0].role == "document"
    if not is_document and all(turn.role != "assistant" for turn in record.turns):
        return Dropped(record.id, "no_target", detail="no turn is the assistant's, so there are no target tokens")
    many = split and is_document
    read = tokenizer.document if is_document else tokenizer.chat
    try:
        tokens = read(record, at_most=None if many else max_tokens)
    except BadText as error:
        return Dropped(record.id, "bad_text", detail=str(error))
    pieces = _pieces(tokens, tokenizer, max_tokens=max_tokens, many=many)
    kept = [piece for piece in pieces if any(piece.is_target)]
    told = f"no target in its first {max_tokens} tokens; shorten what comes before the answer, or raise max_tokens"
    return kept or Dropped(record.id, "no_target", detail=told)


def _pieces(tokens: Tokens, tokenizer: Tokenizer, *, max_tokens: int, many: bool) -> list[Tokens]:
    """Windows of at most max_tokens that end at a target, so that no image is cut or at the end of a sample."""
    ids, targets, images = tokens.input_ids, tokens.is_target, tokens.images
    pieces: list[Tokens] = []
    start = 0
    while start < len(ids) and (many or start == 0):
        head = tokenizer.bos if start else []
        end = min(len(ids), start + max_tokens - len(head))
        stop = next((i for i in range(end, start, -1) if targets[i - 1]), start)
        if stop > start:
            count = ids[start:stop].count(tokenizer.image_id) // tokenizer.image_tokens
            marked = [False] * len(head) + targets[start:stop]
            pieces.append(Tokens(head + ids[start:stop], [False, *marked[1:]], images[:count]))
        else:  # a run of images longer than a sample: continue at the next text
            stop = next((i for i in range(end, len(ids)) if targets[i]), len(ids))
            count = ids[start:stop].count(tokenizer.image_id) // tokenizer.image_tokens
        images = images[count:]
        start = stop
    return pieces


def _runs(parts: Iterable[Part]) -> Iterator[Part]:
    """Images, and neighbouring texts joined, so that a control token cannot be split over two texts."""
    for is_text, run in groupby(parts, key=lambda part: isinstance(part, str)):
        if is_text:
            yield "".join(map(str, run))
        else:
            yield from run


def _control_tokens(fast: PreTrainedTokenizerFast) -> dict[str, int]:
    """The tokens that text must not spell: special ones, and those that the chat template writes around turns."""
    added = {token: id for token, id in fast.get_added_vocab().items() if token.strip()}
    special = {token.content for token in fast.added_tokens_decoder.values() if token.special}
    special |= {*fast.all_special_tokens, IMAGE_TOKEN}
    framing = _framing(fast)
    return {token: id for token, id in added.items() if token in special or id in framing}


def _framing(fast: PreTrainedTokenizerFast) -> set[int]:
    """The ids that the chat template writes besides the words of a conversation."""
    words = [("system", "Be brief."), ("user", "What is it?"), ("assistant", "A dog."), ("user", "And now?")]
    messages = [{"role": role, "content": text} for role, text in words]
    ids: set[int] = set()
    for said in (messages, messages[1:], messages[1:3]):
        try:
            text = render(fast, said, prompt=said[-1]["role"] == "user")
        except ValueError:  # the template may refuse a system turn; what it refuses is reported where it is rendered
            continue
        ids |= set(fast(text, add_special_tokens=False)["input_ids"])
    return ids - {id for _, text in words for id in fast(text, add_special_tokens=False)["input_ids"]}


def _neutral_forms(controls: Iterable[str]) -> dict[str, str]:
    """For each control token, longest first, a form of it that contains no control token."""
    longest_first = sorted(controls, key=len, reverse=True)
    forms = {}
    for token in longest_first:
        candidates = (token.upper(), token.lower(), f"{token[0]} {token[1:]}", " ")
        forms[token] = next(form for form in candidates if not any(control in form for control in longest_first))
    return forms
