"""GGUF files hold the model: read back by transformers and by gguf's reader, which share no code with the writer."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from vila_ops.artifacts.store import content
from vila_ops.config import Model, Resources
from vila_ops.model import export
from vila_ops.model import folder as model_folder
from vila_ops.model.assemble import assemble
from vila_ops.packages.tokenizer import read_tokenizer

IDS = torch.tensor([[1, 40, 77, 130, 9, 260, 41, 2]])
TEXTS = ("Is there a dog?", "  two\n\nlines, 12345 and 3.14", "Zażółć gęślą jaźń 猫🙂", "it's we'll <|im_end|>x")


@pytest.fixture(scope="module")
def folder(
    make_model: Callable[..., Model],
    make_resources: Callable[..., Resources],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    return content(assemble(make_model("siglip"), make_resources(tmp_path_factory.mktemp("store"))))


def tensors(path: Path) -> dict[str, Any]:
    return {one.name: one for one in GGUFReader(path).tensors}


def test_the_language_model_is_ours_in_transformers_reader_of_gguf(folder: Path, tmp_path: Path) -> None:
    export.write_for_llama_cpp(folder, tmp_path / "out", "f32")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out", gguf_file="model.gguf", dtype=torch.float32).eval()
    ours = model_folder.load(folder)
    with torch.no_grad():
        hidden = ours.hidden(ours.embed(IDS, None), use_cache=False).last_hidden_state
        assert (stock(IDS).logits - ours.lm_head(hidden)).abs().max() < 1e-5


def test_the_tokenizer_is_ours_in_transformers_reader_of_gguf(folder: Path, tmp_path: Path) -> None:
    export.write_for_llama_cpp(folder, tmp_path / "out", "f16")
    stock = AutoTokenizer.from_pretrained(tmp_path / "out", gguf_file="model.gguf")
    ours = read_tokenizer(folder)
    for text in TEXTS:
        assert stock(text, add_special_tokens=False)["input_ids"] == ours(text, add_special_tokens=False)["input_ids"]
    assert stock.eos_token_id == ours.eos_token_id


def test_the_tower_up_to_its_features_and_the_projector_are_in_the_other_file(folder: Path, tmp_path: Path) -> None:
    export.write_for_llama_cpp(folder, tmp_path / "out", "f32")
    stored = load_file(folder / "model.safetensors")
    known = tensors(tmp_path / "out" / "mmproj.gguf")
    tower = "model.vision_tower.vision_model."
    pairs = {
        "v.patch_embd.weight": f"{tower}embeddings.patch_embedding.weight",
        "v.position_embd.weight": f"{tower}embeddings.position_embedding.weight",
        "v.blk.0.attn_q.weight": f"{tower}encoder.layers.0.self_attn.q_proj.weight",
        "v.blk.0.attn_out.bias": f"{tower}encoder.layers.0.self_attn.out_proj.bias",
        "v.blk.0.ffn_up.weight": f"{tower}encoder.layers.0.mlp.fc1.weight",
        "v.blk.0.ffn_down.weight": f"{tower}encoder.layers.0.mlp.fc2.weight",
        "v.blk.0.ln1.weight": f"{tower}encoder.layers.0.layer_norm1.weight",
        "mm.0.weight": "model.multi_modal_projector.linear_1.weight",
        "mm.2.bias": "model.multi_modal_projector.linear_2.bias",
    }
    for name, source in pairs.items():
        assert np.array_equal(known[name].data, stored[source].float().numpy()), name
    blocks = {name.split(".")[2] for name in known if name.startswith("v.blk")}
    assert blocks == {"0"}, "the second of two layers comes after the features of layer -2"
    assert not [name for name in known if "post_ln" in name]


def test_q8_0_rounds_to_half_a_step_and_the_bits_are_counted(folder: Path, tmp_path: Path) -> None:
    text, mmproj = export.write_for_llama_cpp(folder, tmp_path / "out", "q8_0")
    export.write_for_llama_cpp(folder, tmp_path / "exact", "f32")
    exact = tensors(tmp_path / "exact" / "model.gguf")
    weights = num_bytes = 0
    for name, one in tensors(tmp_path / "out" / "model.gguf").items():
        weights += int(np.prod(one.shape))
        num_bytes += one.n_bytes
        blocks = exact[name].data.reshape(-1, 32)
        gap = np.abs(dequantize(one.data, one.tensor_type).reshape(-1, 32) - blocks)
        step = np.abs(blocks).max(axis=1, keepdims=True) / 127
        assert (gap <= 0.5 * step + np.abs(blocks).max() * 2**-10).all(), name
    assert text.bits_per_weight == pytest.approx(8 * num_bytes / weights, abs=1e-3)
    assert 8.5 <= text.bits_per_weight < 8.7, "8 bits and a scale of 16 for each 32, and the norms"
    assert text.num_bytes == (tmp_path / "out" / "model.gguf").stat().st_size
    assert 16 < mmproj.bits_per_weight < 20
