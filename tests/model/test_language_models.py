"""Each language model computes here what its class in stock transformers computes, to 1e-5, from the same folder."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, LlavaForConditionalGeneration, PreTrainedModel

from tests.model.nvlabs_layout import NVILA
from tests.model.nvlabs_layout import write as write_nvlabs
from vila_ops.config import Model, Resources
from vila_ops.data.images import Fit
from vila_ops.data.text.conversation import Tokenizer
from vila_ops.generate.request import Delta, Prompt, Sampling, TokenLogprob
from vila_ops.generate.torch_engine.image_features import RecentFeatures
from vila_ops.generate.torch_engine.loaded_model import LoadedModel
from vila_ops.generate.torch_engine.request_state import GenerationRequest
from vila_ops.generate.torch_engine.scheduler import Scheduler
from vila_ops.generate.torch_engine.scorer import Scorer
from vila_ops.model import export
from vila_ops.model import folder as model_folder
from vila_ops.model.assemble import assemble
from vila_ops.model.attention import document_mask, plan, use
from vila_ops.model.build import embedding_std
from vila_ops.model.importing.checkpoint import import_checkpoint
from vila_ops.model.language_models import LANGUAGE_MODELS, PLAIN_HEAD, check_language_model, head_form
from vila_ops.model.pixels import Pixels
from vila_ops.model.vila import VilaForConditionalGeneration, losses
from vila_ops.packages.tokenizer import read_tokenizer
from vila_ops.plan.shapes import shapes_of

TINY = Path(__file__).parent.parent / "tiny"
ROWS, IMAGE = 700, 3
"""Rows of the embedding, more than the tokenizer has ids and no multiple of 64; id of the image token."""
SHAPE = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": ROWS, "max_position_embeddings": 64, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
WINDOW, HEAD = {"sliding_window": 6}, {"head_dim": 8}
MIXED = {**WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
SWITCHED = {**WINDOW, "use_sliding_window": True}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
FIELDS: dict[str, dict[str, Any]] = {
    "cohere": {"logit_scale": 0.3},
    "cohere2": {"logit_scale": 0.3, **MIXED},
    "exaone4": MIXED,
    "gemma": HEAD,
    "gemma2": {**HEAD, **MIXED, "final_logit_softcapping": 2.0, "attn_logit_softcapping": 3.0},
    "gemma3_text": {**HEAD, **MIXED, "final_logit_softcapping": 2.0},
    "glm": HEAD,
    "glm4": HEAD,
    "granite": {"logits_scaling": 3.0, "embedding_multiplier": 2.0, "attention_multiplier": 0.3},
    "helium": HEAD,
    "hunyuan_v1_dense": HEAD,
    "llama": {"rope_parameters": YARN},
    "ministral": {**MIXED, **HEAD},
    "mistral": WINDOW,
    "olmo": {"clip_qkv": 0.5},
    "olmo3": MIXED,
    "phi3": WINDOW,
    "qwen2": {**SWITCHED, "max_window_layers": 1},
    "qwen3": {**SWITCHED, **HEAD, "max_window_layers": 1},
    "seed_oss": HEAD,
    "smollm3": {**SWITCHED, "no_rope_layers": [1, 0]},
    "starcoder2": WINDOW,
}
"""What makes each class differ from Llama: windows shorter than the samples, scales, soft-capping."""
SAMPLES = [torch.randint(4, 500, (n,), generator=torch.Generator().manual_seed(n)) for n in (21, 9, 14)]
PROMPTS = [[1, *sample.tolist()] for sample in SAMPLES]
NEW = 9
"""Tokens of each answer."""


@dataclass(frozen=True)
class Pair:
    """A stock language model and ours, read from the same folder."""

    stock: PreTrainedModel
    ours: VilaForConditionalGeneration
    folder: Path
    """The whole model, as saved."""

    def logits(self, ids: list[int]) -> Tensor:
        """Logits (T, V) of a sequence alone, by the stock model, at rows that the tokenizer may have."""
        with torch.no_grad():
            out: Tensor = self.stock(input_ids=torch.tensor([ids])).logits[0]
        return out

    def loaded(self) -> LoadedModel:
        """Our model as the engine has it; no image is asked for."""
        tokenizer = Tokenizer(
            read_tokenizer(self.folder), image_tokens=self.ours.config.image_seq_length, after_image=""
        )
        fit, cpu = Fit("pad", (0.5, 0.5, 0.5)), torch.device("cpu")
        features = RecentFeatures(self.ours, Pixels((0.5,) * 3, (0.5,) * 3), max_images=1)
        return LoadedModel(self.ours, cpu, tokenizer, features, fit)


def write(folder: Path, kind: str, **fields: Any) -> PreTrainedModel:
    """A language model's folder with random weights, each large enough to change the logits, and a tokenizer."""
    torch.manual_seed(0)
    accepted = vars(CONFIG_MAPPING[kind]())
    config = CONFIG_MAPPING[kind](**{key: value for key, value in SHAPE.items() if key in accepted} | fields)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder)
    shutil.copytree(TINY / "tokenizer", folder, dirs_exist_ok=True)
    stock: PreTrainedModel = model.eval()
    return stock


