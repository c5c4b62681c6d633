"""The language model's tokenizer with an image token and our chat template."""

from pathlib import Path

from transformers import PreTrainedTokenizerFast

from vila_ops.config.model import LanguageModel
from vila_ops.packages.resolve import tokenizer_folder

IMAGE_TOKEN = "<image>"
TEMPLATES = Path(__file__).parent.parent / "templates"


def build_tokenizer(language_model: LanguageModel, *, chat_template: str, cache: Path) -> PreTrainedTokenizerFast:
    """Raises ValueError when the model has no fast tokenizer or the template is unknown."""
    template = TEMPLATES / f"{chat_template}.jinja"
    if not template.is_file():
        known = sorted(path.stem for path in TEMPLATES.glob("*.jinja"))
        raise ValueError(f"no chat template {chat_template!r}; there are {known}")
    folder = tokenizer_folder(language_model, cache=cache)
    if not (folder / "tokenizer.json").is_file():
        raise ValueError(f"{folder} has no tokenizer.json; only fast tokenizers are supported")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    if IMAGE_TOKEN not in tokenizer.get_vocab():
        tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]}, replace_extra_special_tokens=False)
    tokenizer.image_token = IMAGE_TOKEN
    tokenizer.chat_template = template.read_text()
    return tokenizer
