"""Folders between programs: ours in stock transformers, token for token, and those of other writers in ours."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import save_torch_state_dict
from PIL import Image as Pillow
from safetensors.torch import load_file
from transformers import AutoProcessor, LlavaForConditionalGeneration

from vila_ops.config.images import Webp
from vila_ops.data.images import Fit, square
from vila_ops.data.text.conversation import Tokenizer
from vila_ops.generate.engine import EngineOptions, generate_all, score_all
from vila_ops.generate.request import Prompt, Sampling
from vila_ops.generate.torch_engine.engine import InProcessEngine
from vila_ops.generate.torch_engine.loaded_model import read_model
from vila_ops.model import folder as model_folder
from vila_ops.packages.tokenizer import build_tokenizer, stop_ids

NEW_TOKENS = 20
TEXTS = ["<image>\nA dog.", "A dog <image> and <image>, <image>", "No image here.", "<image> What is it?"]
IMAGES = [["dog"], ["cat", "dog", "cat"], [], ["cat"]]
RESIZE = Fit("resize", (0.5, 0.5, 0.5))

STOCK = """
import json, sys, torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
torch.set_num_threads(1)
texts, named, count, folders = json.loads(sys.argv[1])
results = {}
for folder in folders:
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    images = [[Image.open(path) for path in paths] for paths in named]
    inputs = processor(text=texts, images=[one for row in images for one in row], padding=True, return_tensors="pt")
    answers = model.generate(**inputs, max_new_tokens=count, do_sample=False)[:, inputs["input_ids"].shape[1]:]
    requests = [row[mask.bool()].tolist() for row, mask in zip(inputs["input_ids"], inputs["attention_mask"])]
    results[folder] = [requests, answers.tolist(), model.generation_config.eos_token_id]
assert "vila_ops" not in sys.modules
print("RESULTS" + json.dumps(results))
"""

OLD_NAMES = {
    "5": [],
    "4.57": [("model.vision_tower.", "model.vision_tower.vision_model.")],
    "4.51": [
        ("lm_head.", "language_model.lm_head."),
        ("model.language_model.", "language_model.model."),
        ("model.vision_tower.", "vision_tower.vision_model."),
        ("model.multi_modal_projector.", "multi_modal_projector."),
    ],
}
"""How each version of transformers names what version 5 names in the first column; from its conversion_mapping (llava,
LlavaModel, CLIPVisionModel), and as the keys of llava-hf/llava-1.5-7b-hf's index are."""
GOLDEN = {
    "5": {"model.vision_tower.embeddings.class_embedding", "model.language_model.norm.weight", "lm_head.weight"},
    "4.57": {"model.vision_tower.vision_model.embeddings.class_embedding", "model.language_model.norm.weight"},
    "4.51": {
        "vision_tower.vision_model.embeddings.class_embedding", "vision_tower.vision_model.pre_layrnorm.weight",
        "vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.weight", "multi_modal_projector.linear_1.weight",
        "language_model.model.embed_tokens.weight", "language_model.model.layers.0.self_attn.q_proj.weight",
        "language_model.model.norm.weight", "language_model.lm_head.weight",
    },
}  # fmt: skip
HF_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}{% endif %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' ' }}"
    "{% endfor %}{% if message['role'] == 'assistant' %}{{ '<|im_end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
"""A template such as llava-hf's: a message is a list, and all its images come first."""


def open_engine(folder: Path, features: Path) -> InProcessEngine:
    """Our torch engine on a folder."""
    return InProcessEngine(read_model(folder, EngineOptions(features)), max_batch=None)


def words_that_vary(whole: Any) -> Any:
    """A random model repeats one token; with large weights its answers depend on the prompt."""
    with torch.no_grad():
        for parameter in whole.model.language_model.layers.parameters():
            if parameter.dim() == 2:
                parameter.mul_(8)
        for parameter in whole.model.multi_modal_projector.parameters():
            parameter.mul_(8)
    return whole


