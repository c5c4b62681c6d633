"""Grammars of answers: which tokens may come next."""

# V vocabulary

import threading
from functools import lru_cache

import numpy as np
import torch
from llguidance import LLMatcher, LLTokenizer
from torch import Tensor

from vila_ops.data.text.conversation import Tokenizer
from vila_ops.errors import UnsupportedSetting
from vila_ops.generate.json_grammar import LIMITS, grammar_of

KEPT = 16
"""Grammars that stay in memory."""


class AnswerGrammar:
    """How far one answer is in its grammar."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    def allowed(self, vocabulary: int) -> Tensor:
        """Whether each id (V,) may come next; a stop token only where the answer may end.

        Raises UnsupportedSetting where the grammar takes more than its limits.
        """
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._check()
        return torch.from_numpy(np.unpackbits(bits, count=vocabulary, bitorder="little").view(np.bool_))

    def take(self, token: int) -> None:
        """Go on by an allowed token that is no stop token. Raises UnsupportedSetting as `allowed` does."""
        self._matcher.consume_token(token)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            reason = self._matcher.get_error()[:300]
            text = f"the schema takes too much in the middle of the answer; simplify its patterns ({reason})"
            raise UnsupportedSetting("response_format", text)


class Grammars:
    """The grammars of one tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._lock = threading.Lock()
        self._words: LLTokenizer | None = None
        self._matcher = lru_cache(maxsize=KEPT)(self._compiled)

    def of(self, schema: str) -> AnswerGrammar:
        """The grammar of an answer that follows a JSON schema, at its start. Blocks.

        Raises ValueError for a schema that is not taken, and for a tokenizer that llguidance does not read.
        """
        with self._lock:
            return AnswerGrammar(self._matcher(schema).deep_copy())

    def _compiled(self, schema: str) -> LLMatcher:
        grammar = grammar_of(schema)
        if self._words is None:
            text, stops = self._tokenizer.fast.backend_tokenizer.to_str(), sorted(self._tokenizer.stop_ids)
            self._words = LLTokenizer(text, n_vocab=len(self._tokenizer.fast), eos_token=stops)
        matcher = LLMatcher(self._words, grammar, log_level=0, limits=LIMITS)
        matcher.compute_bitmask()
        if matcher.is_error():
            raise ValueError(f"the schema cannot be followed: {matcher.get_error()[:300]}")
        return matcher
