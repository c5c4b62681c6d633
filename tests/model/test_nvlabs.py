import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from torch import Tensor
from transformers import AutoModelForCausalLM, CLIPVisionModel
from typer.testing import CliRunner

from tests.model.nvlabs_layout import DIM, IMAGE, NVILA, PROJECTORS, SIDE, TINY, V15, logits, project, write
from vila_ops.artifacts.store import content
from vila_ops.cli import app
from vila_ops.cli.options import as_yaml
from vila_ops.config import Model, load
from vila_ops.errors import CorruptArtifact
from vila_ops.model import folder as model_folder
from vila_ops.model.assemble import assemble
from vila_ops.model.importing.checkpoint import import_checkpoint
from vila_ops.packages.tokenizer import build_tokenizer
from vila_ops.pipeline import stages as pipeline

IDS = [1, 40, IMAGE, 41, 99, IMAGE, 42, 2]
"""One row with two images."""
ADDED = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "[BOS]", "[PAD]", "<vila/sentinel>", "<image>", "<vila/video>")
"""NVILA's added tokens, in the order of constants.py."""
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""Qwen2's chat template, in short."""


def ours(folder: Path, pixels: Tensor, ids: list[int]) -> Tensor:
    """Logits (T, V) of the model in a folder."""
    model = model_folder.load(folder)
    row = [token for each in ids for token in [each] * (model.config.image_seq_length if each == IMAGE else 1)]
    with torch.no_grad():
        out: Tensor = model(input_ids=torch.tensor([row]), pixel_values=pixels).logits[0]
    return out


def edit(path: Path, **more: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **more}))


