import json
import shutil
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from vila_ops.config.model import RandomLanguageModel
from vila_ops.packages.tokenizer import IMAGE_TOKEN, TEMPLATES, build_tokenizer

OWN = "{% for m in messages %}{{ m.role + ':' + m.content + '<|im_end|>' }}{% endfor %}"
OWN += "{% if add_generation_prompt %}assistant:{% endif %}"


def build(folder: Path, template: str) -> PreTrainedTokenizerFast:
    return build_tokenizer(RandomLanguageModel(tokenizer=str(folder)), chat_template=template, cache=folder)


@pytest.fixture
def own(tiny: Path, tmp_path: Path) -> Path:
    """A tokenizer's folder with a third-party template and without an image token."""
    folder = tmp_path / "tokenizer"
    shutil.copytree(tiny / "tokenizer", folder)
    (folder / "chat_template.jinja").write_text(OWN)
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace(IMAGE_TOKEN, "<photo>"))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "image_token": "<photo>"}))
    return folder


@pytest.mark.parametrize("template", ["chatml", "plain"])
def test_our_template_replaces_the_tokenizers(own: Path, template: str) -> None:
    assert build(own, template).chat_template == (TEMPLATES / f"{template}.jinja").read_text()


def test_the_tokenizers_own_template_is_kept_on_request(own: Path) -> None:
    assert build(own, "tokenizer").chat_template == OWN
    (own / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match="has no chat template; choose one of"):
        build(own, "tokenizer")


def test_the_image_token_is_one_token(own: Path) -> None:
    fast = build(own, "chatml")
    assert fast("A <image>.")["input_ids"].count(fast.convert_tokens_to_ids(IMAGE_TOKEN)) == 1
    assert len(fast) == 513


@pytest.mark.parametrize(
    ("template", "missing"), [("vicuna_v1", "'</s>'"), ("llama_3", "'<|start_header_id|>', .*'<|eot_id|>'")]
)
def test_a_template_whose_control_tokens_the_tokenizer_lacks_is_refused(
    tiny: Path, template: str, missing: str
) -> None:
    with pytest.raises(
        ValueError,
        match=rf"writes \[{missing}\], .* choose one of \['chatml', 'hermes_2', 'plain'\]".replace("|", r"\|"),
    ):
        build(tiny / "tokenizer", template)


def test_an_unknown_template_is_refused_with_those_there_are(tiny: Path) -> None:
    with pytest.raises(ValueError, match=r"no chat template 'chatlm'; use one of \['chatml', 'hermes_2', 'llama_3'"):
        build(tiny / "tokenizer", "chatlm")