@pytest.mark.slow
def test_stock_generates_token_for_token_what_our_engine_generates(
    make_model: Any, build: Callable[..., Any], tiny: Path, tmp_path: Path
) -> None:
    squares = {
        n: square((tiny / f"pairs/{n}.png").read_bytes(), size=56, encoding=Webp(), fit=RESIZE) for n in ("dog", "cat")
    }
    for name, data in squares.items():
        (tmp_path / f"{name}.png").write_bytes(data)
    folders = []
    for tower, projector in (("clip", "mlp_gelu"), ("siglip", "mlp_gelu"), ("dinov2", "linear")):
        whole, processor = build(make_model(tower, projector))
        folders.append(tmp_path / tower)
        folders[-1].mkdir()
        model_folder.save(words_that_vary(whole), folders[-1], processor=processor)
    paths = [[str(tmp_path / f"{name}.png") for name in names] for names in IMAGES]
    requests = json.dumps([TEXTS, paths, NEW_TOKENS, list(map(str, folders))])
    ran = subprocess.run(
        [sys.executable, "-c", STOCK, requests], check=True, cwd=tmp_path, capture_output=True, text=True
    )
    results = json.loads(ran.stdout.rpartition("RESULTS")[2])
    answer_ids = set()
    for folder in folders:
        prompts, theirs, stops = results[str(folder)]
        engine = open_engine(folder, tmp_path / "features")
        assert set(stops) == engine.tokenizer.stop_ids
        images = [tuple(squares[name] for name in names) for names in IMAGES]
        asking = [Prompt(ids, shown) for ids, shown in zip(prompts, images, strict=True)]
        outputs = generate_all(engine, asking, Sampling(NEW_TOKENS, engine.tokenizer.stop_ids))
        for output, ids in zip(outputs, theirs, strict=True):
            end = next((place for place, token in enumerate(ids) if token in stops), len(ids))
            assert output.ids == ids[:end]
            assert output.finish_reason == ("stop" if end < len(ids) else "length")
            answer_ids |= set(output.ids)
    assert len(answer_ids) > 12  # otherwise equality would show little