@pytest.fixture
def pixels() -> Tensor:
    return torch.rand(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.parametrize(
    ("projector", "tower", "llm"),
    [*[(kind, "siglip", "qwen2") for kind in PROJECTORS], ("linear", "clip", "llama"),
     ("mlp_downsample_3x3_fix", "clip", "qwen2"), ("mlp_downsample_2x2_fix", "internvit", "llama")],
)  # fmt: skip
def test_logits_are_those_of_nvlabs_order_of_work(
    projector: str, tower: str, llm: str, pixels: Tensor, tmp_path: Path
) -> None:
    write(tmp_path / "theirs", NVILA, projector=projector, tower=tower, llm=llm)
    import_checkpoint(tmp_path / "theirs", tmp_path / "ours", chat_template="chatml")
    with torch.no_grad():
        expected = logits(tmp_path / "theirs", pixels, IDS)
    assert expected.std() > 0.1
    assert torch.allclose(ours(tmp_path / "ours", pixels, IDS), expected, atol=1e-5, rtol=0)


def test_the_last_state_of_internvit_has_no_norm_behind_it(pixels: Tensor, tmp_path: Path) -> None:
    write(tmp_path / "a", {**V15, "mm_vision_select_layer": -1}, projector="mlp_downsample", tower="internvit")
    import_checkpoint(tmp_path / "a", tmp_path / "ours")
    with torch.no_grad():
        expected = logits(tmp_path / "a", pixels, IDS, transposed=True, layer=-1)
    assert torch.allclose(ours(tmp_path / "ours", pixels, IDS), expected, atol=1e-5, rtol=0)


def test_tokens_of_a_v15_checkpoint_follow_by_columns(pixels: Tensor, tmp_path: Path) -> None:
    write(tmp_path / "a", V15, projector="mlp_downsample")
    made = import_checkpoint(tmp_path / "a", tmp_path / "ours")
    assert any("columns" in note and "v1.5" in note for note in made.notes)
    with torch.no_grad():
        columns, rows = (logits(tmp_path / "a", pixels, IDS, transposed=each) for each in (True, False))
    assert torch.allclose(ours(tmp_path / "ours", pixels, IDS), columns, atol=1e-5, rtol=0)
    assert not torch.allclose(columns, rows, atol=1e-2)
    import_checkpoint(tmp_path / "a", tmp_path / "requested", token_order="rows")
    assert torch.allclose(ours(tmp_path / "requested", pixels, IDS), rows, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "config",
    [
        {**NVILA, "transformers_version": "4.36.2"},  # NVILA's fields on an old version
        {**V15, "transformers_version": "4.47.1"},  # and the reverse
        {key: value for key, value in V15.items() if key != "transformers_version"},
        {**NVILA, "model_type": "vila"},  # a re-upload, of weights of any age
    ],
)
def test_a_token_order_that_the_config_does_not_show_is_requested(config: dict[str, Any], tmp_path: Path) -> None:
    write(tmp_path / "a", config, projector="mlp_downsample")
    with pytest.raises(ValueError, match="say --token-order rows or --token-order columns"):
        import_checkpoint(tmp_path / "a", tmp_path / "ours", chat_template="chatml")
    made = import_checkpoint(tmp_path / "a", tmp_path / "ours", chat_template="chatml", token_order="columns")
    assert made.model.projector.model_dump()["token_order"] == "columns"


def test_a_projector_of_one_order_takes_no_other(tmp_path: Path) -> None:
    write(tmp_path / "a", NVILA, projector="mlp_downsample_2x2_fix")
    with pytest.raises(ValueError, match="_2x2_fix has always given rows"):
        import_checkpoint(tmp_path / "a", tmp_path / "ours", chat_template="chatml", token_order="columns")


def test_dynamic_s2_is_exact_for_images_of_one_tile(pixels: Tensor, tmp_path: Path) -> None:
    s2 = {**NVILA, "dynamic_s2": True, "s2_scales": f"{SIDE},{2 * SIDE},{3 * SIDE}", "image_aspect_ratio": "dynamic_s2"}
    write(tmp_path / "a", s2, projector="mlp_downsample")
    made = import_checkpoint(tmp_path / "a", tmp_path / "ours", chat_template="chatml")
    assert any("one tile" in note for note in made.notes)
    with torch.no_grad():
        expected = logits(tmp_path / "a", pixels, IDS)
    assert torch.allclose(ours(tmp_path / "ours", pixels, IDS), expected, atol=1e-5, rtol=0)
    write(tmp_path / "b", s2, projector="mlp_downsample_3x3_fix")
    with pytest.raises(ValueError, match="Dynamic-S2 before a 3x3 projector"):
        import_checkpoint(tmp_path / "b", tmp_path / "again", chat_template="chatml")


@pytest.mark.parametrize(("projector", "llm"), [("linear", "llama"), ("mlp2x_gelu", "mistral")])
def test_v1_is_one_state_with_a_clip_tower_in_it(projector: str, llm: str, pixels: Tensor, tmp_path: Path) -> None:
    """The model type says which language model it is: a Mistral keeps its sliding window."""
    parts, flat = tmp_path / "parts", tmp_path / "flat"
    write(parts, V15, projector=projector, tower="clip128", llm=llm)
    flat.mkdir()
    words = json.loads((parts / "llm/config.json").read_text())
    fields = {"mm_vision_tower": "openai/clip-vit-large-patch14-336", "mm_projector_type": projector}
    fields |= {"model_type": f"llava_{llm}", "transformers_version": "4.31.0", "image_aspect_ratio": "pad"}
    stated = {**words, **V15, **fields}
    (flat / "config.json").write_text(json.dumps(stated))
    shutil.copytree(TINY / "tokenizer", flat, dirs_exist_ok=True)
    held = load_file(parts / "mm_projector/model.safetensors")
    state = {name.replace("layers.", "model.mm_projector."): tensor for name, tensor in held.items()}
    state |= load_file(parts / "llm/model.safetensors")
    tower = load_file(parts / "vision_tower/model.safetensors")
    state |= {f"model.vision_tower.vision_tower.vision_model.{name}": tensor for name, tensor in tower.items()}
    save_file(state, flat / "model.safetensors")
    made = import_checkpoint(flat, tmp_path / "ours", chat_template="chatml")
    assert made.model.image_aspect_ratio == "pad"
    with torch.no_grad():
        features = CLIPVisionModel.from_pretrained(parts / "vision_tower").eval()(pixels, output_hidden_states=True)
        images = iter(project(projector, held, features.hidden_states[-2][:, 1:], transposed=False))
        language_model = AutoModelForCausalLM.from_pretrained(parts / "llm").eval()
        table = language_model.get_input_embeddings().weight
        row = torch.cat([next(images) if token == IMAGE else table[token][None] for token in IDS])
        expected = language_model(inputs_embeds=row[None]).logits[0]
    assert torch.allclose(ours(tmp_path / "ours", pixels, IDS), expected, atol=1e-5, rtol=0)


def test_an_image_without_a_token_gets_one_and_the_embedding_rows_for_it(tmp_path: Path) -> None:
    write(tmp_path / "a", V15, projector="mlp2x_gelu")
    path = tmp_path / "a/llm/tokenizer.json"
    path.write_text(path.read_text().replace("<image>", "<other>"))
    edit(tmp_path / "a/llm/tokenizer_config.json", image_token="<other>")
    config = tmp_path / "a/llm/config.json"
    state = load_file(tmp_path / "a/llm/model.safetensors")
    edit(config, vocab_size=512)
    save_file({name: t[:512] if len(t) == 640 else t for name, t in state.items()}, config.parent / "model.safetensors")
    import_checkpoint(tmp_path / "a", tmp_path / "ours")
    after = load_file(tmp_path / "ours/model.safetensors")
    assert json.loads((tmp_path / "ours/config.json").read_text())["image_token_index"] == 512
    for name, their in (
        ("lm_head.weight", "lm_head.weight"),
        ("model.language_model.embed_tokens.weight", "model.embed_tokens.weight"),
    ):
        assert after[name].shape == (576, DIM)
        assert torch.equal(after[name][:512], state[their][:512])
        assert not after[name][512:].any()


def test_precision_is_kept(tmp_path: Path) -> None:
    write(tmp_path / "a", V15, projector="mlp2x_gelu")
    for path in (tmp_path / "a").rglob("*.safetensors"):
        save_file({name: tensor.bfloat16() for name, tensor in load_file(path).items()}, path)
    import_checkpoint(tmp_path / "a", tmp_path / "ours")
    assert {tensor.dtype for tensor in load_file(tmp_path / "ours/model.safetensors").values()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("tower", "requested", "fit"),
    [("siglip", "pad", "pad"), ("siglip", "resize", "resize"), ("siglip", "dynamic", "resize"),
     ("siglip", None, "resize"), ("clip", None, "crop"), ("internvit", "square", "resize")],
)  # fmt: skip
def test_how_an_image_becomes_a_square(tower: str, requested: str | None, fit: str, tmp_path: Path) -> None:
    write(tmp_path / "a", {**V15, "image_aspect_ratio": requested}, projector="linear", tower=tower)
    made = import_checkpoint(tmp_path / "a", tmp_path / "ours")
    assert made.model.image_aspect_ratio == fit
    mean = model_folder.normalisation(tmp_path / "ours")[0]
    assert mean == pytest.approx((0.485, 0.456, 0.406) if tower == "internvit" else (0.4, 0.4, 0.4))


@pytest.mark.parametrize(
    ("encoder", "after"),
    [(NVILA["image_encoder"], "\n"), ({"_target_": "a.BasicImageEncoder", "end_tokens": " "}, " "),
     ('{"_target_": "a.BasicImageEncoder", "end_tokens": null}', "")],
)  # fmt: skip
def test_what_nvila_puts_behind_an_image(encoder: Any, after: str, tmp_path: Path) -> None:
    write(tmp_path / "a", {**NVILA, "image_encoder": encoder}, projector="linear")
    assert import_checkpoint(tmp_path / "a", tmp_path / "ours", chat_template="chatml").model.after_image == after


def test_nvila_keeps_its_tokenizers_template_and_v15_has_its_conversation(tmp_path: Path) -> None:
    write(tmp_path / "new", NVILA, projector="linear")
    (tmp_path / "new/llm/chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    assert import_checkpoint(tmp_path / "new", tmp_path / "a").model.chat_template == "tokenizer"
    write(tmp_path / "old", V15, projector="linear")
    made = import_checkpoint(tmp_path / "old", tmp_path / "b")
    assert made.model.chat_template == "hermes_2"
    assert "Answer the questions." in (tmp_path / "b/chat_template.jinja").read_text()


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({"s2": True, "s2_scales": "70,140"}, "S2 features join the scales"),
        ({"ps3": True}, "PS3"),
        ({"vision_tower_cfg": {"model_type": "radio"}}, "RADIO"),
        ({"vision_tower_cfg": {"architectures": ["RADIOModel"]}}, "RADIO"),
        ({"vision_tower_cfg": {"model_type": "ps3_vision_model"}}, "PS3"),
        ({"mm_use_im_start_end": True}, "mm_use_im_start_end"),
        ({"mm_vision_select_feature": "patch"}, "supported is 'cls_patch'"),
        ({"dynamic_s2": True, "s2_scales": "384,768"}, "tiles of Dynamic-S2 have 384 pixels"),
        (
            {"image_encoder": {"_target_": "x.BasicImageEncoder", "start_tokens": "<s>"}},
            "adds more than text after an image",
        ),
        ({"image_encoder": {"_target_": "x.TSPImageEncoder"}}, "adds more than text after an image"),
    ],
)
def test_what_we_cannot_hold_exactly_is_refused(config: dict[str, Any], why: str, tmp_path: Path) -> None:
    write(tmp_path / "a", {**NVILA, **config}, projector="mlp_downsample")
    edit(tmp_path / "a/config.json", **config)
    with pytest.raises(ValueError, match=why):
        import_checkpoint(tmp_path / "a", tmp_path / "ours", chat_template="chatml")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_another_head_beside_a_tied_one_is_refused(tmp_path: Path, make_model: Any, make_resources: Any) -> None:
    """transformers loads both then; equal ones are fine, as older writers saved the head too."""
    write(tmp_path / "a", NVILA, projector="linear", llm="qwen2")
    path = tmp_path / "a/llm/model.safetensors"
    state = load_file(path)
    save_file({**state, "lm_head.weight": state["model.embed_tokens.weight"].clone()}, path, metadata={"format": "pt"})
    import_checkpoint(tmp_path / "a", tmp_path / "ours", chat_template="chatml")
    save_file({**state, "lm_head.weight": state["model.embed_tokens.weight"] + 1}, path, metadata={"format": "pt"})
    with pytest.raises(CorruptArtifact, match="ties the head to the embedding but holds a different head"):
        import_checkpoint(tmp_path / "a", tmp_path / "other", chat_template="chatml")
    words = {"kind": "hub", "name": str(path.parent), "revision": "x"}
    with pytest.raises(CorruptArtifact, match="ties the head to the embedding but holds a different head"):
        assemble(make_model(language_model=words), make_resources(tmp_path))


