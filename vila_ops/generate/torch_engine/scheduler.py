"""Continuous batching: requests join and leave between steps.

A step is a pass of the language model, or a pass of the tower or a part of one.
"""

# R rows, T tokens of a pass, D language model dim, V vocabulary

import itertools
import logging
import time
from collections import Counter, deque
from collections.abc import Sequence

import torch
from torch import Tensor

from vila_ops.errors import UnsupportedSetting
from vila_ops.generate.request import Delta
from vila_ops.generate.torch_engine import row_attention
from vila_ops.generate.torch_engine.image_features import SaltedImage
from vila_ops.generate.torch_engine.kv_cache import CACHE_ARGUMENT, PAGE, Group, KVCache
from vila_ops.generate.torch_engine.loaded_model import LoadedModel
from vila_ops.generate.torch_engine.prefixes import PrefixCache, TokenSequence
from vila_ops.generate.torch_engine.reading_pace import ReadingPace
from vila_ops.generate.torch_engine.request_state import GenerationRequest, RequestState
from vila_ops.generate.torch_engine.sampling import Chosen, choose

SLOTS = 64
"""Rows that are decoded at once by default. An answer takes a fifth less of a CPU than with 16 (measured)."""

Event = tuple[GenerationRequest, Delta | Exception]
"""What a step adds to a request, or the error that ends it."""

log = logging.getLogger(__name__)


