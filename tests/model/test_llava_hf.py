import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2Config,
    SiglipVisionConfig,
)

from vila_ops.model import folder as model_folder
from vila_ops.model.importing.checkpoint import import_checkpoint

TINY = Path(__file__).parent.parent / "tiny"
IDS = [1, 40, *[3] * 16, 41, 99, 2]
CROP = {
    "image_processor_type": "CLIPImageProcessor",
    "size": {"shortest_edge": 56},
    "crop_size": {"height": 56, "width": 56},
    "do_center_crop": True,
}
SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


def write(folder: Path, **more: Any) -> LlavaForConditionalGeneration:
    """A LLaVA of stock transformers with random weights."""
    torch.manual_seed(0)
    vision: Any = SiglipVisionConfig if more.pop("siglip", False) else CLIPVisionConfig
    words = LlamaConfig(**{**SHAPE, "hidden_size": 48, "num_attention_heads": 4}, vocab_size=640)
    config = LlavaConfig(
        vision_config=vision(**SHAPE, image_size=56, patch_size=14),
        **{"text_config": words, "image_token_index": 3, **more},
    )
    whole = LlavaForConditionalGeneration(config).eval()
    whole.save_pretrained(folder)
    shutil.copytree(TINY / "tokenizer", folder, dirs_exist_ok=True)
    processor = {"image_mean": [0.4] * 3, "image_std": [0.6] * 3, **CROP}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return whole


@pytest.mark.parametrize("siglip", [False, True])
@pytest.mark.parametrize("names_of_4_52", [False, True])
def test_a_stock_folder_gives_the_same_logits(siglip: bool, names_of_4_52: bool, tmp_path: Path) -> None:
    strategy = "full" if siglip else "default"
    whole = write(tmp_path / "a", siglip=siglip, vision_feature_select_strategy=strategy)
    path = tmp_path / "a/model.safetensors"
    state = load_file(path)
    assert "language_model.model.embed_tokens.weight" in state  # what transformers 5 writes, as before 4.52
    if names_of_4_52:
        new = {name.replace("language_model.model.", "language_model."): tensor for name, tensor in state.items()}
        new = {f"model.{name}".replace("model.language_model.lm_head", "lm_head"): t for name, t in new.items()}
        save_file(new, path)
    made = import_checkpoint(tmp_path / "a", tmp_path / "ours")
    assert made.model.chat_template == "chatml"
    assert made.model.image_aspect_ratio == "crop"
    assert model_folder.normalisation(tmp_path / "ours") == ((0.4,) * 3, (0.6,) * 3)
    given = {"input_ids": torch.tensor([IDS]), "pixel_values": torch.rand(1, 3, 56, 56)}
    with torch.no_grad():
        expected, actual = whole(**given).logits, model_folder.load(tmp_path / "ours")(**given).logits
    assert torch.allclose(actual, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("whole_ties", "text_ties"), [(True, False), (False, True), (False, False)])
def test_a_head_is_tied_if_the_whole_config_or_its_text_says_so(
    whole_ties: bool, text_ties: bool, tmp_path: Path
) -> None:
    words = Qwen2Config(
        **{**SHAPE, "hidden_size": 48, "num_attention_heads": 4}, num_key_value_heads=2, vocab_size=640,
        tie_word_embeddings=text_ties,
    )  # fmt: skip
    write(tmp_path / "a", text_config=words, tie_word_embeddings=whole_ties)
    stock = LlavaForConditionalGeneration.from_pretrained(tmp_path / "a").eval()
    import_checkpoint(tmp_path / "a", tmp_path / "ours")
    ours = model_folder.load(tmp_path / "ours")
    for model in (stock, ours):
        assert (model.lm_head.weight is model.get_input_embeddings().weight) == (whole_ties or text_ties)
    given = {"input_ids": torch.tensor([IDS]), "pixel_values": torch.rand(1, 3, 56, 56)}
    with torch.no_grad():
        assert torch.allclose(ours(**given).logits, stock(**given).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("projector", ["linear", "mlp_gelu"])
def test_a_folder_of_ours_comes_back_the_same(projector: str, make_model: Any, build: Any, tmp_path: Path) -> None:
    model = make_model("clip", projector, after_image="\n")
    whole, processor = build(model)
    (tmp_path / "a").mkdir()
    model_folder.save(whole, tmp_path / "a", processor=processor)
    made = import_checkpoint(tmp_path / "a", tmp_path / "ours")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("a", "ours"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    same = (
        "projector",
        "image_aspect_ratio",
        "image_size",
        "patch_size",
        "feature_layer",
        "after_image",
        "chat_template",
    )
    assert {name: getattr(made.model, name) for name in same} == {name: getattr(model, name) for name in same}


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"model_type": "llava_next"}, "holds a 'llava_next' model"),
        ({"projector_hidden_act": "relu"}, "supported are gelu, and linear before an identity"),
        ({"projector_hidden_act": "linear"}, "supported are gelu, and linear before an identity"),
        ({"vision_feature_layer": [-2, -5]}, "supported is one hidden state"),
        ({"vision_feature_select_strategy": "full"}, "supported is 'default'"),
        ({"image_token_index": 7}, "not '<image>'"),
        ({"image_token_index": 9000}, "not '<image>'"),
    ],
)
def test_a_llava_that_is_not_ours_is_refused(more: dict[str, Any], why: str, tmp_path: Path) -> None:
    write(tmp_path / "a")
    path = tmp_path / "a/config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **more}))
    with pytest.raises(ValueError, match=why):
        import_checkpoint(tmp_path / "a", tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_a_template_that_reads_no_plain_text_is_asked_for(tmp_path: Path) -> None:
    write(tmp_path / "a")
    parts = "{% for m in messages %}{% for c in m.content %}{{ c.text }}{% endfor %}{% endfor %}"
    (tmp_path / "a/chat_template.jinja").write_text(parts)
    with pytest.raises(ValueError, match="does not read messages of plain text; say --chat-template"):
        import_checkpoint(tmp_path / "a", tmp_path / "ours")
    assert import_checkpoint(tmp_path / "a", tmp_path / "ours", chat_template="plain").model.chat_template == "plain"


def test_the_order_of_tokens_is_no_question_there(tmp_path: Path) -> None:
    write(tmp_path / "a")
    with pytest.raises(ValueError, match="a LLaVA-HF folder has one token order"):
        import_checkpoint(tmp_path / "a", tmp_path / "ours", token_order="rows")


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is not a folder; download the repository"):
        import_checkpoint(tmp_path / "a", tmp_path / "ours")