@pytest.mark.parametrize("name", ["./runs/radiology/vision_tower", "/data/ps3/clip", "s2/tower"])
def test_a_name_or_path_decides_nothing(name: str, tmp_path: Path) -> None:
    write(tmp_path / "a", NVILA, projector="linear")
    edit(tmp_path / "a/config.json", vision_tower_cfg={"model_type": "siglip_vision_model", "_name_or_path": name})
    edit(tmp_path / "a/vision_tower/config.json", _name_or_path=name, scale_by_hidden_dim=True)
    import_checkpoint(tmp_path / "a", tmp_path / "ours", chat_template="chatml")
    stated = json.loads((tmp_path / "a/llm/config.json").read_text())
    del stated["model_type"]
    (tmp_path / "a/llm/config.json").write_text(json.dumps(stated))
    (tmp_path / "a").rename(tmp_path / "llama")
    with pytest.raises(ValueError, match="has model_type None, for which transformers has no class"):
        import_checkpoint(tmp_path / "llama", tmp_path / "other", chat_template="chatml")


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("mlp_downsample_3x3_s2_new", "several scales"),
        ("identity", "'identity' is not supported"),
        (None, "no mm_projector_type"),
    ],
)
def test_projectors_that_are_not_ours_are_refused(kind: str | None, why: str, tmp_path: Path) -> None:
    write(tmp_path / "a", NVILA, projector="linear")
    edit(tmp_path / "a/mm_projector/config.json", mm_projector_type=kind)
    with pytest.raises(ValueError, match=why):
        import_checkpoint(tmp_path / "a", tmp_path / "ours", chat_template="chatml")


