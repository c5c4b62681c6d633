"""Records to tokens: image placeholders expanded, targets marked. Pure apart from reading the tokenizer."""

# T tokens of a sample

from dataclasses import dataclass
from itertools import groupby
from typing import Any

from transformers import PreTrainedTokenizerFast

from vila_ops.data.records import Dropped, Image, Part, Record
from vila_ops.packages.tokenizer import IMAGE_TOKEN


@dataclass(frozen=True)
class Tokens:
    """One tokenised sample: ids, which of them are learnt, and where its pictures stand."""

    input_ids: list[int]
    """(T,); a picture is `image_tokens` copies of the image token."""
    is_target: list[bool]
    """(T,): whether the loss is taken where this token is predicted."""
    images: list[int]
    """Which of the record's pictures the placeholders stand for, in order of appearance."""


class Tokenizer:
    """A fast tokenizer whose chat template marks the assistant's words, and the length of a picture in tokens."""

    def __init__(self, fast: PreTrainedTokenizerFast, *, image_tokens: int) -> None:
        self.fast = fast
        self.image_tokens = image_tokens
        self.image_id: int = fast.convert_tokens_to_ids(IMAGE_TOKEN)
        if fast.bos_token_id is None or fast.eos_token_id is None:
            raise ValueError(
                f"the tokenizer of {fast.name_or_path} names no bos or no eos token; set both in its folder"
            )
        self.bos_id: int = fast.bos_token_id
        self.eos_id: int = fast.eos_token_id
        self._controls = sorted(fast.get_added_vocab(), key=len, reverse=True)

    def neutral(self, text: str) -> str:
        """Text whose literal control tokens are upper-cased, so that they are read as words (VILA's rule)."""
        for token in self._controls:
            if token in text:
                changed = token.upper()
                text = text.replace(token, changed if changed != token else token.lower())
        return text

    def text_ids(self, text: str) -> list[int]:
        """The ids of plain text, without special tokens."""
        ids: list[int] = self.fast(self.neutral(text), add_special_tokens=False)["input_ids"]
        return ids

    def document(self, record: Record) -> Tokens:
        """bos, then text and pictures in their order, then eos; every text token is a target.

        A picture is followed by a newline that is not learnt.
        """
        ids, targets = [self.bos_id], [False]
        images: list[int] = []
        for part in (part for turn in record.turns for part in turn.parts):
            if isinstance(part, Image):
                block = [self.image_id] * self.image_tokens + self.text_ids("\n")
                images.append(len(images))
                ids += block
                targets += [False] * len(block)
            else:
                block = self.text_ids(part)
                ids += block
                targets += [True] * len(block)
        return Tokens([*ids, self.eos_id], [*targets, True], images)

    def chat(self, record: Record) -> Tokens:
        """A conversation through the chat template; only the assistant's tokens are targets."""
        rendered = self._render([_message(turn.role, turn.parts, self) for turn in record.turns], prompt=False)
        count = sum(isinstance(part, Image) for turn in record.turns for part in turn.parts)
        ids, targets = self._expand(rendered["input_ids"], [bool(m) for m in rendered["assistant_masks"]], count)
        if not any(targets):
            raise ValueError(f"record {record.id!r}: the chat template marks no assistant token")
        return Tokens(ids, targets, list(range(count)))

    def prompt(self, turns: list[tuple[str, tuple[Part, ...]]]) -> list[int]:
        """The ids of a conversation (role, parts), opened for the assistant's next answer."""
        rendered = self._render([_message(role, parts, self) for role, parts in turns], prompt=True)
        count = sum(isinstance(part, Image) for _, parts in turns for part in parts)
        ids, _ = self._expand(rendered["input_ids"], [False] * len(rendered["input_ids"]), count)
        return ids

    def decode(self, ids: list[int]) -> str:
        """Text of ids, special tokens left out."""
        text: str = self.fast.decode(ids, skip_special_tokens=True)
        return text

    def _render(self, messages: list[dict[str, Any]], *, prompt: bool) -> dict[str, list[int]]:
        rendered: dict[str, list[int]] = self.fast.apply_chat_template(
            messages,
            tokenize=True,
            return_dict=True,
            add_generation_prompt=prompt,
            return_assistant_tokens_mask=not prompt,
        )
        return rendered

    def _expand(self, ids: list[int], targets: list[bool], count: int) -> tuple[list[int], list[bool]]:
        if ids.count(self.image_id) != count:
            raise ValueError(f"{count} images but {ids.count(self.image_id)} placeholders after the chat template")
        out_ids: list[int] = []
        out_targets: list[bool] = []
        for token, target in zip(ids, targets, strict=True):
            copies = self.image_tokens if token == self.image_id else 1
            out_ids += [token] * copies
            out_targets += [target and token != self.image_id] * copies
        return out_ids, out_targets


def tokenise(record: Record, tokenizer: Tokenizer, *, max_tokens: int, split: bool) -> list[Tokens] | Dropped:
    """The samples of one record, none longer than max_tokens.

    A long document is truncated, or split into several samples when `split`; a picture is never cut, and one that
    nothing follows is left out. A long conversation is truncated; without any target left it is dropped.
    """
    is_document = record.turns[0].role == "document"
    tokens = tokenizer.document(record) if is_document else tokenizer.chat(record)
    pieces = _pieces(tokens, tokenizer, max_tokens=max_tokens, many=split and is_document)
    kept = [piece for piece in pieces if any(piece.is_target)]
    return kept or Dropped(record.id, "no_target")


def _pieces(tokens: Tokens, tokenizer: Tokenizer, *, max_tokens: int, many: bool) -> list[Tokens]:
    """Windows of at most max_tokens, each ending at a target: so no picture is cut, and none trails unlearnt."""
    ids, targets, images = tokens.input_ids, tokens.is_target, tokens.images
    pieces: list[Tokens] = []
    start = 0
    while start < len(ids) and (many or start == 0):
        head = [tokenizer.bos_id] if start else []
        end = min(len(ids), start + max_tokens - len(head))
        stop = next((i for i in range(end, start, -1) if targets[i - 1]), start)
        if stop > start:
            count = ids[start:stop].count(tokenizer.image_id) // tokenizer.image_tokens
            pieces.append(Tokens(head + ids[start:stop], [False] * len(head) + targets[start:stop], images[:count]))
        else:  # a run of pictures longer than a sample: go on at the next text
            stop = next((i for i in range(end, len(ids)) if targets[i]), len(ids))
            count = ids[start:stop].count(tokenizer.image_id) // tokenizer.image_tokens
        images = images[count:]
        start = stop
    return pieces


def _message(role: str, parts: tuple[Part, ...], tokenizer: Tokenizer) -> dict[str, Any]:
    content: list[dict[str, str]] = []
    for is_image, run in groupby(parts, key=lambda part: isinstance(part, Image)):
        if is_image:
            content += [{"type": "image"} for _ in run]
        else:  # joined first, or a control token could hide in two parts
            content.append({"type": "text", "text": tokenizer.neutral("".join(map(str, run)))})
    return {"role": role, "content": content}
