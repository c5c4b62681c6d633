"""A model folder in memory: weights, tokenizer and image features, and the checks that a prompt fits them."""

# B rows, T tokens, D language model dim, I images, P patches, C tower channels

import functools
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from vila_ops.data.images import Fit
from vila_ops.data.text.conversation import Tokenizer
from vila_ops.device import device_of, precision_notes
from vila_ops.generate.engine import EngineOptions
from vila_ops.generate.torch_engine.image_features import ImageFeatures, RecentFeatures, StoredFeatures
from vila_ops.generate.torch_engine.packed import can_pack, pack
from vila_ops.generate.torch_engine.quantised import quantise
from vila_ops.model import folder as model_folder
from vila_ops.model.configuration import VilaConfig
from vila_ops.model.context import context_length
from vila_ops.model.features import BATCH
from vila_ops.model.pixels import Pixels
from vila_ops.model.vila import VilaForConditionalGeneration
from vila_ops.packages.tokenizer import IMAGE_TOKEN, read_tokenizer

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadedModel:
    """Everything that scheduler and scorer compute with."""

    model: VilaForConditionalGeneration
    device: torch.device
    """Where the model is."""
    tokenizer: Tokenizer
    features: ImageFeatures
    image_aspect_ratio: Fit

    @functools.cached_property
    def context_length(self) -> int:
        """Positions of the language model."""
        length = context_length(self.model.config.text_config.to_dict())
        assert length is not None  # every class of LANGUAGE_MODELS has max_position_embeddings
        return length

    @property
    def token_bytes(self) -> int:
        """Bytes of the keys and values of one token, of all layers."""
        text = self.model.config.text_config
        heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        return int(2 * text.num_hidden_layers * heads * size * self.model.lm_head.weight.element_size())

    @property
    def image_bytes(self) -> int:
        """Bytes of the tower's features of one image, with those of a class token, which some towers have."""
        tower = self.model.model.vision_tower
        values = (self.model.config.grid() ** 2 + 1) * tower.config.hidden_size
        return int(values * next(tower.parameters()).element_size())

    def embed(self, input_ids: Tensor, images: Sequence[bytes]) -> Tensor:
        """Embeddings (B, T, D) of ids (B, T), image positions filled with the images of all rows in their order."""
        return self.model.embed(input_ids, self.features(images).to(self.device) if images else None)

    def embed_prompt(self, ids: list[int], features: Sequence[Tensor]) -> Tensor:
        """Embeddings (T, D) of ids, image positions filled with features (P, C) of each image in their order."""
        input_ids = torch.tensor([ids], device=self.device)
        places = [place for place, one in enumerate(ids) if one == self.tokenizer.image_id]
        shown = torch.stack([one.to(self.device) for one in features]) if features else None
        return self.model.embed(input_ids, shown, torch.tensor(places, dtype=torch.long, device=self.device))[0]

    @torch.inference_mode()
    def image_features(self, images: Sequence[bytes]) -> NDArray[np.float64]:
        """Means over patches (I, C) of the tower's features of encoded squares; few images are in memory at a time."""
        parts = (self.features(images[start : start + BATCH]) for start in range(0, len(images), BATCH))
        return np.concatenate([part.float().mean(dim=1).cpu().double().numpy() for part in parts])


def read_model(folder: Path, options: EngineOptions) -> LoadedModel:
    """Read a model folder onto a device. Raises CorruptArtifact or ValueError with what is wrong with either."""
    device = device_of(options.device)
    torch.set_num_threads(options.threads)
    fast = read_tokenizer(folder)
    model = model_folder.load(folder)
    mean, std = model_folder.normalisation(folder)
    features: ImageFeatures
    if options.feature_root is not None:
        features = StoredFeatures(
            model, Pixels(mean, std), root=options.feature_root, leave_free=options.features_leave_free
        )
    else:
        features = RecentFeatures(model, Pixels(mean, std), max_images=options.max_cached_images)
    for note in precision_notes(options.precision, device):
        log.warning("%s: %s", folder, note)
    if options.precision == "bf16":
        for parameter in (*model.model.language_model.parameters(), *model.lm_head.parameters()):
            parameter.data = parameter.data.to(torch.bfloat16)  # not buffers: rotary frequencies need fp32
    elif options.precision in ("int8", "int4"):
        quantise(model, options.precision)
    elif device.type == "cpu" and can_pack():
        pack(model)
    _check_tokens(fast, model.config, folder)
    tokenizer = Tokenizer(fast, image_tokens=model.config.image_seq_length, after_image=model.config.after_image)
    return LoadedModel(model.to(device), device, tokenizer, features, Fit(model.config.image_aspect_ratio, mean))


def _check_tokens(fast: PreTrainedTokenizerFast, config: VilaConfig, folder: Path) -> None:
    """The image token has the id of the config, and no id exceeds the embedding."""
    vocabulary: dict[str, int] = fast.get_vocab()
    if IMAGE_TOKEN not in vocabulary:
        raise ValueError(f"the tokenizer of {folder} has no token {IMAGE_TOKEN!r}; add it as config.json numbers it")
    if vocabulary[IMAGE_TOKEN] != config.image_token_id:
        raise ValueError(
            f"{IMAGE_TOKEN!r} is {vocabulary[IMAGE_TOKEN]} in the tokenizer of {folder}, but {config.image_token_id} "
            f"in its config.json; give it the same id in both"
        )
    if (largest := max(vocabulary.values())) >= config.text_config.vocab_size:
        raise ValueError(
            f"the tokenizer of {folder} has the id {largest}, beyond the embedding of {config.text_config.vocab_size} "
            f"rows; use the tokenizer of this model"
        )
