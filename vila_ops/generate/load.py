"""A sealed model to a generator."""

import functools
from pathlib import Path
from typing import Literal

import torch
from transformers import PreTrainedTokenizerFast

from vila_ops.artifacts.kinds import Checkpoint, Pretrained
from vila_ops.artifacts.store import content
from vila_ops.data.images import Fit, pixels
from vila_ops.data.text.conversation import Tokenizer
from vila_ops.generate.engine import Generator
from vila_ops.model import folder as model_folder
from vila_ops.model.configuration import VilaConfig
from vila_ops.model.features import FeatureCache
from vila_ops.packages.tokenizer import IMAGE_TOKEN, read_tokenizer


def load_generator(
    model: Checkpoint | Pretrained, *, feature_root: Path, threads: int, precision: Literal["fp32", "bf16"]
) -> Generator:
    """The model of a sealed folder, every byte checked, on `threads` threads of this process.

    bf16 is of the language model; the tower stays fp32, so that its cached features serve training too.
    """
    return generator_of(content(model), feature_root=feature_root, threads=threads, precision=precision)


def generator_of(folder: Path, *, feature_root: Path, threads: int, precision: Literal["fp32", "bf16"]) -> Generator:
    """The model of any folder, of ours or of another writer of LLaVA's format; nothing of it is trusted.

    Raises CorruptArtifact or ValueError with what is wrong with the folder, before anything of it is used.
    """
    torch.set_num_threads(threads)
    fast = read_tokenizer(folder)
    vila = model_folder.load(folder)
    mean, std = model_folder.normalisation(folder)
    cache = FeatureCache(vila, functools.partial(pixels, mean=mean, std=std), root=feature_root)
    if precision == "bf16":
        vila.model.language_model.to(torch.bfloat16)
        vila.lm_head.to(torch.bfloat16)
    _check_tokens(fast, vila.config, folder)
    tokenizer = Tokenizer(
        fast,
        image_tokens=vila.config.image_seq_length,
        after_image=vila.config.after_image,
    )
    return Generator(vila, tokenizer, features=cache, image_aspect_ratio=Fit(vila.config.image_aspect_ratio, mean))


def _check_tokens(fast: PreTrainedTokenizerFast, config: VilaConfig, folder: Path) -> None:
    """The tokenizer's ids are the model's: an image where the model expects it, and no id beyond the embedding."""
    vocabulary: dict[str, int] = fast.get_vocab()
    if IMAGE_TOKEN not in vocabulary:
        raise ValueError(f"the tokenizer of {folder} has no token {IMAGE_TOKEN!r}; add it as config.json numbers it")
    if vocabulary[IMAGE_TOKEN] != config.image_token_id:
        raise ValueError(
            f"{IMAGE_TOKEN!r} is {vocabulary[IMAGE_TOKEN]} in the tokenizer of {folder}, but {config.image_token_id} "
            f"in its config.json; make them one"
        )
    if (largest := max(vocabulary.values())) >= config.text_config.vocab_size:
        raise ValueError(
            f"the tokenizer of {folder} has the id {largest}, beyond the embedding of {config.text_config.vocab_size} "
            f"rows; it is of another model"
        )
