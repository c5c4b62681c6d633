"""Likelihoods and hidden states of given continuations, without a cache."""

# B rows, T tokens, D language model dim, V vocabulary

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vila_ops.generate.checks import check_images, check_length
from vila_ops.generate.engine import ScoringItem
from vila_ops.generate.request import Loglikelihood, Prompt
from vila_ops.generate.torch_engine.loaded_model import LoadedModel
from vila_ops.model.attention import attention_mask, masks

PASS_TOKENS = 2048
"""Positions of one scoring pass; bounds its memory."""


@dataclass(frozen=True)
class _ScoreRow:
    """A prompt and its continuations, end to end; arrays are (T,)."""

    input_ids: NDArray[np.int64]
    position_ids: NDArray[np.int64]
    segment_ids: NDArray[np.int64]
    """0 in the prompt, 1, 2, ... in the continuations."""
    continuations: list[list[int]]
    predicted_at: list[list[int]]
    """For each continuation's tokens, the positions whose hidden state predicts them."""


class Scorer:
    """Scores continuations, several prompts in a pass."""

    def __init__(self, loaded: LoadedModel) -> None:
        self.loaded = loaded

    @torch.inference_mode()
    def score(self, items: Sequence[ScoringItem]) -> list[list[Loglikelihood]]:
        """Likelihoods of each item's continuations given its prompt.

        A prompt is read once for all its continuations: they follow it in one row, and each sees the prompt and
        itself. Raises ValueError for a prompt or continuation without tokens.
        """
        rows = [_row(prompt.input_ids, continuations) for prompt, continuations in items]
        for number, ((prompt, _), row) in enumerate(zip(items, rows, strict=True)):
            check_length(len(row.input_ids), self.loaded.context_length)
            check_images(prompt, self.loaded.tokenizer, f"prompt {number}")
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
    def hidden_states(self, prompt: Prompt, continuation: list[int]) -> NDArray[np.float64]:
        """Hidden states (layers + 1, T, D), as `Engine.hidden_states` defines them."""
        ids = [*prompt.input_ids, *continuation]
        check_length(len(ids), self.loaded.context_length)
        check_images(prompt, self.loaded.tokenizer, "the prompt")
        input_ids = torch.tensor([ids], device=self.loaded.device)
        model = self.loaded.model
        embeddings = self.loaded.embed(input_ids, prompt.images)
        out = model.hidden(embeddings, use_cache=False, output_hidden_states=True, **model.routing(input_ids))
        states: NDArray[np.float64] = torch.cat(out.hidden_states).cpu().double().numpy()
        return states

    def _nlls(self, rows: list[_ScoreRow], images: list[bytes]) -> list[list[Loglikelihood]]:
        width = max(len(row.input_ids) for row in rows)
        pad = [(0, width - len(row.input_ids)) for row in rows]
        device = self.loaded.device
        input_ids, positions = (
            torch.from_numpy(np.stack([np.pad(getattr(row, name), p) for row, p in zip(rows, pad, strict=True)]))
            for name in ("input_ids", "position_ids")
        )
        input_ids, positions = input_ids.to(device), positions.to(device)
        segments = np.stack([np.pad(row.segment_ids, p, constant_values=-1) for row, p in zip(rows, pad, strict=True)])
        sees_prompt = torch.from_numpy((segments[:, :, None] > 0) & (segments[:, None, :] == 0))
        attends = attention_mask(torch.from_numpy(segments).to(device)) | sees_prompt.to(device)[:, None]
        distance = positions[:, None, :, None] - positions[:, None, None, :]
        model = self.loaded.model
        hidden = model.hidden(
            self.loaded.embed(input_ids, images),
            position_ids=positions,
            use_cache=False,
            **masks(model, attends, distance),
            **model.routing(input_ids),
        ).last_hidden_state
        return [self._row_scores(hidden[number], row) for number, row in enumerate(rows)]

    def _row_scores(self, hidden: Tensor, row: _ScoreRow) -> list[Loglikelihood]:
        """The score of each continuation, from the row's hidden states (T, D)."""
        positions = [position for positions in row.predicted_at for position in positions]
        tokens = [token for tokens in row.continuations for token in tokens]
        before, targets = torch.tensor([positions, tokens], device=hidden.device)
        logits = self.loaded.model.lm_head(hidden[before]).float()
        nll = torch.nn.functional.cross_entropy(logits, targets, reduction="none").cpu().double()
        parts = torch.split(nll, [len(tokens) for tokens in row.continuations])
        return [Loglikelihood(float(part.sum()), len(part)) for part in parts]


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
