"""Greedy decoding of one static batch: its rows join and leave the key-value cache between steps."""

# B rows, T tokens, D language model dim, V vocabulary

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import DynamicCache

from vila_ops.generate.request import Delta, FinishReason, Prompt, Sampling
from vila_ops.generate.torch_engine.kv_cache import KVCache
from vila_ops.generate.torch_engine.loaded_model import LoadedModel
from vila_ops.model.attention import masks

SLOTS = 16
"""Rows that are decoded at once."""


@dataclass(eq=False)
class GenerationRequest:
    """A prompt with its sampling settings."""

    prompt: Prompt
    sampling: Sampling
    aborted: bool = False
    """Set by the engine, from another thread; the row then leaves at its next step."""

    def max_tokens(self) -> int:
        """Tokens of the prompt and of the longest answer."""
        return len(self.prompt.input_ids) + self.sampling.max_new_tokens


@dataclass(eq=False)
class RequestState:
    """A request in a slot of the cache."""

    index: int
    """Of the request in its batch."""
    request: GenerationRequest
    ids: list[int] = field(default_factory=list)

    def append(self, token: int) -> Delta:
        """Take the next token."""
        is_stop = token in self.request.sampling.stop_ids
        if not is_stop:
            self.ids.append(token)
        reason: FinishReason | None = None
        if self.request.aborted:
            reason = "abort"
        elif is_stop:
            reason = "stop"
        elif len(self.ids) == self.request.sampling.max_new_tokens:
            reason = "length"
        return Delta([] if is_stop else [token], reason)


class Scheduler:
    """Decodes batches of requests; one batch at a time."""

    def __init__(self, loaded: LoadedModel, *, slots: int = SLOTS) -> None:
        self.loaded, self.slots = loaded, slots

    @torch.inference_mode()
    def run(self, requests: Sequence[GenerationRequest]) -> Iterator[list[tuple[int, Delta]]]:
        """Yield what each pass of the model adds: deltas with the indices of their requests.

        More requests than slots wait in their order. New rows are prefilled when a quarter of the slots is free.
        """
        slots = min(self.slots, len(requests))
        capacity = max(request.max_tokens() for request in requests)
        cache = KVCache(slots=slots, capacity=capacity, device=self.loaded.device)
        waiting = [RequestState(index, request) for index, request in enumerate(requests)][::-1]
        live: list[RequestState] = []
        while waiting or live:
            if waiting and slots - len(live) >= min(len(waiting), max(1, slots // 4)):
                joining = [waiting.pop() for _ in range(min(len(waiting), slots - len(live)))]
                first = self._prefill([row.request.prompt for row in joining], cache)
                live += joining
                yield self._settle(joining, first, live, cache)
            if live:
                yield self._settle(list(live), self._step(live, cache), live, cache)

    def _prefill(self, prompts: list[Prompt], cache: KVCache) -> list[int]:
        """Read the prompts into the cache and return the first token of each answer."""
        lengths = [len(prompt.input_ids) for prompt in prompts]
        input_ids = torch.zeros(len(prompts), max(lengths), dtype=torch.long)
        for row, prompt in enumerate(prompts):
            input_ids[row, : lengths[row]] = torch.tensor(prompt.input_ids)
        input_ids = input_ids.to(self.loaded.device)
        model = self.loaded.model
        embeddings = self.loaded.embed(input_ids, [image for prompt in prompts for image in prompt.images])
        prefilled = DynamicCache()  # without a config it keeps all positions, also in layers with a sliding window
        # right-padded and causal: padding is never seen
        out = model.hidden(embeddings, past_key_values=prefilled, use_cache=True, **model.routing(input_ids))
        layers = [(layer.keys, layer.values) for layer in prefilled.layers]
        cache.add(layers, lengths)
        ends = torch.tensor(lengths, device=self.loaded.device) - 1
        return self._greedy(out.last_hidden_state[torch.arange(len(prompts), device=self.loaded.device), ends])

    def _step(self, live: list[RequestState], cache: KVCache) -> list[int]:
        """Decode one token of every live row."""
        input_ids = torch.tensor([[row.ids[-1]] for row in live], device=self.loaded.device)
        model, distance = self.loaded.model, cache.distance()
        out = model.hidden(
            self.loaded.embed(input_ids, []),
            position_ids=cache.lengths[: cache.live, None],
            past_key_values=cache,
            use_cache=True,
            **masks(model, distance >= 0, distance),
            **model.routing(input_ids),
        )
        cache.advance()
        return self._greedy(out.last_hidden_state[:, -1])

    def _greedy(self, hidden: Tensor) -> list[int]:
        """The likeliest next token of each row, from hidden states (B, D)."""
        tokenizer = self.loaded.tokenizer
        logits = self.loaded.model.lm_head(hidden)
        logits[:, tokenizer.image_id] = -torch.inf  # a model cannot generate images
        ids: list[int] = logits[:, : len(tokenizer.fast)].argmax(-1).tolist()
        return ids

    def _settle(
        self, rows: list[RequestState], tokens: list[int], live: list[RequestState], cache: KVCache
    ) -> list[tuple[int, Delta]]:
        """Give each row its token; the last live row takes the slot of a row that ended."""
        deltas = []
        for row, token in zip(rows, tokens, strict=True):
            delta = row.append(token)
            deltas.append((row.index, delta))
            if delta.finish_reason is not None:
                slot = live.index(row)
                cache.drop(slot)
                live[slot] = live[-1]
                live.pop()
        return deltas