@pytest.fixture(scope="module", params=sorted(LANGUAGE_MODELS))
def pair(request: pytest.FixtureRequest, make_model: Callable[..., Model], build: Any, tmp_path_factory: Any) -> Pair:
    """Each supported class: a folder of stock transformers, fetched, assembled, saved and loaded."""
    root = tmp_path_factory.mktemp(request.param)
    stock = write(root / "language_model", request.param, **FIELDS.get(request.param, {}))
    whole, processor = build(make_model(language_model=hub(root / "language_model")))
    (root / "whole").mkdir()
    model_folder.save(whole, root / "whole", processor=processor)
    return Pair(stock, model_folder.load(root / "whole"), root / "whole")


def hub(folder: Path) -> dict[str, Any]:
    return {"kind": "hub", "name": str(folder), "revision": "x"}


def close(actual: Tensor, expected: Tensor) -> bool:
    """Equal to 1e-5, in units of the deviation of the expected values, which is not small."""
    expected = expected.detach()
    assert expected.std() > 0.05
    return bool(torch.allclose(actual, expected, atol=1e-5 * max(1.0, float(expected.std())), rtol=1e-5))


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["sdpa", "varlen"])
def test_losses_and_gradients_of_packed_samples_are_those_of_each_sample_alone(pair: Pair, kernel: Any) -> None:
    lengths = [len(sample) for sample in SAMPLES]
    ids = torch.cat(SAMPLES)[None]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    segments = torch.cat([torch.full((n,), number) for number, n in enumerate(lengths, start=1)])[None]
    labels = torch.cat([torch.cat([sample[1:], torch.tensor([-100])]) for sample in SAMPLES])[None]
    ours = pair.ours
    use(ours, kernel)
    masks = document_mask(ours, segments, plan(ours, segments))
    hidden = ours.hidden(ours.embed(ids, None), position_ids=positions, use_cache=False, **masks).last_hidden_state
    use(ours, "sdpa")
    targets = (labels[0] >= 0).nonzero()[:, 0]
    total, each = losses(ours, hidden, targets, labels[0, targets])
    alone = torch.cat([cross_entropy(pair.stock(s[None]).logits[0, :-1], s[1:], reduction="none") for s in SAMPLES])
    assert close(each, alone)
    assert float(total.detach()) == pytest.approx(float(alone.detach().sum()), rel=1e-6)
    decoder, stock = ours.model.language_model.layers, pair.stock.get_decoder().layers
    gradients = torch.autograd.grad(total, [*decoder.parameters()])
    expected = torch.autograd.grad(alone.sum(), [*stock.parameters()])
    for actual, wanted in zip(gradients, expected, strict=True):
        assert (actual - wanted).norm() <= 1e-4 * wanted.norm() + 1e-6


