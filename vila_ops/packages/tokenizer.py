"""The language model's tokenizer with an image token and a chat template."""

from pathlib import Path

from transformers import PreTrainedTokenizerFast

from vila_ops.config.model import LanguageModel
from vila_ops.packages.resolve import tokenizer_folder

IMAGE_TOKEN = "<image>"
TEMPLATES = Path(__file__).parent.parent / "templates"
OWN_TEMPLATE = "tokenizer"
"""Not one of ours: the template that comes with the tokenizer."""
TEMPLATE_TOKENS: dict[str, tuple[str, ...]] = {
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "hermes_2": ("<|im_start|>", "<|im_end|>"),
    "llama_3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "llama_3_vila": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|end_of_text|>"),
    "plain": (),
    "vicuna_v1": ("</s>",),
}
"""Our templates, each with the control tokens that it writes."""


def build_tokenizer(language_model: LanguageModel, *, chat_template: str, cache: Path) -> PreTrainedTokenizerFast:
    """Raises ValueError when the model has no fast tokenizer, or the template is unknown or unfit for it."""
    folder = tokenizer_folder(language_model, cache=cache)
    if not (folder / "tokenizer.json").is_file():
        raise ValueError(f"{folder} has no tokenizer.json; only fast tokenizers are supported")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    return with_image_token(tokenizer, chat_template=chat_template, folder=folder)


def with_image_token(
    tokenizer: PreTrainedTokenizerFast, *, chat_template: str, folder: Path
) -> PreTrainedTokenizerFast:
    """The same tokenizer, read from `folder`, with the image token, added if it is not there, and a chat template."""
    if chat_template not in (*TEMPLATE_TOKENS, OWN_TEMPLATE):
        raise ValueError(
            f"no chat template {chat_template!r}; there are {sorted(TEMPLATE_TOKENS)}, and {OWN_TEMPLATE!r} for the "
            f"tokenizer's own"
        )
    if IMAGE_TOKEN not in tokenizer.get_vocab():
        tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]}, replace_extra_special_tokens=False)
    tokenizer.image_token = IMAGE_TOKEN
    tokenizer.chat_template = _template(chat_template, tokenizer, folder)
    return tokenizer


def _template(name: str, tokenizer: PreTrainedTokenizerFast, folder: Path) -> str:
    if name == OWN_TEMPLATE:
        if not tokenizer.chat_template:
            raise ValueError(
                f"the tokenizer in {folder} has no chat template of its own; choose one of {sorted(TEMPLATE_TOKENS)}"
            )
        own: str = tokenizer.get_chat_template()
        return own
    if missing := [token for token in TEMPLATE_TOKENS[name] if token not in tokenizer.get_added_vocab()]:
        fit = [other for other, tokens in TEMPLATE_TOKENS.items() if set(tokens) <= set(tokenizer.get_added_vocab())]
        raise ValueError(
            f"chat template {name!r} writes {missing}, which the tokenizer in {folder} does not have as tokens; "
            f"choose one of {sorted(fit)}, or {OWN_TEMPLATE!r}"
        )
    return (TEMPLATES / f"{name}.jinja").read_text()
