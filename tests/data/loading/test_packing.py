from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from vila_ops.data.loading.packing import pack
from vila_ops.data.shards import Sample
from vila_ops.model.attention import attention_mask


def sample(key: str, ids: list[int], targets: list[bool] | None = None, images: tuple[bytes, ...] = ()) -> Sample:
    return Sample(
        id=key, key=key, source="s", object="o", category="", text="", licence="", provenance="", input_ids=ids,
        is_target=targets or [False] + [True] * (len(ids) - 1), images=images,
    )  # fmt: skip


def test_samples_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="11 tokens do not fit"):
        pack([sample("a", list(range(11)))], capacity=10)


def test_a_row_by_hand() -> None:
    row = pack(
        [sample("a", [1, 7, 8], [False, False, True], (b"p",)), sample("b", [1, 9, 5, 2], None, (b"q", b"r"))],
        capacity=9,
    )
    assert row.input_ids.tolist() == [1, 7, 8, 1, 9, 5, 2, 0, 0]
    assert row.position_ids.tolist() == [0, 1, 2, 0, 1, 2, 3, 0, 0]
    assert row.segment_ids.tolist() == [1, 1, 1, 2, 2, 2, 2, 0, 0]
    assert row.labels.tolist() == [-100, 8, -100, 9, 5, 2, -100, -100, -100]
    assert row.images == (b"p", b"q", b"r")
    assert row.keys == ("a", "b")


def test_packed_logits_are_those_of_the_samples_alone(make_model: Any, build: Callable[..., Any]) -> None:
    """And with a mask of ones they are not, which shows that this test can fail."""
    whole, _ = build(make_model("clip", "mlp_downsample"))
    draw = np.random.default_rng(0)
    image = whole.config.image_token_id
    features = torch.randn(3, 16, 32, generator=torch.Generator().manual_seed(0))
    ids = [[1, *draw.integers(4, 500, n).tolist()] for n in (9, 5, 12, 7)]
    ids[1] += [image] * 4 + [44, 45]
    ids[2] = [1, *[image] * 4, 50, *[image] * 4, *ids[2]]
    shown = [0, 1, 2, 0]  # images of each sample
    rows = [pack([sample(str(i), ids[i]) for i in group], capacity=48) for group in ((0, 1), (2, 3))]
    stacked = {
        name: torch.from_numpy(np.stack([getattr(row, name) for row in rows])) for name in ("input_ids", "position_ids")
    }
    mask = attention_mask(torch.from_numpy(np.stack([row.segment_ids for row in rows])))

    def logits(input_ids: torch.Tensor, shown_features: torch.Tensor | None, **more: Any) -> torch.Tensor:
        with torch.no_grad():
            hidden = whole.hidden(whole.embed(input_ids, shown_features), use_cache=False, **more).last_hidden_state
            found: torch.Tensor = whole.lm_head(hidden)
        return found * 100  # of a random model they are small

    packed = logits(stacked["input_ids"], features, position_ids=stacked["position_ids"], attention_mask=mask)
    leaking = logits(
        stacked["input_ids"], features, position_ids=stacked["position_ids"],
        attention_mask=torch.ones(2, 48, dtype=torch.long),
    )  # fmt: skip
    start, first, leaked = 0, 0, []
    for i, row in zip(range(4), (0, 0, 1, 1), strict=True):
        start = 0 if i == 2 else start
        stop = start + len(ids[i])
        own = features[first : first + shown[i]] if shown[i] else None
        alone = logits(torch.tensor([ids[i]]), own)[0]
        assert float((packed[row, start:stop] - alone).abs().max()) <= 1e-4
        leaked.append(float((leaking[row, start:stop] - alone).abs().max()))
        start, first = stop, first + shown[i]
    assert max(leaked) > 0.1
