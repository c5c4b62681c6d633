"""One engine for evaluation and serving: greedy decoding in slots, and likelihoods of continuations."""

# B rows, T tokens, D language model dim, V vocabulary

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vila_ops.data.images import Fit
from vila_ops.data.text.conversation import Tokenizer
from vila_ops.generate.torch_engine.kv_cache import KVCache
from vila_ops.model.attention import attention_mask
from vila_ops.model.vila import VilaForConditionalGeneration

PASS_TOKENS = 2048
"""Positions of one scoring or prefill pass; bounds its memory."""


@dataclass(frozen=True)
class Prompt:
    """What the model reads before it answers."""

    input_ids: list[int]
    images: tuple[bytes, ...] = ()
    """Encoded squares of the model's side and fit, in the order of their placeholders."""


@dataclass(frozen=True)
class Answer:
    """What it said."""

    ids: list[int]
    """Without the end-of-sequence token."""
    finished: bool
    """Ended by itself; else cut at max_new_tokens."""


@dataclass(frozen=True)
class Loglikelihood:
    """Negative log-likelihood of a continuation."""

    nll: float
    """Sum over its tokens, in nats."""
    tokens: int


@dataclass
class RequestState:
    index: int
    ids: list[int] = field(default_factory=list)


class Generator:
    """A model ready to answer and to score."""

    def __init__(
        self,
        model: VilaForConditionalGeneration,
        tokenizer: Tokenizer,
        *,
        features: Callable[[Sequence[bytes]], Tensor],
        image_aspect_ratio: Fit,
        slots: int = 16,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.features = features
        self.slots = slots
        self.image_size: int = model.config.vision_side
        self.image_aspect_ratio = image_aspect_ratio
        self.max_tokens: int = model.config.text_config.max_position_embeddings

    @torch.inference_mode()
    def generate(self, prompts: Sequence[Prompt], *, max_new_tokens: int) -> list[Answer]:
        """Greedy answers, in the order of the prompts. Rows join and leave between steps."""
        self._check_lengths([len(prompt.input_ids) + max_new_tokens for prompt in prompts])
        self._check_images(prompts)
        if not prompts:
            return []
        longest = max(len(prompt.input_ids) for prompt in prompts) + max_new_tokens
        dtype = self.model.get_input_embeddings().weight.dtype
        slots = min(self.slots, len(prompts))
        cache = KVCache(self.model.config.text_config, slots=slots, capacity=longest, dtype=dtype)
        waiting = list(range(len(prompts)))[::-1]
        live: list[RequestState] = []
        answers: dict[int, Answer] = {}
        while waiting or live:
            if waiting and slots - len(live) >= min(len(waiting), max(1, slots // 4)):
                joining = [waiting.pop() for _ in range(min(len(waiting), slots - len(live)))]
                first = self._prefill([prompts[i] for i in joining], cache)
                live += [RequestState(index) for index in joining]
                self._settle(live[-len(joining) :], first, live, cache, answers, max_new_tokens=max_new_tokens)
            if live:
                self._settle(list(live), self._step(live, cache), live, cache, answers, max_new_tokens=max_new_tokens)
        return [answers[index] for index in range(len(prompts))]

    @torch.inference_mode()
    def score(self, items: Sequence[tuple[Prompt, Sequence[list[int]]]]) -> list[list[Loglikelihood]]:
        """Likelihoods of each item's continuations given its prompt.

        A prompt is read once for all its continuations: they stand behind it in one row and see it and themselves.
        """
        rows = [_row(prompt.input_ids, continuations) for prompt, continuations in items]
        self._check_lengths([len(row.input_ids) for row in rows])
        self._check_images([prompt for prompt, _ in items])
        order = sorted(range(len(rows)), key=lambda index: len(rows[index].input_ids))
        scores: dict[int, list[Loglikelihood]] = {}
        start = 0
        while start < len(order):
            stop = start + 1
            while stop < len(order) and (stop - start + 1) * len(rows[order[stop]].input_ids) <= PASS_TOKENS:
                stop += 1
            batch = order[start:stop]
            nlls = self._nlls([rows[i] for i in batch], [image for i in batch for image in items[i][0].images])
            scores |= dict(zip(batch, nlls, strict=True))
            start = stop
        return [scores[index] for index in range(len(items))]

    @torch.inference_mode()
    def states(self, prompt: Prompt, continuation: list[int]) -> NDArray[np.float64]:
        """Hidden states (layers + 1, T, D) of a prompt and what follows it: the embeddings, then each layer's output.

        The last is after the final norm, as the head reads it.
        """
        ids = [*prompt.input_ids, *continuation]
        self._check_lengths([len(ids)])
        input_ids = torch.tensor([ids])
        embeddings = self.model.embed(input_ids, self.features(prompt.images) if prompt.images else None)
        routing = self.model.routing(input_ids)
        layers = self.model.hidden(embeddings, use_cache=False, output_hidden_states=True, **routing).hidden_states
        found: NDArray[np.float64] = torch.cat(layers).double().numpy()
        return found

    def _check_lengths(self, lengths: list[int]) -> None:
        if lengths and max(lengths) > self.max_tokens:
            raise ValueError(f"{max(lengths)} tokens, more than the model's context of {self.max_tokens}")

    def _check_images(self, prompts: Sequence[Prompt]) -> None:
        """Each prompt for itself: one row's image must not fill another row's place."""
        for number, prompt in enumerate(prompts):
            places = prompt.input_ids.count(self.tokenizer.image_id)
            if places != len(prompt.images) * self.tokenizer.image_tokens:
                raise ValueError(
                    f"prompt {number} has {places} image positions for {len(prompt.images)} images of "
                    f"{self.tokenizer.image_tokens} each; write one placeholder for each image"
                )

    def _prefill(self, prompts: list[Prompt], cache: KVCache) -> list[int]:
        lengths = [len(prompt.input_ids) for prompt in prompts]
        input_ids = torch.zeros(len(prompts), max(lengths), dtype=torch.long)
        for row, prompt in enumerate(prompts):
            input_ids[row, : lengths[row]] = torch.tensor(prompt.input_ids)
        images = [image for prompt in prompts for image in prompt.images]
        embeddings = self.model.embed(input_ids, self.features(images) if images else None)
        # right-padded and causal: padding is never seen
        out = self.model.hidden(embeddings, use_cache=True, **self.model.routing(input_ids))
        layers = [(layer.keys, layer.values) for layer in out.past_key_values.layers]
        cache.add(layers, lengths)
        last = out.last_hidden_state[torch.arange(len(prompts)), torch.tensor(lengths) - 1]
        return self._greedy(last)

    def _step(self, live: list[RequestState], cache: KVCache) -> list[int]:
        input_ids = torch.tensor([[row.ids[-1]] for row in live])
        positions = cache.lengths[: cache.live, None]
        out = self.model.hidden(
            self.model.embed(input_ids, None),
            position_ids=positions,
            attention_mask=cache.mask(),
            past_key_values=cache,
            use_cache=True,
            **self.model.routing(input_ids),
        )
        cache.lengths[: cache.live] += 1
        return self._greedy(out.last_hidden_state[:, -1])

    def _greedy(self, hidden: Tensor) -> list[int]:
        logits = self.model.lm_head(hidden)
        logits[:, self.tokenizer.image_id] = -torch.inf  # an image cannot be said
        ids: list[int] = logits[:, : len(self.tokenizer.fast)].argmax(-1).tolist()
        return ids

    def _settle(
        self,
        rows: list[RequestState],
        tokens: list[int],
        live: list[RequestState],
        cache: KVCache,
        answers: dict[int, Answer],
        *,
        max_new_tokens: int,
    ) -> None:
        """Give each row its token; a row that ended leaves its slot to the last live one."""
        for row, token in zip(rows, tokens, strict=True):
            finished = token in self.tokenizer.stop_ids
            if not finished:
                row.ids.append(token)
            if finished or len(row.ids) == max_new_tokens:
                answers[row.index] = Answer(row.ids, finished)
                place = live.index(row)
                cache.drop(place)
                live[place] = live[-1]
                live.pop()

    def _nlls(self, rows: list["_ScoreRow"], images: list[bytes]) -> list[list[Loglikelihood]]:
        width = max(len(row.input_ids) for row in rows)
        pad = [(0, width - len(row.input_ids)) for row in rows]
        input_ids, positions = (
            torch.from_numpy(np.stack([np.pad(getattr(row, name), p) for row, p in zip(rows, pad, strict=True)]))
            for name in ("input_ids", "position_ids")
        )
        segments = np.stack([np.pad(row.segment_ids, p, constant_values=-1) for row, p in zip(rows, pad, strict=True)])
        sees_prompt = (segments[:, :, None] > 0) & (segments[:, None, :] == 0)
        mask = attention_mask(torch.from_numpy(segments)) | torch.from_numpy(sees_prompt)[:, None]
        features = self.features(images) if images else None
        embeddings = self.model.embed(input_ids, features)
        routing = self.model.routing(input_ids)
        hidden = self.model.hidden(
            embeddings, position_ids=positions, attention_mask=mask, use_cache=False, **routing
        ).last_hidden_state
        return [self._row_scores(hidden[number], row) for number, row in enumerate(rows)]

    def _row_scores(self, hidden: Tensor, row: "_ScoreRow") -> list[Loglikelihood]:
        before = torch.tensor([place for places in row.predicted_at for place in places])
        wanted = torch.tensor([token for tokens in row.continuations for token in tokens])
        logits = self.model.lm_head(hidden[before]).float()
        nll = torch.nn.functional.cross_entropy(logits, wanted, reduction="none").double()
        parts = torch.split(nll, [len(tokens) for tokens in row.continuations])
        return [Loglikelihood(float(part.sum()), len(part)) for part in parts]


@dataclass(frozen=True)
class _ScoreRow:
    """A prompt and its continuations, end to end."""

    input_ids: np.ndarray
    position_ids: np.ndarray
    segment_ids: np.ndarray
    """0 in the prompt, 1, 2, ... in the continuations."""
    continuations: list[list[int]]
    predicted_at: list[list[int]]
    """For each continuation's tokens, the positions whose hidden state predicts them."""


def _row(prompt: list[int], continuations: Sequence[list[int]]) -> _ScoreRow:
    if not prompt or not all(continuations):
        raise ValueError("a score needs a prompt and continuations of at least one token")
    ids, positions, segments = list(prompt), list(range(len(prompt))), [0] * len(prompt)
    predicted_at = []
    for number, tokens in enumerate(continuations, start=1):
        start = len(ids)
        predicted_at.append([len(prompt) - 1, *range(start, start + len(tokens) - 1)])
        ids += tokens
        positions += range(len(prompt), len(prompt) + len(tokens))
        segments += [number] * len(tokens)
    arrays = [np.asarray(values, np.int64) for values in (ids, positions, segments)]
    return _ScoreRow(arrays[0], arrays[1], arrays[2], [list(tokens) for tokens in continuations], predicted_at)
