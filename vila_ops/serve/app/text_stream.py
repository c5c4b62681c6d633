"""Token ids to text while they arrive: never cut inside a character, and ended by stop strings. Pure."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from vila_ops.generate.request import Delta, FinishReason, TokenLogprob

if TYPE_CHECKING:  # heavy: transformers
    from vila_ops.data.text.conversation import Tokenizer

INCOMPLETE = "\ufffd"
"""What a decoder writes in place of bytes that are no character yet."""
BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
"""A byte in the vocabularies of SentencePiece."""


@dataclass(frozen=True)
class TextPiece:
    """What a delta adds to one answer."""

    choice: int
    text: str
    tokens: int
    """Tokens that were generated for it, those of a stop string included."""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: FinishReason | None = None


class AnswerText:
    """The text of one answer. The texts of all its pieces are the decoded ids, up to the first stop string."""

    def __init__(self, tokenizer: "Tokenizer", choice: int, *, stops: Sequence[str]) -> None:
        self._tokenizer, self._choice, self._stops = tokenizer, choice, stops
        self._ids: list[int] = []  # from the last place where a character ended
        self._read = 0  # how many of these ids `_held` and earlier pieces have
        self._held = ""  # text that may be the start of a stop string

    def add(self, delta: Delta) -> TextPiece:
        """Take the next ids. The piece has the finish reason "stop" after a stop string."""
        for number, token in enumerate(delta.ids, 1):
            self._ids.append(token)
            if (cut := self._cut_at_stop(self._complete())) is not None:
                return TextPiece(self._choice, cut, number, list(delta.logprobs[:number]), "stop")
        reason, text = delta.finish_reason, ""
        if reason is not None:
            if (cut := self._cut_at_stop(self._rest())) is not None:
                return TextPiece(self._choice, cut, len(delta.ids), list(delta.logprobs), "stop")
            text, self._held = self._held, ""
        else:
            keep = self._possible_start()
            text, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return TextPiece(self._choice, text, len(delta.ids), list(delta.logprobs), reason)

    def _complete(self) -> str:
        """Text of ids that were not read yet; empty while it ends inside a character.

        Ids before them are decoded too, since a decoder may strip the blank of a text's first token.
        """
        before = self._tokenizer.decode(self._ids[: self._read])
        text = self._tokenizer.decode(self._ids)
        if len(text) <= len(before) or text.endswith(INCOMPLETE):
            return ""
        self._ids, self._read = self._ids[self._read :], len(self._ids) - self._read
        return text[len(before) :]

    def _rest(self) -> str:
        """Text of the last ids, even if they end inside a character."""
        before = self._tokenizer.decode(self._ids[: self._read])
        return self._tokenizer.decode(self._ids)[len(before) :]

    def _cut_at_stop(self, text: str) -> str | None:
        """Hold more text; what is held before the first stop string, if there is one."""
        self._held += text
        starts = [start for stop in self._stops if (start := self._held.find(stop)) >= 0]
        return self._held[: min(starts)] if starts else None

    def _possible_start(self) -> int:
        """Characters at the end of the held text with which a stop string may begin."""
        longest = min(len(self._held), max(map(len, self._stops), default=1) - 1)
        ends = (self._held[len(self._held) - length :] for length in range(longest, 0, -1))
        return next((len(end) for end in ends if any(stop.startswith(end) for stop in self._stops)), 0)


def logprob_content(tokenizer: "Tokenizer", logprobs: Sequence[TokenLogprob]) -> list[dict[str, Any]]:
    """`logprobs.content` of a choice in OpenAI's form."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        raw = token_bytes(tokenizer, token)
        return {"token": raw.decode(errors="replace"), "logprob": max(logprob, -9999.0), "bytes": list(raw)}

    return [
        {**entry(one.id, one.logprob), "top_logprobs": [entry(token, logprob) for token, logprob in one.top]}
        for one in logprobs
    ]


def token_bytes(tokenizer: "Tokenizer", token: int) -> bytes:
    """The bytes that a token stands for, which may be a part of a character."""
    fast = tokenizer.fast
    if token in fast.added_tokens_decoder:
        return str(fast.added_tokens_decoder[token].content).encode()
    text = str(fast.convert_ids_to_tokens(token))
    if "ByteLevel" in str(fast.backend_tokenizer.decoder):
        return bytes(_byte_of()[character] for character in text)
    if byte := BYTE_TOKEN.fullmatch(text):
        return bytes([int(byte[1], 16)])
    return text.replace("\u2581", " ").encode()


@lru_cache(maxsize=1)
def _byte_of() -> dict[str, int]:
    """Character of a byte-level vocabulary -> byte, as in GPT-2's `bytes_to_unicode`."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("\xa1"), ord("\xac") + 1), *range(ord("\xae"), 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + number): byte for number, byte in enumerate(hidden)}