@pytest.mark.parametrize("projector", ["linear", "mlp_gelu", "mlp_downsample"])
@pytest.mark.parametrize("tower", ["clip", "siglip", "dinov2"])
def test_save_load_save_gives_the_same_files_to_the_byte(
    tower: str, projector: str, make_model: Any, build: Callable[..., Any], tmp_path: Path
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    whole, processor = build(make_model(tower, projector))
    for folder in (first, second):
        folder.mkdir()
    model_folder.save(whole, first, processor=processor)
    model_folder.save(model_folder.load(first), second, processor=AutoProcessor.from_pretrained(first))
    assert {path.name: path.read_bytes() for path in first.iterdir()} == {
        path.name: path.read_bytes() for path in second.iterdir()
    }


def other_writers_folder(folder: Path, version: str, *, tied: bool, build: Any, make_model: Any) -> dict[str, Any]:
    """A LLaVA-HF folder as transformers `version` wrote it, in shards with an index; returns its tensors by name 5."""
    whole, processor = build(make_model("clip", "mlp_gelu"))
    processor.tokenizer.chat_template = None
    processor.tokenizer.save_pretrained(folder)
    state = {name: tensor.detach().clone() for name, tensor in whole.state_dict().items()}
    if tied:
        del state["lm_head.weight"]
    else:
        state["lm_head.weight"] = torch.randn(state["lm_head.weight"].shape, generator=torch.Generator().manual_seed(1))
    named = {}
    for name, tensor in state.items():
        start, old = next((pair for pair in OLD_NAMES[version] if name.startswith(pair[0])), ("", ""))
        named[old + name.removeprefix(start)] = tensor
    assert named.keys() >= GOLDEN[version] - ({"lm_head.weight", "language_model.lm_head.weight"} if tied else set())
    save_torch_state_dict(named, folder, max_shard_size=200_000)
    assert (folder / "model.safetensors.index.json").is_file()
    vision = {"model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    text = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    config = {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "image_token_index": 3,
        "torch_dtype": "float32",
        "transformers_version": f"{version}.0",
        "vision_config": {**vision, "num_attention_heads": 2, "image_size": 56, "patch_size": 14, "vocab_size": 32000},
        "text_config": {
            **text, "num_attention_heads": 4, "vocab_size": len(state["model.language_model.embed_tokens.weight"]),
            "tie_word_embeddings": tied, "bos_token_id": 1, "eos_token_id": 2,
        },
    }  # fmt: skip
    pixels = {
        "image_processor_type": "CLIPImageProcessor", "do_center_crop": True, "crop_size": {"height": 56, "width": 56},
        "size": {"shortest_edge": 56}, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4], "resample": 3,
        "do_normalize": True, "do_rescale": True, "do_resize": True, "processor_class": "LlavaProcessor",
    }  # fmt: skip
    kept = {"patch_size": 14, "vision_feature_select_strategy": "default", "processor_class": "LlavaProcessor"}
    files = {"config": config, "preprocessor_config": pixels, "processor_config": kept}
    for name, settings in (files | {"chat_template": {"chat_template": HF_TEMPLATE}}).items():
        (folder / f"{name}.json").write_text(json.dumps(settings))
    return state


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("version", OLD_NAMES)
def test_folders_of_other_writers_are_read_as_stock_reads_them(
    version: str, tied: bool, make_model: Any, build: Callable[..., Any], tiny: Path, tmp_path: Path
) -> None:
    state = other_writers_folder(tmp_path, version, tied=tied, build=build, make_model=make_model)
    engine = open_engine(tmp_path, tmp_path / "features")
    ours = model_folder.load(tmp_path).state_dict()
    assert all(torch.equal(ours[name], tensor) for name, tensor in state.items())
    assert engine.image_size == 56
    assert engine.tokenizer.image_tokens == 16
    assert model_folder.normalisation(tmp_path) == ((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    stock = LlavaForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float32).eval()
    ids = torch.tensor([[1, 40, *[3] * 16, 41, 2]])
    values = torch.rand(1, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = stock(input_ids=ids, pixel_values=values).logits
        assert torch.allclose(
            engine.loaded.model(input_ids=ids, pixel_values=values).logits, expected, atol=1e-5, rtol=0
        )


def test_a_template_that_wants_parts_reads_our_text(make_model: Any, build: Callable[..., Any], tmp_path: Path) -> None:
    other_writers_folder(tmp_path, "4.51", tied=False, build=build, make_model=make_model)
    engine = open_engine(tmp_path, tmp_path / "features")
    text = engine.tokenizer.fast.decode(engine.tokenizer.prompt([("user", ("A dog?",))]))
    assert text == "USER: A dog? ASSISTANT:"


def test_written_keys_are_those_that_most_programs_read(
    make_model: Any, build: Callable[..., Any], tmp_path: Path
) -> None:
    whole, processor = build(make_model("clip", "mlp_gelu"))
    model_folder.save(whole, tmp_path, processor=processor)
    written = load_file(tmp_path / "model.safetensors").keys()
    assert written >= GOLDEN["4.57"]
    stock = LlavaForConditionalGeneration.from_pretrained(tmp_path)
    stock.save_pretrained(tmp_path / "again")
    assert load_file(tmp_path / "again/model.safetensors").keys() == written


@pytest.mark.parametrize("template", ["chatml", "plain"])
def test_stock_stops_where_training_ends_a_turn(template: str, make_model: Any, tmp_path: Path) -> None:
    fast = build_tokenizer(make_model().language_model, chat_template=template, cache=tmp_path)
    assert set(stop_ids(fast)) == Tokenizer(fast, image_tokens=1, after_image="").stop_ids


@pytest.mark.parametrize("projector", ["mlp_gelu", "mlp_downsample"])
def test_more_images_than_placeholders_are_refused_everywhere(
    projector: str, make_model: Any, build: Callable[..., Any], tiny: Path, tmp_path: Path
) -> None:
    whole, processor = build(make_model("clip", projector))
    model_folder.save(whole, tmp_path, processor=processor)
    image = Pillow.open(tiny / "pairs/dog.png").convert("RGB")
    for text in ("A dog <image>", "No image", "<image> and <image> and <image>"):
        with pytest.raises((ValueError, IndexError, StopIteration)):
            AutoProcessor.from_pretrained(tmp_path)(text=[text], images=[image] * 2, return_tensors="pt")
    engine = open_engine(tmp_path, tmp_path / "features")
    data = square((tiny / "pairs/dog.png").read_bytes(), size=56, encoding=Webp(), fit=RESIZE)
    one = [engine.tokenizer.image_id] * engine.tokenizer.image_tokens
    swapped = [Prompt([1, *one, 40], (data, data)), Prompt([1, *one, *one, 40], (data,))]  # right in sum, wrong in each
    with pytest.raises(ValueError, match=r"prompt of request '0' has \d+ image positions for 2 images"):
        generate_all(engine, swapped, Sampling(2, frozenset()))
    with pytest.raises(ValueError, match=r"prompt 0 has \d+ image positions for 2 images"):
        score_all(engine, [(prompt, [[5]]) for prompt in swapped])
