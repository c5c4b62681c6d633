"""A sealed model to a generator."""

import functools
from pathlib import Path
from typing import Literal

import torch
from transformers import PreTrainedTokenizerFast

from vila_ops.artifacts.kinds import Checkpoint, Pretrained
from vila_ops.artifacts.store import content, verify
from vila_ops.data.images import Fit, pixels
from vila_ops.data.text.conversation import Tokenizer
from vila_ops.generate.engine import Generator
from vila_ops.model import folder as model_folder
from vila_ops.model.features import FeatureCache


def load_generator(
    model: Checkpoint | Pretrained, *, feature_root: Path, threads: int, precision: Literal["fp32", "bf16"]
) -> Generator:
    """The model of a sealed folder, every byte checked, on `threads` threads of this process.

    bf16 is of the language model; the tower stays fp32, so that its cached features serve training too.
    """
    torch.set_num_threads(threads)
    verify(model)
    folder = content(model)
    vila = model_folder.load(folder)
    mean, std = model_folder.normalisation(folder)
    cache = FeatureCache(vila, functools.partial(pixels, mean=mean, std=std), root=feature_root)
    if precision == "bf16":
        vila.model.language_model.to(torch.bfloat16)
        vila.lm_head.to(torch.bfloat16)
    tokenizer = Tokenizer(
        PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True),
        image_tokens=vila.config.image_seq_length,
        after_image=vila.config.after_image,
    )
    return Generator(vila, tokenizer, features=cache, image_fit=Fit(vila.config.image_fit, mean))