def test_logits_of_every_decoding_step_are_those_of_one_full_pass(pair: Pair) -> None:
    """Prompts of three lengths decode as one batch; each answer is longer than a window."""
    scheduler = Scheduler(pair.loaded(), cache_tokens=1024, prefill_tokens=1024)
    steps: list[Tensor] = []
    hook = pair.ours.lm_head.register_forward_hook(lambda head, given, out: steps.append(out.clone()))
    arrivals = [GenerationRequest(Prompt(prompt), Sampling(NEW, frozenset())) for prompt in PROMPTS]
    answers: dict[GenerationRequest, list[int]] = {request: [] for request in arrivals}
    for request, delta in scheduler.step(arrivals):
        answers[request] += delta.ids
    while scheduler.is_busy:
        for request, delta in scheduler.step():
            answers[request] += delta.ids
    hook.remove()
    for row, (prompt, answer) in enumerate(zip(PROMPTS, answers.values(), strict=True)):
        assert len(answer) == NEW
        expected = pair.logits([*prompt, *answer[:-1]])[len(prompt) - 1 :]
        allowed = [index for index in range(500) if index != IMAGE]
        assert close(torch.stack([step[row] for step in steps])[:, allowed], expected[:, allowed])


def test_log_probabilities_of_prompts_read_in_pieces_are_those_of_one_full_pass(pair: Pair) -> None:
    """Pieces of 5 tokens at most, shorter than a window, while other rows are decoded."""
    scheduler = Scheduler(pair.loaded(), slots=2, cache_tokens=256, prefill_tokens=5)
    arrivals = [GenerationRequest(Prompt(prompt), Sampling(NEW, frozenset(), logprobs=2)) for prompt in PROMPTS]
    reported: dict[GenerationRequest, list[TokenLogprob]] = {request: [] for request in arrivals}
    events = scheduler.step(arrivals)
    while scheduler.is_busy:
        events += scheduler.step()
    for request, delta in events:
        assert isinstance(delta, Delta)
        reported[request] += delta.logprobs
    for prompt, tokens in zip(PROMPTS, reported.values(), strict=True):
        answer = [token.id for token in tokens]
        assert len(answer) == NEW
        expected = pair.logits([*prompt, *answer[:-1]])[len(prompt) - 1 :].log_softmax(-1)
        for token, nats in zip(tokens, expected, strict=True):
            assert token.logprob == pytest.approx(float(nats[token.id]), abs=1e-4)
            nats[IMAGE] = -torch.inf
            likeliest = nats[: len(scheduler.loaded.tokenizer.fast)].topk(2)
            assert [one for one, _ in token.top] == likeliest.indices.tolist()
            assert [value for _, value in token.top] == pytest.approx(likeliest.values.tolist(), abs=1e-4)


def test_scores_of_continuations_are_those_of_each_alone(pair: Pair) -> None:
    continuations = [SAMPLES[1].tolist(), SAMPLES[2].tolist()]
    actual = Scorer(pair.loaded()).score([(Prompt(prompt), continuations) for prompt in PROMPTS])
    for prompt, scores in zip(PROMPTS, actual, strict=True):
        for continuation, score in zip(continuations, scores, strict=True):
            logits = pair.logits([*prompt, *continuation])[len(prompt) - 1 : -1]
            expected = cross_entropy(logits, torch.tensor(continuation), reduction="sum")
            assert score.nll == pytest.approx(float(expected), rel=1e-5)


def test_hidden_states_of_a_text_do_not_depend_on_what_follows(pair: Pair) -> None:
    scorer = Scorer(pair.loaded())
    before, after = (scorer.hidden_states(Prompt(PROMPTS[0]), [tail] * 5)[:, :22] for tail in (40, 41))
    assert abs(before - after).max() == 0


def test_a_vocabulary_larger_than_its_tokenizer_stays_whole(pair: Pair) -> None:
    assert pair.ours.get_input_embeddings().weight.shape[0] == pair.ours.config.text_config.vocab_size == ROWS
    assert torch.equal(pair.ours.get_input_embeddings().weight, pair.stock.get_input_embeddings().weight)
    assert torch.equal(pair.ours.lm_head.weight, pair.stock.get_output_embeddings().weight)


