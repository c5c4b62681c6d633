"""Weight-only quantisation against torch's own, and quantised models against models with rounded weights."""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING

from vila_ops.artifacts.store import content
from vila_ops.config import Model, Resources
from vila_ops.config.engine import TorchEngine
from vila_ops.generate.engine import EngineOptions, generate_all, score_all
from vila_ops.generate.load import open_folder
from vila_ops.generate.request import Prompt, Sampling
from vila_ops.generate.torch_engine.loaded_model import read_model
from vila_ops.generate.torch_engine.quantised import BLOCK, Int4, Int8, Scratch, quantise
from vila_ops.model.assemble import assemble
from vila_ops.model.configuration import VilaConfig
from vila_ops.model.vila import VilaForConditionalGeneration

SHAPE = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip
Whole = tuple[VilaForConditionalGeneration, Any]


def rounded(weight: Tensor, *, largest: int, group: int) -> Tensor:
    """A matrix on torch's grid of integers: symmetric, one scale for each group of inputs of a row."""
    groups = weight.reshape(-1, group)
    scales = groups.abs().amax(1) / largest
    zero = torch.zeros(len(groups), dtype=torch.int32)
    return torch.fake_quantize_per_channel_affine(groups, scales, zero, 0, -largest, largest).view_as(weight)


@pytest.mark.parametrize(("matrix", "largest", "group"), [(Int8, 127, 192), (Int4, 7, 64)])
@pytest.mark.parametrize("rows", [1, 40, BLOCK // 192 + 3])
def test_a_product_is_that_of_the_matrix_on_torchs_grid(matrix: Any, largest: int, group: int, rows: int) -> None:
    draws = torch.Generator().manual_seed(rows)
    weight = torch.randn(rows, 192, generator=draws)
    x = torch.randn(5, 192, generator=draws)
    expected = rounded(weight, largest=largest, group=group)
    quantised = matrix(weight, Scratch())
    torch.testing.assert_close(quantised.product(x), x @ expected.T, atol=1e-4, rtol=1e-4)
    bits = 8 * quantised.numbers.numel() * quantised.numbers.element_size() / weight.numel()
    assert bits == {127: 8, 7: 4}[largest]


def test_rows_of_zeros_stay_zeros() -> None:
    weight = torch.zeros(2, 64)
    weight[1, 3] = 2.0
    for matrix in (Int8(weight, Scratch()), Int4(weight, Scratch())):
        assert torch.equal(matrix.product(torch.eye(64)), weight.T)


def test_int4_refuses_what_has_no_groups() -> None:
    with pytest.raises(ValueError, match="multiple of 16, and one has 40; use int8"):
        Int4(torch.ones(2, 40), Scratch())


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "nemotron", "visual expert"])
def test_a_quantised_model_computes_what_the_model_with_rounded_weights_does(
    make_model: Callable[..., Model], build: Callable[[Model], Whole], kind: Any, family: str
) -> None:
    """Tied matrices and scaled embeddings, soft-capped heads, biases, and layers inside layers."""
    model = of_family(build(make_model())[0].config, family)
    other = copy.deepcopy(model)
    quantise(other, kind)
    head, embedding = model.lm_head, model.get_input_embeddings()
    with torch.no_grad():
        for layer in (*model.model.language_model.modules(), head):
            if isinstance(layer, nn.Linear | nn.Embedding) and not (layer is head and tied(model)):
                wide = kind == "int8" or layer in (head, embedding)
                columns = layer.weight.shape[1]
                group = columns if wide else math.gcd(columns, 64)
                layer.weight.copy_(rounded(layer.weight, largest=127 if wide else 7, group=group))
        ids = torch.tensor([[5, 9, 11, 7, 3]])
        expected, actual = (one(input_ids=ids).logits for one in (model, other))
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-3)
    left = (*other.model.language_model.named_parameters(), *other.lm_head.named_parameters())
    assert [name for name, one in left if one.dim() > 1 and one.numel()] == []


def of_family(config: VilaConfig, family: str) -> VilaForConditionalGeneration:
    """A random model like that of a config with another language model."""
    changed = copy.deepcopy(config)
    if family == "visual expert":
        changed.visual_expert = True
    elif family != config.text_config.model_type:
        extra = {"final_logit_softcapping": 2.0, "head_dim": 8} if family == "gemma3_text" else {}
        vocabulary = {"vocab_size": config.text_config.vocab_size, "pad_token_id": 0}
        changed.text_config = CONFIG_MAPPING[family](**SHAPE, **vocabulary, **extra)
    torch.manual_seed(0)
    return VilaForConditionalGeneration(changed).eval()


def tied(model: VilaForConditionalGeneration) -> bool:
    """Whether head and embedding are one matrix."""
    return model.lm_head.weight is model.get_input_embeddings().weight


def test_an_engine_generates_and_scores_with_quantised_weights(
    make_model: Callable[..., Model], make_resources: Callable[..., Resources], tmp_path: Path
) -> None:
    folder = content(assemble(make_model(), make_resources(tmp_path)))
    whole = read_model(folder, EngineOptions())
    texts = ["Hello", "What is this?", "Yes"]
    scores = {}
    for precision in ("fp32", "int8", "int4"):
        engine = open_folder(folder, TorchEngine(), EngineOptions(precision=precision))
        prompts = [Prompt(whole.tokenizer.prompt([("user", (text,))])) for text in texts]
        outputs = generate_all(engine, prompts, Sampling(max_new_tokens=4, stop_ids=frozenset()))
        assert [len(one.ids) for one in outputs] == [4, 4, 4]
        scored = score_all(engine, [(prompt, [[5, 6, 7]]) for prompt in prompts])
        scores[precision] = torch.tensor([one.nll for each in scored for one in each])
        engine.close()
    error = {kind: float((scores[kind] - scores["fp32"]).abs().max()) for kind in ("int8", "int4")}
    assert 0 < error["int8"] < error["int4"]
