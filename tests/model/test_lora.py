import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vila_ops.config.train import Lora
from vila_ops.model import lora
from vila_ops.model.trainable import compute_in, set_trainable
from vila_ops.model.vila import VilaForConditionalGeneration

LAYERS = {
    f"model.language_model.layers.{layer}.{name}"
    for layer in range(2)
    for name in (
        *(f"self_attn.{part}_proj" for part in "qkvo"),
        *(f"mlp.{part}_proj" for part in ("gate", "up", "down")),
    )
}
"""Adapted layers of the tiny Llama: 4 of attention and 3 of the feed-forward part in each of 2 blocks."""
TUNING = Lora(rank=4, alpha=8.0)
Make = Callable[[], VilaForConditionalGeneration]


@pytest.fixture
def fresh(make_model: Any, build: Callable[..., Any]) -> Make:
    def make() -> VilaForConditionalGeneration:
        whole: VilaForConditionalGeneration = build(make_model("clip", "mlp_gelu"))[0]
        return whole

    return make


@pytest.fixture
def adapter() -> lora.Adapter:
    """Adapters with large values, so that a wrong scale shows."""
    generator = torch.Generator().manual_seed(3)
    shapes = {"gate_proj": (128, 64), "up_proj": (128, 64), "down_proj": (64, 128)}
    layers = {}
    for layer in sorted(LAYERS):
        out, into = shapes.get(layer.rpartition(".")[2], (64, 64))
        layers[layer] = (torch.randn(4, into, generator=generator), torch.randn(out, 4, generator=generator))
    return lora.Adapter(TUNING, layers)


def logits(model: VilaForConditionalGeneration) -> Tensor:
    ids = torch.tensor([[1, 40, *[3] * model.config.image_seq_length, 41, 2]])
    values = torch.rand(1, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        actual: Tensor = model(input_ids=ids, pixel_values=values).logits
    return actual


def test_adapters_sit_on_every_linear_layer_of_the_language_model_and_change_nothing_yet(fresh: Make) -> None:
    model = fresh()
    before = logits(model)
    lora.add(model, TUNING, seed=0, dtype=torch.float32)
    assert torch.equal(logits(model), before)
    trained = set_trainable(model, ("projector", "language_model"), TUNING)
    names = {name for name, _ in trained["language_model"]}
    assert names == {f"{layer}.lora_{which}.default.weight" for layer in LAYERS for which in "AB"}
    per_block = 4 * (64 + 64) + 3 * (64 + 128)  # in + out of each layer, times the rank
    assert sum(p.numel() for _, p in trained["language_model"]) == 2 * 4 * per_block
    assert all(p.requires_grad for _, p in trained["projector"])
    assert not any(p.requires_grad for p in model.model.vision_tower.parameters())
    assert not model.lm_head.weight.requires_grad


def test_a_seed_gives_the_same_adapters_and_leaves_torch_s_own_generator_alone(fresh: Make) -> None:
    actual = []
    for seed in (0, 0, 1):
        model = fresh()
        state = torch.get_rng_state()
        lora.add(model, TUNING, seed=seed, dtype=torch.float32)
        assert torch.equal(torch.get_rng_state(), state)
        actual.append(model.get_submodule("model.language_model.layers.1.mlp.up_proj").lora_A["default"].weight)
    assert torch.equal(actual[0], actual[1])
    assert not torch.equal(actual[0], actual[2])


def test_in_bf16_all_weights_are_halved_adapters_have_fp32_masters_and_rotary_frequencies_keep_their_bits(
    fresh: Make,
) -> None:
    model = fresh()
    frequencies = model.model.language_model.rotary_emb.inv_freq.clone()
    lora.add(model, TUNING, seed=0, dtype=torch.bfloat16)
    trained = set_trainable(model, ("language_model",), TUNING)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}
    masters = compute_in(torch.bfloat16, model, trained)
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
    assert masters.keys() == before.keys()
    assert all(torch.equal(masters[name], before[name]) for name in before)
    assert torch.equal(model.model.language_model.rotary_emb.inv_freq, frequencies)


def test_merged_weights_are_those_of_peft_s_own_merge(fresh: Make, adapter: lora.Adapter, tmp_path: Path) -> None:
    import peft  # it loads torch's compiler: 4 s of CPU

    base = fresh()
    state = dict(base.state_dict())
    merged = lora.merge(state, adapter)
    lora.write(adapter, tmp_path / "adapter", whole={})
    theirs = peft.PeftModel.from_pretrained(fresh(), tmp_path / "adapter").merge_and_unload().state_dict()
    assert merged.keys() == theirs.keys()
    assert all(torch.equal(merged[name], theirs[name]) for name in theirs)
    assert {name.removesuffix(".weight") for name in state if not torch.equal(state[name], merged[name])} == LAYERS


def test_unmerge_gives_the_base_back_to_fp32_rounding(fresh: Make, adapter: lora.Adapter) -> None:
    state = dict(fresh().state_dict())
    merged = lora.merge(state, adapter)
    back = lora.unmerge(merged, adapter)
    eps = torch.finfo(torch.float32).eps
    for name, tensor in state.items():
        largest = max(float(merged[name].abs().max()), 1.0)
        assert float((back[name] - tensor).abs().max()) <= eps * largest, name  # half an ulp for each of the two sums


