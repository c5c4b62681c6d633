"""Packed weights give the products of the weights as they were."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from tests.generate.torch_engine.test_quantised import Whole, of_family
from vila_ops.config import Model
from vila_ops.generate.torch_engine.packed import can_pack, pack, padded

pytestmark = pytest.mark.skipif(not can_pack(), reason="this torch has no oneDNN")


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "nemotron", "visual expert"])
def test_a_packed_model_computes_what_it_did(
    make_model: Callable[..., Model], build: Callable[[Model], Whole], family: str
) -> None:
    """Tied heads and those of their own, soft-capped ones, biases, and layers inside layers; one row and many."""
    model = of_family(build(make_model())[0].config, family)
    other = copy.deepcopy(model)
    pack(other)
    ids = torch.randint(5, 60, (3, 11), generator=torch.Generator().manual_seed(1))
    for rows in (ids, ids[:1, :1]):
        with torch.inference_mode():
            expected, actual = (one(input_ids=rows).logits for one in (model, other))
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    left: list[Any] = [one for one in other.model.language_model.modules() if isinstance(one, nn.Linear)]
    assert [one for one in (*left, other.lm_head) if one.weight.numel()] == []
    assert other.get_input_embeddings().weight.numel() == model.get_input_embeddings().weight.numel()


def test_few_numbers_of_rows_are_multiplied() -> None:
    numbers = [padded(rows) for rows in range(1, 4097)]
    assert numbers[:16] == [*range(1, 17)]
    assert numbers == sorted(numbers)
    assert all(0 <= number - rows <= rows / 8 for rows, number in enumerate(numbers, 1))
    assert len(set(numbers)) == 15 + 8 * 8 + 1, "eight from 16 to 31 and so on, and 4096"
    assert all(padded(number) == number for number in numbers)