def test_export_says_whether_stock_llava_gives_the_same_logits(pair: Pair) -> None:
    finding = export.check(pair.folder, "transformers")
    form = head_form(pair.ours.config.text_config)
    assert finding.loads == (form == PLAIN_HEAD)
    if not finding.loads:
        assert str(form) in finding.reasons[0]
        return
    stock = LlavaForConditionalGeneration.from_pretrained(pair.folder, dtype=torch.float32).eval()
    ids = torch.tensor([[1, *[IMAGE] * pair.ours.config.image_seq_length, *SAMPLES[0].tolist()]])
    given = {"input_ids": ids, "pixel_values": torch.rand(1, 3, 56, 56, generator=torch.Generator().manual_seed(0))}
    with torch.no_grad():
        assert close(pair.ours(**given).logits, stock(**given).logits)


def test_images_are_fitted_to_the_scale_of_the_embeddings(pair: Pair) -> None:
    embedded = pair.ours.embed(torch.arange(ROWS)[None][:, IMAGE + 1 :], None)
    assert embedding_std(pair.ours) == pytest.approx(float(embedded.detach().std()), rel=0.02)


def test_the_planner_knows_its_layers(pair: Pair) -> None:
    decoder = pair.ours.model.language_model
    matrices = sum(p.numel() for p in decoder.layers.parameters() if p.ndim >= 2)
    shapes = shapes_of(pair.ours.config)
    assert 2 * sum(a * b for a, b in shapes.decoder.matrices) == matrices


@pytest.mark.parametrize("kind", ["gpt2", "opt", "bloom", "mpt", "lfm2", "mixtral", "qwen3_next", "falcon_h1"])
def test_another_class_is_refused_by_its_name(
    kind: str, make_model: Callable[..., Model], make_resources: Callable[..., Resources], tmp_path: Path
) -> None:
    """By `fetch` and by `import`; hybrid models and mixtures of experts among them."""
    small = {"gpt2": {"n_layer": 2, "n_embd": 32, "n_head": 4}, "bloom": {"n_layer": 2}, "opt": {"ffn_dim": 48}}
    more = {
        "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2},
        "lfm2": {"full_attn_idxs": [0]},
        "falcon_h1": {"time_step_limit": (0.0, 1.0)},
    }
    config = CONFIG_MAPPING[kind](**{**small, **more}.get(kind, {}), vocab_size=64)
    llm = tmp_path / "a" / "llm"
    write_nvlabs(tmp_path / "a", NVILA, projector="linear")
    (llm / "config.json").write_text(json.dumps({**config.to_diff_dict(), "model_type": kind}))
    name = AutoModelForCausalLM._model_mapping[type(config)].__name__
    refused = re.escape(f"holds a language model of type {kind!r} ({name}), which vila-ops does not support")
    with pytest.raises(ValueError, match=refused):
        import_checkpoint(tmp_path / "a", tmp_path / "ours", chat_template="chatml")
    with pytest.raises(ValueError, match=refused):
        assemble(make_model(language_model=hub(llm)), make_resources(tmp_path))
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize(
    ("kind", "fields", "why"),
    [
        ("gemma3_text", {"use_bidirectional_attention": True}, "a gemma3_text whose tokens attend to later ones"),
        ("mistral", {"sliding_window": 0}, "a sliding_window of 0, in which no token sees itself"),
        ("qwen3", {"layer_types": ["chunked_attention"], "num_hidden_layers": 1}, "layers of type ..chunked_attention"),
    ],
)
def test_settings_of_a_supported_class_that_are_not_computed_are_refused(
    kind: str, fields: dict[str, Any], why: str
) -> None:
    with pytest.raises(ValueError, match=why):
        check_language_model(CONFIG_MAPPING[kind](**fields), "it")


def test_language_models_of_shipped_recipes_are_supported() -> None:
    files = sorted((Path(__file__).parents[2] / "configs/models/language_models").glob("*.yaml"))
    kinds = {yaml.safe_load(file.read_text())["language_model"]["shape"]["model_type"] for file in files}
    assert len(files) > 5
    assert kinds <= set(LANGUAGE_MODELS)


def test_the_page_lists_the_supported_types() -> None:
    page = (Path(__file__).parents[2] / "docs/import.md").read_text()
    listed = page.partition("<!-- language models -->")[2].partition("<!-- end -->")[0]
    assert re.findall(r"`(\w+)`", listed) == sorted(LANGUAGE_MODELS)