@pytest.mark.parametrize("part", ["llm", "vision_tower", "mm_projector"])
@pytest.mark.parametrize("fault", ["missing", "extra", "shape", "cut", "pickle"])
def test_a_wrong_set_of_weights_is_refused(part: str, fault: str, tmp_path: Path) -> None:
    write(tmp_path / "a", V15, projector="mlp2x_gelu")
    path = tmp_path / "a" / part / "model.safetensors"
    state = load_file(path)
    name = sorted(name for name in state if name.endswith("weight"))[-1]
    match fault:
        case "missing":
            del state[name]
        case "extra":
            state["something.weight"] = torch.zeros(2)
        case "shape":
            state[name] = torch.zeros(3, 3)
    save_file(state, path)
    if fault == "cut":
        path.write_bytes(path.read_bytes()[:-64])
    if fault == "pickle":
        path.rename(path.with_name("pytorch_model.bin"))
    reason = "pickles, which may run code" if fault == "pickle" else f"{part}|projector|something.weight"
    with pytest.raises((ValueError, CorruptArtifact), match=reason):
        import_checkpoint(tmp_path / "a", tmp_path / "ours")
    assert [each.name for each in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("part", ["", "llm", "vision_tower"])
def test_code_that_comes_with_a_checkpoint_is_not_run(part: str, tmp_path: Path) -> None:
    write(tmp_path / "a", V15, projector="mlp2x_gelu")
    marker = tmp_path / "ran"
    (tmp_path / "a" / part / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass Evil: pass\n")
    for pickle in ("training_args.bin", "pytorch_model.bin"):
        (tmp_path / "a" / part / pickle).write_bytes(b"cos\nsystem\n(S'touch ran'\ntR.")
    auto = dict.fromkeys(("AutoConfig", "AutoModel", "AutoModelForCausalLM"), "evil.Evil")
    edit(tmp_path / "a" / part / "config.json", auto_map=auto)
    import_checkpoint(tmp_path / "a", tmp_path / "ours")  # the weights are fine, and the classes are transformers' own
    if part:
        edit(tmp_path / "a" / part / "config.json", model_type="evil")
        with pytest.raises(ValueError, match="code that comes with a checkpoint is not run"):
            import_checkpoint(tmp_path / "a", tmp_path / "again")
    assert not marker.exists()
    assert not Path("ran").exists()
    assert "auto_map" not in (tmp_path / "ours/config.json").read_text()


def test_a_quantised_language_model_and_a_taken_name_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "a", V15, projector="linear")
    (tmp_path / "there").mkdir()
    (tmp_path / "there/photo.jpg").write_text("mine")
    for source in ("a", "nothing"):  # reported before the checkpoint is looked at
        with pytest.raises(ValueError, match=r"there holds photo\.jpg, which vila-ops did not write"):
            import_checkpoint(tmp_path / source, tmp_path / "there")
    assert [(path.name, path.read_text()) for path in (tmp_path / "there").iterdir()] == [("photo.jpg", "mine")]
    edit(tmp_path / "a/llm/config.json", quantization_config={"quant_method": "awq"})
    with pytest.raises(ValueError, match=r"quantised \(awq\)"):
        import_checkpoint(tmp_path / "a", tmp_path / "ours")


@pytest.mark.slow
def test_the_printed_section_in_a_recipe_trains(tmp_path: Path) -> None:
    write(tmp_path / "a", NVILA, projector="mlp_downsample_3x3_fix")
    made = import_checkpoint(tmp_path / "a", tmp_path / "ours", chat_template="chatml")
    printed = yaml.safe_load(as_yaml({"model": made.model.model_dump(mode="json", exclude_none=True)}))
    assert Model.model_validate(printed["model"]) == made.model
    recipe = yaml.safe_load(Path("configs/recipes/tiny.yaml").read_text()) | printed
    recipe["extends"] = [str(Path("configs/services/default.yaml").resolve())]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    run = load(
        tmp_path / "recipe.yaml",
        resources=Path("configs/resources/inline.yaml"),
        overrides=(
            f"resources.storage.store={tmp_path / 'store'}",
            "stages.align.num_steps=2",
            "stages.align.save_every=2",
        ),
    )
    trained = pipeline.model_after(run, "align")
    before, after = model_folder.load(tmp_path / "ours").state_dict(), model_folder.load(content(trained)).state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all("multi_modal_projector" in name for name in changed)


def test_a_tokenizer_of_sentencepiece_becomes_a_fast_one_of_the_same_ids(tmp_path: Path) -> None:
    write(tmp_path / "a", V15, projector="linear")
    llm = tmp_path / "a/llm"
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (llm / name).unlink()
    corpus = (Path(__file__).read_text() + Path("README.md").read_text()).split("\n")
    (tmp_path / "corpus").write_text("\n".join(corpus))
    SentencePieceTrainer.train(
        input=str(tmp_path / "corpus"), model_prefix=str(llm / "tokenizer"), vocab_size=600, model_type="bpe",
        byte_fallback=True, normalization_rule_name="identity", add_dummy_prefix=True, minloglevel=2,
    )  # fmt: skip
    (llm / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"})
    )
    made = import_checkpoint(tmp_path / "a", tmp_path / "ours")
    assert made.model.chat_template == "vicuna_v1"
    theirs = SentencePieceProcessor(model_file=str(llm / "tokenizer.model"))
    fast = build_tokenizer(made.model.language_model, chat_template="vicuna_v1", cache=tmp_path)
    assert fast.convert_tokens_to_ids("<image>") == 600
    for text in ("A dog by the sea.", "def test(x): return 3", "Grüße 🦙"):
        assert fast(text, add_special_tokens=False)["input_ids"] == theirs.encode(text)


def test_a_tokenizer_of_vocabulary_and_merges_keeps_its_added_ids(tmp_path: Path) -> None:
    """NVILA's tokenizer: Qwen2's files, with NVILA's tokens after the vocabulary."""
    write(tmp_path / "a", NVILA, projector="linear", llm="qwen2")
    llm = tmp_path / "a/llm"
    own = json.loads((llm / "tokenizer.json").read_text())
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (llm / name).unlink()
    words = {word: number for number, word in enumerate(sorted(set(own["model"]["vocab"]) - set(ADDED)))}
    (llm / "vocab.json").write_text(json.dumps(words))
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in own["model"]["merges"]]
    (llm / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    decoder = {str(len(words) + at): {"content": token, "special": True} for at, token in enumerate(ADDED)}
    (llm / "tokenizer_config.json").write_text(
        json.dumps(
            {"tokenizer_class": "Qwen2Tokenizer", "added_tokens_decoder": decoder, "bos_token": "[BOS]",
             "eos_token": "<|im_end|>", "pad_token": "[PAD]", "chat_template": CHATML}
        )
    )  # fmt: skip
    made = import_checkpoint(tmp_path / "a", tmp_path / "ours")
    assert made.model.chat_template == "tokenizer"
    fast = build_tokenizer(made.model.language_model, chat_template="tokenizer", cache=tmp_path)
    assert fast.convert_tokens_to_ids(list(ADDED)) == [len(words) + at for at in range(len(ADDED))]
    assert (fast.bos_token, fast.eos_token) == ("[BOS]", "<|im_end|>")
    image = json.loads((tmp_path / "ours/config.json").read_text())["image_token_index"]
    assert image == fast.convert_tokens_to_ids("<image>")
    assert len(load_file(tmp_path / "ours/model.safetensors")["model.language_model.embed_tokens.weight"]) == 640


def test_the_command_prints_the_section_alone_and_a_refusal_is_an_error(tmp_path: Path) -> None:
    write(tmp_path / "a", V15, projector="mlp_downsample")
    command = ["import", str(tmp_path / "a"), "--out"]
    done = CliRunner().invoke(app, [*command, str(tmp_path / "b")])
    assert done.exit_code == 0
    made = Model.model_validate(yaml.safe_load(done.stdout)["model"])
    assert "note: token order columns" in done.stderr
    printed = json.loads(CliRunner().invoke(app, [*command, str(tmp_path / "c"), "--json"]).stdout)
    assert printed["path"] == str(tmp_path / "c")
    assert printed["model"]["projector"] == made.projector.model_dump()
    refused = CliRunner().invoke(app, [*command, str(tmp_path / "c")])
    assert isinstance(refused.exception, ValueError)
