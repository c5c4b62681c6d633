"""The visual expert against two whole models, one for each kind of position, mixed layer by layer in the test."""

import copy
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForImageTextToText,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Phi3Config,
    PretrainedConfig,
    Qwen2Config,
)

from vila_ops.config.train import VisualExpert
from vila_ops.model import folder as model_folder
from vila_ops.model.modify import Modifications
from vila_ops.model.trainable import EXPERT, set_trainable
from vila_ops.model.vila import VilaForConditionalGeneration
from vila_ops.model.visual_expert import add_visual_expert, expert_names, expert_parameters, route

SHAPE = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
DECODERS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SHAPE, num_attention_heads=4),
    "llama with grouped heads": LlamaConfig(**SHAPE, **HEADS),
    "mistral": MistralConfig(**SHAPE, **HEADS, sliding_window=None),
    "qwen2 with biases": Qwen2Config(**SHAPE, **HEADS),
}
IMAGES = torch.tensor([[0, 1, 1, 1, 0, 0, 1, 0], [0, 0, 0, 0, 0, 1, 0, 0]], dtype=torch.bool)


def shake(module: nn.Module, seed: int) -> None:
    """Random weights and biases, so that nothing is equal by chance or because it is zero."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=random))


def expert_of(model: nn.Module) -> list[nn.Parameter]:
    return [p for name, p in model.named_parameters() if EXPERT in name]


@pytest.fixture
def whole(make_model: Any, build: Callable[..., Any], tmp_path: Path) -> tuple[VilaForConditionalGeneration, Path]:
    """A model whose expert differs from its text weights, and the folder of the model without an expert."""
    plain, processor = build(make_model())
    model_folder.save(plain, tmp_path / "plain", processor=processor)
    model = model_folder.load(tmp_path / "plain", modifications=Modifications(visual_expert=True))
    random = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in expert_of(model):
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=random))
    return model, tmp_path / "plain"


def read(model: VilaForConditionalGeneration, *images: int, text: int = 6) -> dict[str, Tensor]:
    """Ids and pixels of one row per number of images."""
    random = torch.Generator().manual_seed(1)
    count, places = sum(images), model.config.image_seq_length
    rows = []
    for number in images:
        row = torch.randint(10, 200, (text,), generator=random).tolist()
        for at in range(number):
            row[1 + at : 1 + at] = [model.config.image_token_id] * places
        rows.append(row)
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    return {"input_ids": ids, "pixel_values": torch.rand(count, 3, 56, 56, generator=random)}


@torch.no_grad()
def mixed_manually(text: Any, image: Any, embeddings: Tensor, is_image: Tensor) -> Tensor:
    """Both models' projections and MLPs run on all positions, and each position takes those of its kind; output
    projection and norms are those for text."""

    def chosen(one: nn.Module, other: nn.Module, x: Tensor) -> Tensor:
        return torch.where(is_image[..., None], other(x), one(x))

    rows, length, _ = embeddings.shape
    heads, groups = text.config.num_attention_heads, text.config.num_key_value_heads
    positions = torch.arange(length)[None]
    cos, sin = text.rotary_emb(embeddings, positions)
    cos, sin = cos[:, None], sin[:, None]
    hidden = embeddings
    for one, other in zip(text.layers, image.layers, strict=True):
        x = one.input_layernorm(hidden)
        q, k, v = (
            chosen(getattr(one.self_attn, n), getattr(other.self_attn, n), x).view(rows, length, -1, 8).transpose(1, 2)
            for n in ("q_proj", "k_proj", "v_proj")
        )
        q, k = (t * cos + torch.cat([-t[..., 4:], t[..., :4]], -1) * sin for t in (q, k))
        k, v = (t.repeat_interleave(heads // groups, dim=1) for t in (k, v))
        scores = q @ k.transpose(2, 3) / 8**0.5
        scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), float("-inf"))
        mixed = (scores.softmax(-1) @ v).transpose(1, 2).reshape(rows, length, -1)
        hidden = hidden + one.self_attn.o_proj(mixed)
        hidden = hidden + chosen(one.mlp, other.mlp, one.post_attention_layernorm(hidden))
    out: Tensor = text.norm(hidden)
    return out


@pytest.mark.parametrize("name", DECODERS)
def test_each_position_goes_through_the_weights_of_its_kind(name: str) -> None:
    torch.manual_seed(0)
    text, image = (AutoModel.from_config(DECODERS[name]).eval() for _ in range(2))
    shake(text, 1)
    shake(image, 2)
    routed = copy.deepcopy(text)
    add_visual_expert(routed)
    others = image.state_dict()
    weights = {n: others[n.replace(EXPERT, ".")] for n in expert_names(DECODERS[name])}
    assert not routed.load_state_dict(weights, strict=False).unexpected_keys
    embeddings = torch.randn(2, 8, 32)
    with torch.no_grad():
        actual = routed(inputs_embeds=embeddings, routes=route(IMAGES)).last_hidden_state
        alone = text(inputs_embeds=embeddings).last_hidden_state
    assert torch.allclose(actual, mixed_manually(text, image, embeddings, IMAGES), atol=1e-5)
    assert torch.equal(actual[0, :1], alone[0, :1])
    assert not torch.allclose(actual, alone, atol=1e-2)


def test_the_gradient_is_that_of_the_slow_way() -> None:
    """The expert's gradients are zero if a pass has no image token: every rank must give every gradient."""
    torch.manual_seed(0)
    decoder = AutoModel.from_config(DECODERS["qwen2 with biases"]).eval()
    add_visual_expert(decoder)
    expert = expert_of(decoder)
    embeddings = torch.randn(2, 8, 32)
    decoder(inputs_embeds=embeddings, routes=route(IMAGES)).last_hidden_state.sum().backward()
    parameter = next(p for p in expert if p.ndim == 2)
    gradient = parameter.grad
    assert gradient is not None
    place, step = (3, 5), 1e-2
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            parameter[place] += sign * step
            values.append(decoder(inputs_embeds=embeddings, routes=route(IMAGES)).last_hidden_state.double().sum())
            parameter[place] -= sign * step
    assert float(gradient[place]) == pytest.approx(float(values[0] - values[1]) / (2 * step), rel=0.02, abs=1e-4)
    decoder.zero_grad()
    decoder(inputs_embeds=embeddings, routes=route(IMAGES & False)).last_hidden_state.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in expert)


