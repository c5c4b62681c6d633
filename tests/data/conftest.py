"""Tokenizers with any chat template."""

from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from vila_ops.packages.tokenizer import IMAGE_TOKEN, TEMPLATE_TOKENS, TEMPLATES

LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How Llama 3 cuts text into words: newlines stick to what stands before them, so tokens straddle turns."""
CORPUS = [
    "USER: A dog.\n\nASSISTANT: is it?\n\n\n assistant answer: yes!\n  No ... naïve 🦙🦙 شجرة\n\n",
    "\n\n\n\n  \n  \t .\n",
] * 9


@pytest.fixture(scope="session")
def fast_with(tiny: Path) -> Callable[..., PreTrainedTokenizerFast]:
    """A tokenizer with the control tokens of all our templates, and one of these or a template given as text.

    It is the tiny one, or a byte-level BPE like Llama 3's, whose post-processor trims blanks off the offsets.
    """

    def make(template: str, *, like: str = "tiny") -> PreTrainedTokenizerFast:
        fast = _like_llama_3() if like == "llama_3" else PreTrainedTokenizerFast.from_pretrained(tiny / "tokenizer")
        fast.add_tokens(sorted({token for tokens in TEMPLATE_TOKENS.values() for token in tokens}), special_tokens=True)
        ours = template in TEMPLATE_TOKENS
        fast.chat_template = (TEMPLATES / f"{template}.jinja").read_text() if ours else template
        return fast

    return make


def _like_llama_3() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    words = pre_tokenizers.Split(Regex(LLAMA_3), "isolated")
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([words, bytes_])
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    specials = ["<|begin_of_text|>", "<|end_of_text|>", IMAGE_TOKEN]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in specials],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=specials[0], eos_token=specials[1])