def test_an_adapter_folder_reads_back_and_names_nothing_of_this_machine(adapter: lora.Adapter, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    lora.write(adapter, folder, whole={"model.multi_modal_projector.linear_1.bias": torch.ones(3)})
    again = lora.read(folder)
    assert again.tuning == TUNING
    assert again.layers.keys() == adapter.layers.keys()
    for layer, pair in adapter.layers.items():
        assert all(torch.equal(one, other) for one, other in zip(pair, again.layers[layer], strict=True))
    stated = json.loads((folder / "adapter_config.json").read_text())
    assert stated["base_model_name_or_path"] is None
    assert (stated["r"], stated["lora_alpha"], stated["modules_to_save"]) == (4, 8, ["multi_modal_projector"])
    assert str(tmp_path) not in json.dumps(stated)


@pytest.mark.parametrize(
    "change", [{"use_dora": True}, {"use_rslora": True}, {"peft_type": "LOHA"}, {"alpha_pattern": {"q_proj": 3}}]
)
def test_an_adapter_that_computes_something_else_is_refused(
    change: dict[str, Any], adapter: lora.Adapter, tmp_path: Path
) -> None:
    folder = tmp_path / "adapter"
    lora.write(adapter, folder, whole={})
    config = folder / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **change}))
    with pytest.raises(ValueError, match="only plain LoRA is supported"):
        lora.read(folder)


def test_an_adapter_of_another_model_is_refused(fresh: Make, adapter: lora.Adapter) -> None:
    state = dict(fresh().state_dict())
    name = "model.language_model.layers.0.mlp.up_proj.weight"
    with pytest.raises(
        ValueError, match=r"layers.0.mlp.up_proj fits a weight of shape \(128, 64\), but the model has \(128, 60\)"
    ):
        lora.merge({**state, name: state[name][:, :60]}, adapter)
    del state[name]
    with pytest.raises(ValueError, match="but the model has None"):
        lora.merge(state, adapter)


def test_dropout_drops_its_share_and_keeps_the_mean() -> None:
    dropout = lora.Dropout(0.25, 0)
    x = torch.ones(1, 100, 1000)
    assert torch.equal(dropout(x), x)  # no draws: validation
    dropout.draws = (7,)
    dropped = dropout(x)
    assert dropped.unique().tolist() == pytest.approx([0.0, 4 / 3])
    assert float((dropped == 0).float().mean()) == pytest.approx(0.25, abs=5 * (0.25 * 0.75 / 100_000) ** 0.5)


def test_a_row_s_mask_depends_on_its_draw_and_layer_and_not_on_its_neighbours_or_padding() -> None:
    first, second = lora.Dropout(0.5, 0), lora.Dropout(0.5, 1)
    x = torch.ones(3, 8, 64)
    for dropout in (first, second):
        dropout.draws = (1, 2, 1)
    together = first(x)
    assert torch.equal(together[0], together[2])
    assert not torch.equal(together[0], together[1])
    assert not torch.equal(together[0], second(x)[0])
    first.draws = (2,)
    assert torch.equal(first(x[:1])[0], together[1])
    assert torch.equal(first(x[:1, :5])[0], together[1, :5])  # padded to another length
    with pytest.raises(ValueError, match=r"gets 3 rows of a batch of 1; set tuning.dropout to 0"):
        first(x)


def test_a_draw_is_a_function_of_seed_step_and_samples() -> None:
    draws = [
        lora.draw(*given) for given in ((0, 5, ("a", "b")), (1, 5, ("a", "b")), (0, 6, ("a", "b")), (0, 5, ("ab",)))
    ]
    assert len(set(draws)) == 4
    assert draws[0] == lora.draw(0, 5, ["a", "b"])
    assert all(0 <= value < 2**63 for value in draws)


def test_a_language_model_without_linear_layers_is_refused(fresh: Make) -> None:
    model = fresh()
    model.model.language_model.layers = nn.ModuleList()
    with pytest.raises(ValueError, match="no linear layer"):
        lora.add(model, TUNING, seed=0, dtype=torch.float32)


def test_a_model_with_a_visual_expert_is_refused(fresh: Make) -> None:
    model = fresh()
    model.config.visual_expert = True
    with pytest.raises(ValueError, match="two weights a layer, and LoRA adapts one"):
        lora.add(model, TUNING, seed=0, dtype=torch.float32)


@pytest.mark.slow
def test_lora_fetches_no_code_from_the_hub_where_kernels_is_installed(tmp_path: Path) -> None:
    (tmp_path / "kernels.py").write_text("def get_kernel(*args, **more):\n    print('fetched')\n    raise OSError\n")
    code = (
        "import sys, vila_ops.model.lora as lora\n"
        "lora._import_bitsandbytes()\n"
        "assert 'bitsandbytes' in sys.modules\n"
        "import kernels\n"
        "print('kernels as before')"
    )
    paths = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=paths)
    assert done.stdout == "kernels as before\n"