def test_a_gradient_checkpoint_routes_again_as_it_did() -> None:
    torch.manual_seed(0)
    decoder = AutoModel.from_config(DECODERS["llama"]).train()
    add_visual_expert(decoder)
    for parameter in expert_of(decoder):
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    embeddings = torch.randn(2, 8, 32, requires_grad=True)
    gradients = []
    for kept in ("everything", "checkpoints", "reentrant checkpoints"):
        if kept != "everything":
            decoder.activation_checkpointing_enable({"use_reentrant": kept.startswith("reentrant")})
        decoder.zero_grad()
        out = decoder(inputs_embeds=embeddings, routes=route(IMAGES), use_cache=False).last_hidden_state
        decoder(inputs_embeds=embeddings, routes=route(~IMAGES), use_cache=False)  # another pass before the backward
        out.square().sum().backward()
        gradients.append([p.grad.clone() for p in decoder.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(list(decoder.parameters())) - 1  # all but the token embedding
    for other in gradients[1:]:
        assert all(torch.equal(a, b) for a, b in zip(gradients[0], other, strict=True))


def test_an_exception_and_another_thread_leave_no_routes_behind() -> None:
    torch.manual_seed(0)
    decoder = AutoModel.from_config(DECODERS["llama"]).eval()
    add_visual_expert(decoder)
    for parameter in expert_of(decoder):
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    embeddings = torch.randn(2, 8, 32)
    kinds = [route(IMAGES), route(~IMAGES), None]

    def run(routes: Any) -> Tensor:
        with torch.inference_mode():
            out: Tensor = decoder(inputs_embeds=embeddings, routes=routes).last_hidden_state
        return out

    expected = [run(routes) for routes in kinds]
    with pytest.raises(IndexError):
        run(route(torch.ones(3, 30, dtype=torch.bool)))  # routes of another batch
    with pytest.raises(LookupError):
        decoder.layers[0].self_attn.q_proj(embeddings)  # outside a layer's pass: the failed pass left no routes
    wrong: list[int] = []

    def repeat(number: int) -> None:
        for _ in range(40):
            if not torch.equal(run(kinds[number]), expected[number]):
                wrong.append(number)

    threads = [threading.Thread(target=repeat, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_fresh_expert_changes_no_logit(make_model: Any, build: Callable[..., Any], tmp_path: Path) -> None:
    plain, processor = build(make_model())
    model_folder.save(plain, tmp_path, processor=processor)
    model = model_folder.load(tmp_path, modifications=Modifications(visual_expert=True))
    inputs = read(model, 2, 1)
    with torch.no_grad():
        assert torch.allclose(model(**inputs).logits, plain(**inputs).logits, atol=1e-6)


def test_only_the_expert_trains_and_text_alone_comes_out_as_before(whole: Any) -> None:
    model, plain_folder = whole
    plain = model_folder.load(plain_folder)
    trained = set_trainable(model, ("projector", "language_model"), VisualExpert())
    names = {name for name, _ in trained["language_model"]}
    assert names == {f"model.language_model.{name}" for name in expert_names(model.config.text_config)}
    inputs = read(model, 2, 0)
    model.train()
    model(**inputs).logits.square().mean().backward()
    with torch.no_grad():
        for _, parameter in trained["language_model"] + trained["projector"]:
            assert parameter.grad is not None
            parameter.sub_(parameter.grad)
    state, before = model.state_dict(), plain.state_dict()
    kept = [name for name in before if "multi_modal_projector" not in name]
    assert all(torch.equal(state[name], before[name]) for name in kept)
    text = inputs["input_ids"][1:]
    model.eval()
    with torch.no_grad():
        actual = model(input_ids=text).logits
        assert torch.equal(actual, plain(input_ids=text).logits)
        routed = model.hidden(model.embed(text, None), **model.routing(text, everywhere=True)).last_hidden_state
        assert torch.equal(model.lm_head(routed), actual)
        assert not torch.allclose(model(**inputs).logits, plain(**inputs).logits, atol=1e-2)


def test_save_and_load_are_exact(whole: Any, build: Callable[..., Any], make_model: Any, tmp_path: Path) -> None:
    model, _ = whole
    _, processor = build(make_model())
    first, second = tmp_path / "first", tmp_path / "second"
    model_folder.save(model, first, processor=processor)
    again = model_folder.load(first)
    model_folder.save(again, second, processor=processor)
    for name in ("model.safetensors", "config.json"):
        assert (first / name).read_bytes() == (second / name).read_bytes()
    state, loaded = model.state_dict(), again.state_dict()
    assert state.keys() == loaded.keys()
    assert all(torch.equal(state[name], loaded[name]) for name in state)
    auto, info = AutoModelForImageTextToText.from_pretrained(first, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    inputs = read(model, 2, 1)
    with torch.no_grad():
        assert torch.equal(auto(**inputs).logits, model(**inputs).logits)


def test_a_stage_writes_the_expert_that_it_gave_and_trained(whole: Any, tmp_path: Path) -> None:
    model, plain = whole
    expert = {name: p for name, p in model.named_parameters() if EXPERT in name}
    out = tmp_path / "out"
    out.mkdir()
    model_folder.save_trained(expert, out, init=plain, modifications=Modifications(visual_expert=True))
    again = model_folder.load(out)
    assert again.config.visual_expert
    state, loaded = model.state_dict(), again.state_dict()
    assert state.keys() == loaded.keys()
    assert all(torch.equal(state[name], loaded[name]) for name in state)
    later = model_folder.load(out, modifications=Modifications(visual_expert=True))  # its own expert is kept
    assert all(torch.equal(state[name], tensor) for name, tensor in later.state_dict().items())


def test_generation_with_a_cache_is_the_full_forward_pass(whole: Any) -> None:
    model, _ = whole
    inputs = read(model, 2)
    made = model.generate(**inputs, max_new_tokens=6, do_sample=False, output_logits=True, return_dict_in_generate=True)
    prompt = inputs["input_ids"].shape[1]
    with torch.no_grad():
        full = model(input_ids=made.sequences, pixel_values=inputs["pixel_values"]).logits
    for step, logits in enumerate(made.logits):
        assert torch.allclose(logits, full[:, prompt + step - 1], atol=1e-5)


def test_without_token_ids_nobody_knows_what_is_an_image(whole: Any) -> None:
    model, _ = whole
    embeddings = torch.zeros(1, 4, 64)
    with pytest.raises(ValueError, match="give input_ids"):
        model(inputs_embeds=embeddings)
    with pytest.raises(ValueError, match="which positions are image tokens"):
        model.hidden(embeddings)


@pytest.mark.parametrize(
    ("config", "missing"),
    [
        (Phi3Config(**SHAPE, **HEADS, pad_token_id=0), r"self_attn\.q_proj"),
        (MixtralConfig(**SHAPE, **HEADS, num_local_experts=2), "mlp of linear layers"),
        (GPT2Config(vocab_size=128, n_embd=32, n_layer=1, n_head=2), "no list `layers`"),
    ],
)
def test_a_language_model_of_another_build_is_refused(config: PretrainedConfig, missing: str) -> None:
    with torch.device("meta"):
        decoder = AutoModel.from_config(config)
    assert expert_parameters(decoder) is None
    with pytest.raises(ValueError, match=missing):
        add_visual_expert(decoder)


def test_llama_2_7b_grows_as_the_paper_says() -> None:
    """32 layers of 3 x 4096^2 (q, k, v) and 3 x 4096 x 11008 (FFN) to 6 738 415 616; the paper says 1.9."""
    config = LlamaConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32
    )
    added = 32 * (3 * 4096**2 + 3 * 4096 * 11008)
    with torch.device("meta"):
        decoder = AutoModel.from_config(config)
    assert expert_parameters(decoder) == added
    before = sum(parameter.numel() for parameter in decoder.parameters())
    add_visual_expert(decoder)
    assert sum(parameter.numel() for parameter in decoder.parameters()) == before + added
    assert round((6_738_415_616 + added) / 6_738_415_616, 1) == 1.9
