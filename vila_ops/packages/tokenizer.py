"""The language model's tokenizer with an image token and a chat template."""

from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from vila_ops.config.model import LanguageModel
from vila_ops.errors import CorruptArtifact
from vila_ops.packages.chat_template import check_template, fitted, reads_text
from vila_ops.packages.resolve import tokenizer_folder
from vila_ops.packages.untrusted import SIZE_LIMIT, TOKENIZER_BYTES, check_folder, read_json

IMAGE_TOKEN = "<image>"
TEMPLATES = Path(__file__).parent.parent / "templates"
OWN_TEMPLATE = "tokenizer"
"""Name for the template that comes with the tokenizer."""
TEMPLATE_TOKENS: dict[str, tuple[str, ...]] = {
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "hermes_2": ("<|im_start|>", "<|im_end|>"),
    "llama_3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "llama_3_vila": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|end_of_text|>"),
    "plain": (),
    "vicuna_v1": ("</s>",),
}
"""The templates in vila_ops/templates, each with the control tokens that it writes."""


def build_tokenizer(language_model: LanguageModel, *, chat_template: str, cache: Path) -> PreTrainedTokenizerFast:
    """The language model's tokenizer with an image token and a chat template.

    Raises ValueError for a model without a fast tokenizer and for a template that is unknown or does not fit it.
    """
    folder = tokenizer_folder(language_model, cache=cache)
    return with_image_token(read_tokenizer(folder), chat_template=chat_template, folder=folder)


def check_template_name(name: str) -> None:
    """Raise ValueError for a name that is not a chat template."""
    if name not in (*TEMPLATE_TOKENS, OWN_TEMPLATE):
        raise ValueError(
            f"no chat template {name!r}; use one of {sorted(TEMPLATE_TOKENS)}, or {OWN_TEMPLATE!r} for the "
            f"tokenizer's own"
        )


def with_image_token(
    tokenizer: PreTrainedTokenizerFast, *, chat_template: str, folder: Path
) -> PreTrainedTokenizerFast:
    """The tokenizer, read from `folder`, with an image token, added if missing, and a chat template; in place."""
    check_template_name(chat_template)
    if IMAGE_TOKEN not in tokenizer.get_vocab():
        tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]}, replace_extra_special_tokens=False)
    tokenizer.image_token = IMAGE_TOKEN
    tokenizer.chat_template = _template(chat_template, tokenizer, folder)
    return tokenizer


def read_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The fast tokenizer of a folder with the folder's chat template, both checked before use.

    Raises ValueError if it is missing, and CorruptArtifact or ValueError for what `untrusted` and `chat_template`
    refuse.
    """
    check_folder(folder)
    if not (folder / "tokenizer.json").is_file():
        raise ValueError(f"{folder} has no tokenizer.json; only fast tokenizers are supported")
    _check_tokens(read_json(folder / "tokenizer.json", at_most=TOKENIZER_BYTES), folder)
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the tokenizers library raises no other kind
        raise CorruptArtifact(
            f"{folder / 'tokenizer.json'} is not a readable tokenizer ({str(error)[:200]})"
        ) from error
    if isinstance(tokenizer.chat_template, dict):
        for template in tokenizer.chat_template.values():
            check_template(template, where=str(folder))
    elif template := tokenizer.chat_template or _template_of_processor(folder):
        check_template(template, where=str(folder))
        tokenizer.chat_template = reads_text(tokenizer, template)
    return tokenizer


def stop_ids(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Ids that end an answer, ascending, for generation_config.json: eos and the chat template's end of turn.

    `data.text.conversation.Tokenizer.stop_ids` is the same set for training.
    """
    ids = {tokenizer.eos_token_id}
    if tokenizer.chat_template:
        answer = "Yes."
        messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}]
        text: str = tokenizer.apply_chat_template(messages, tokenize=False)
        ending = tokenizer(text.rpartition(answer)[2].strip(), add_special_tokens=False)["input_ids"]
        ids |= set(ending[:1]) & set(tokenizer.get_added_vocab().values())
    return sorted(ids)


def _check_tokens(stated: dict[str, Any], folder: Path) -> None:
    """Raise CorruptArtifact for token ids that are not counts; the tokenizers library checks the rest."""
    vocabulary = (stated.get("model") or {}).get("vocab")
    ids = list(vocabulary.values()) if isinstance(vocabulary, dict) else []
    ids += [token.get("id") for token in stated.get("added_tokens") or [] if isinstance(token, dict)]
    if wrong := next((id for id in ids if type(id) is not int or not 0 <= id <= SIZE_LIMIT), None):
        raise CorruptArtifact(f"{folder / 'tokenizer.json'} has the token id {wrong!r}; ids are from 0 to {SIZE_LIMIT}")


def _template_of_processor(folder: Path) -> str | None:
    """The template in chat_template.json, where transformers kept a processor's until 4.5x; None without the file."""
    path = folder / "chat_template.json"
    if not path.is_file():
        return None
    template = read_json(path).get("chat_template")
    if not isinstance(template, str):
        raise CorruptArtifact(f"{path} holds no chat_template")
    return template


def _fitting(tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """Our templates whose control tokens the tokenizer has."""
    added = set(tokenizer.get_added_vocab())
    return sorted(name for name, tokens in TEMPLATE_TOKENS.items() if set(tokens) <= added)


def _template(name: str, tokenizer: PreTrainedTokenizerFast, folder: Path) -> str:
    if name == OWN_TEMPLATE:
        if not tokenizer.chat_template:
            raise ValueError(f"the tokenizer in {folder} has no chat template; choose one of {sorted(TEMPLATE_TOKENS)}")
        try:
            return fitted(tokenizer, tokenizer.get_chat_template())
        except ValueError as error:
            raise ValueError(
                f"the chat template of the tokenizer in {folder} {error}; choose one of {_fitting(tokenizer)}"
            ) from error
    if missing := [token for token in TEMPLATE_TOKENS[name] if token not in tokenizer.get_added_vocab()]:
        raise ValueError(
            f"chat template {name!r} writes {missing}, which the tokenizer in {folder} does not have as tokens; "
            f"choose one of {_fitting(tokenizer)}, or {OWN_TEMPLATE!r}"
        )
    return (TEMPLATES / f"{name}.jinja").read_text()