class Scheduler:
    """Reads prompts and decodes answers. Used by one thread, but for the flags of aborted requests."""

    def __init__(
        self,
        loaded: LoadedModel,
        *,
        slots: int = SLOTS,
        cache_tokens: int,
        prefill_tokens: int,
        prefix_tokens: int = 0,
        bound_pauses: bool = False,
    ) -> None:
        """At most `slots` requests are under way, of which the cache holds `cache_tokens` positions.

        A step reads at most `prefill_tokens` of prompts, padding included. With `bound_pauses`, it reads as little as
        `ReadingPace` says while there are answers under way, and computes as little of images. At most `prefix_tokens`
        tokens that were read are kept for prompts after them.
        """
        self.loaded, self.slots, self.prefill_tokens = loaded, slots, prefill_tokens
        self.pace = ReadingPace(max_tokens=prefill_tokens) if bound_pauses else None
        self.cache = KVCache(max_tokens=cache_tokens, device=loaded.device)
        self.prefixes = PrefixCache(max_tokens=prefix_tokens)
        self.rows: list[RequestState] = []
        """In the order of the rows of the cache: those that are decoded, then those whose prompts are read."""
        self.live = 0
        """Rows that are decoded."""
        self._waiting: deque[RequestState] = deque()
        self._suspects: deque[RequestState] = deque()
        """Requests that were under way when a step failed: each of them goes on alone."""
        self._numbers = itertools.count()
        self._events: list[Event] = []
        # Each step is the first of these that has work, and the next step begins with its successor: so between two
        # tokens of an answer there is time for images or for tokens of prompts, and never for both. A pass that only
        # decodes comes often enough to know its time.
        self._turns = deque([self._encode, self._decode, *[self._decode_and_read] * 3])

    @property
    def is_busy(self) -> bool:
        """Whether a step has something to do."""
        return bool(self.rows or self._waiting or self._suspects)

    @torch.inference_mode()
    def step(self, arrivals: Sequence[GenerationRequest] = ()) -> list[Event]:
        """Take requests, use the tower or the language model once, and return what it adds to requests.

        An aborted request ends before the pass. If a pass for several requests fails, they go on one at a time from
        where they were, so that one of them does not take the others with it.
        """
        self._events = []
        self._waiting += [RequestState(next(self._numbers), request) for request in arrivals]
        try:
            self._drop_aborted()
            self._admit()
            for _ in range(len(self._turns)):
                turn = self._turns[0]
                self._turns.rotate(-1)
                if turn():
                    break
        except Exception as error:  # noqa: BLE001 whatever it is, the readers must learn of it
            self._recover(error)
        if not self.rows:
            self.cache.clear()
        return self._events

    def _drop_aborted(self) -> None:
        for queue in (self._waiting, self._suspects, self.rows):
            for state in [state for state in queue if state.request.aborted]:
                if queue is self.rows:
                    self._remove(state)
                else:
                    queue.remove(state)
                self._events.append((state.request, Delta([], "abort")))

    def _admit(self) -> None:
        """Give rows to requests that wait. Many join together, when a quarter of the slots is free."""
        if self._suspects:
            if not self.rows:
                self.rows.append(self._suspects.popleft())
                self.cache.reserve(self._needs())
            return
        free = self.slots - len(self.rows)
        if not self._waiting or free < min(len(self._waiting), max(1, self.slots // 4)):
            return
        before = len(self.rows)
        while self._waiting and len(self.rows) < self.slots:
            self.rows.append(self._next())
            if not self.cache.fits(self._needs()):
                self.rows.pop()
                break
            self._waiting.remove(self.rows[-1])
        if len(self.rows) > before:
            self.cache.reserve(self._needs())

    def _next(self) -> RequestState:
        """The request that waits longest among those whose salt, which stands for a key, has the fewest rows."""
        rows = Counter(state.request.prompt.cache_salt for state in self.rows)
        return min(self._waiting, key=lambda state: rows[state.request.prompt.cache_salt])

    def _needs(self) -> list[int]:
        return [state.request.max_tokens() for state in self.rows]

    def _reading(self) -> list[RequestState]:
        """The rows whose prompts are read, in the order of arrival."""
        return sorted(self.rows[self.live :], key=lambda state: state.number)

    def _to_read(self) -> int:
        """How many requests wait for their first token."""
        return len(self.rows) - self.live + len(self._waiting)

    def _encode(self) -> bool:
        """Compute features of images of the rows, and in the same pass those of requests that wait."""
        missing = [(state, image) for state in self._reading() for image in _images_left(state)]
        if not missing:
            return False
        ahead = itertools.islice(self._waiting, self.slots)
        missing += [(state, image) for state in ahead for image in _images_left(state)]
        seconds = self.pace.seconds(self._to_read(), self.live) if self.pace is not None and self.live else None
        features = self.loaded.features.first([image for _, image in missing], seconds)
        for (state, _), feature in zip(missing, features, strict=False):
            state.features.append(feature)
        return True

    def _chunk(self) -> list[tuple[RequestState, int]]:
        """The rows whose prompts the next pass reads, and how many tokens of each."""
        chunk: list[tuple[RequestState, int]] = []
        width, most = 0, self.prefill_tokens
        if self.pace is not None and self.live:
            most = self.pace.tokens(self._to_read(), self.live)
        for state in self._reading():
            if _images_left(state) or (state.embeddings is None and not self._begin(state)):
                continue
            left = len(state.tokens()) - self.cache.lengths[self.rows.index(state)]
            count = min(left, most)
            if chunk and max(width, count) * (len(chunk) + 1) > most:
                break
            width = max(width, count)
            chunk.append((state, count))
        return chunk

    def _begin(self, state: RequestState) -> bool:
        """Begin to read a prompt behind what is kept of it; False while much more of it is read for another request."""
        row, tokens, count = self.rows.index(state), state.tokens(), 0
        sequence = self._sequence(state, len(tokens))
        if len(tokens) <= self.prefixes.max_tokens:
            count, layers = self.prefixes.longest(sequence)
            others = [one for one in self._reading() if one.embeddings is not None]
            ahead = max((sequence.common(self._sequence(one, len(tokens))) for one in others), default=0)
            if ahead - count > max(PAGE, len(tokens) // 2):
                return False
            if count:
                self.cache.fill(row, layers, count)
                state.cached_tokens = 0 if state.ids else count
        features = state.features[sequence.images_in(count) :]
        state.embeddings = self.loaded.embed_prompt(tokens[count:], features)
        return True

    def _keep(self, state: RequestState) -> None:
        """Keep what was read of a request for later prompts."""
        row = self.rows.index(state)
        if self.cache.lengths[row] <= self.prefixes.max_tokens:
            sequence = self._sequence(state, self.cache.lengths[row])
            if self.prefixes.wants(sequence):
                self.prefixes.keep(sequence, self.cache.copy(row))

    def _sequence(self, state: RequestState, length: int) -> TokenSequence:
        """The first tokens of a request."""
        tokenizer, request = self.loaded.tokenizer, state.request
        return TokenSequence.of(
            state.tokens()[:length],
            request.image_digests,
            salt=request.prompt.cache_salt,
            image_id=tokenizer.image_id,
            image_tokens=tokenizer.image_tokens,
        )

    def _decode(self) -> bool:
        """Add a token to the answer of every live row."""
        if not self.live:
            return False
        started = time.perf_counter()
        self._pass([])
        if self.pace is not None:
            self.pace.decoded(time.perf_counter() - started)
        return True

    def _decode_and_read(self) -> bool:
        """Read the next tokens of some prompts; the same pass adds a token to the answer of every live row."""
        started, answers = time.perf_counter(), self.live
        chunk = self._chunk()
        if not chunk:
            return False
        tokens = self._pass(chunk)
        if self.pace is not None and answers:
            self.pace.read(tokens, time.perf_counter() - started)
        return True

    def _pass(self, chunk: Sequence[tuple[RequestState, int]]) -> int:
        """Decode the live rows and read a chunk; the number of tokens that were read, padding included.

        A prompt that is read to its end gets its first token.
        """
        states = self.rows[: self.live]
        ids = [state.ids[-1] for state in states]
        groups: list[Group] = [(range(self.live), [1] * self.live)] if states else []
        embeddings = [self.loaded.embed_prompt(ids, [])] if states else []
        answered, width = list(range(self.live)), max((count for _, count in chunk), default=0)
        rows = [self.rows.index(state) for state, _ in chunk]
        if chunk:
            groups.append((rows, [count for _, count in chunk]))
        for row, (state, count) in zip(rows, chunk, strict=True):
            assert state.embeddings is not None
            start, tokens = self.cache.lengths[row], state.tokens()
            part, state.embeddings = state.embeddings[:count], state.embeddings[count:]
            embeddings.append(torch.nn.functional.pad(part, (0, 0, 0, width - count)))
            if start + count == len(tokens):
                states.append(state)
                answered.append(len(ids) + count - 1)
            ids += [*tokens[start : start + count], *[0] * (width - count)]
        hidden = self._hidden(groups, torch.cat(embeddings)[None], torch.tensor([ids], device=self.loaded.device))
        if states:
            chosen = self._choose(hidden[torch.tensor(answered, device=self.loaded.device)], states)
            for state in states[self.live :]:
                self._promote(state)
            self._settle(states, chosen)
        return len(chunk) * width

    def _hidden(self, groups: Sequence[Group], embeddings: Tensor, ids: Tensor) -> Tensor:
        """Hidden states (T, D) of the next tokens of groups of rows, from embeddings (1, T, D) and ids (1, T)."""
        model, positions = self.loaded.model, self.cache.begin(groups)
        with row_attention.used_by(model):
            hidden: Tensor = model.hidden(
                embeddings,
                position_ids=positions,
                use_cache=True,
                **{CACHE_ARGUMENT: self.cache},
                **row_attention.masks(model, self.cache.distances()),
                **model.routing(ids),
            ).last_hidden_state
        self.cache.end()
        return hidden[0]

    def _choose(self, hidden: Tensor, states: Sequence[RequestState]) -> list[Chosen | UnsupportedSetting]:
        """The next token of each row, from hidden states (R, D)."""
        tokenizer = self.loaded.tokenizer
        logits = self.loaded.model.lm_head(hidden)
        return choose(logits, states, vocabulary=len(tokenizer.fast), image_id=tokenizer.image_id)

    def _settle(self, states: Sequence[RequestState], chosen: Sequence[Chosen | UnsupportedSetting]) -> None:
        """Give each row its token; rows leave whose answers have ended, or whose grammars have failed."""
        for state, one in zip(states, chosen, strict=True):
            added: Delta | UnsupportedSetting
            try:
                added = one if isinstance(one, UnsupportedSetting) else state.append(*one)
            except UnsupportedSetting as error:
                added = error
            self._events.append((state.request, added))
            if isinstance(added, UnsupportedSetting) or added.finish_reason is not None:
                self._remove(state)

    def _promote(self, state: RequestState) -> None:
        """Move a row whose prompt was read to those that are decoded."""
        self._keep(state)
        state.features, state.embeddings = [], None
        self._swap(self.rows.index(state), self.live)
        self.live += 1

    def _remove(self, state: RequestState) -> None:
        self._keep(state)
        row = self.rows.index(state)
        if row < self.live:
            self.live -= 1
            self._swap(row, self.live)
            row = self.live
        self._swap(row, len(self.rows) - 1)
        self.rows.pop()
        self.cache.pop()

    def _swap(self, one: int, other: int) -> None:
        self.cache.swap(one, other)
        self.rows[one], self.rows[other] = self.rows[other], self.rows[one]

    def _recover(self, error: Exception) -> None:
        """After a failed pass: end the only request, or let all of them go on one at a time."""
        if not self.rows:
            raise error
        states = sorted(self.rows, key=lambda state: state.number)
        self.rows, self.live = [], 0
        self.cache.clear()
        if len(states) == 1:
            self._events.append((states[0].request, error))
            return
        log.warning("a pass for %d requests failed (%r); they go on one at a time", len(states), error)
        for state in states:
            state.embeddings = None
            self._suspects.append(state)


def _images_left(state: RequestState) -> list[SaltedImage]:
    """The images of a prompt that is to be read whose features are not computed yet."""
    prompt = state.request.prompt
    return [SaltedImage(image, prompt.cache_salt) for image in prompt.images[len(state.features) :]]
