"""Import a third-party checkpoint: write a model folder, and the `model:` section of a recipe that starts from it."""

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from vila_ops.artifacts import output
from vila_ops.config import Config, Model
from vila_ops.config.model import FolderWeights, HubLanguageModel, HubTower, Shape
from vila_ops.errors import CorruptArtifact, VilaError
from vila_ops.model import build, folder, processing
from vila_ops.model.importing import llava_hf, nvlabs
from vila_ops.model.importing.components import Components
from vila_ops.model.importing.nvlabs import TokenOrder
from vila_ops.model.seeds import isolated
from vila_ops.model.towers import square_side
from vila_ops.model.vila import VilaForConditionalGeneration
from vila_ops.packages.tokenizer import IMAGE_TOKEN, check_template_name, with_image_token

REVISION = "imported"
SHAPE = (
    "model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "vocab_size", "tie_word_embeddings", "max_position_embeddings", "image_size",
    "patch_size", "attention_bias", "attention_out_bias", "mlp_bias", "use_bias", "use_qk_norm", "qk_layernorm",
    "norm_type", "vision_use_head",
)  # fmt: skip
"""Fields of a transformers config that decide the number of parameters of a tower or language model."""


class Imported(Config):
    """The result of an import."""

    path: str
    """The model folder."""
    model: Model
    """The section `model:` of a recipe that starts from it."""
    notes: tuple[str, ...]
    """What was inferred because the checkpoint does not state it, and what was left out."""


def import_checkpoint(
    source: Path, out: Path, *, token_order: TokenOrder | None = None, chat_template: str | None = None
) -> Imported:
    """Write the model of an NVlabs VILA or a LLaVA-HF folder to `out`, a folder that is absent or empty.

    The folder appears by one rename, so it is complete whenever it exists. Weights keep their precision. Raises
    ValueError or CorruptArtifact, with the reason, for a checkpoint that cannot be represented exactly.
    """
    output.check_folder(out)  # before gigabytes are read
    if chat_template is not None:
        check_template_name(chat_template)
    try:
        components = _read(source, token_order=token_order, chat_template=chat_template)
    except (ValueError, VilaError, OSError, MemoryError):
        raise
    except Exception as error:  # settings of any shape: a list for a number, an object for a name
        raise CorruptArtifact(
            f"the settings in {source} describe no model that can be imported ({type(error).__name__}: "
            f"{str(error)[:300]})"
        ) from error
    tokenizer = with_image_token(components.tokenizer, chat_template=components.chat_template, folder=source)
    _grow_vocabulary(components.language_model, len(tokenizer))
    model = _section(components, out)
    whole = _assembled(
        components, model, image_id=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN), eos_id=tokenizer.eos_token_id
    )
    with output.new_folder(out) as draft:
        processor = processing.build_processor(whole.config, tokenizer, mean_std=components.mean_std)
        folder.save(whole, draft, processor=processor)
    return Imported(path=str(out), model=model, notes=components.notes)


def shape_of(config: PreTrainedConfig) -> Shape:
    """The fields of a config that decide the number of parameters."""
    stated = config.to_dict()
    shape: Shape = {name: stated[name] for name in SHAPE if isinstance(stated.get(name), int | float | str)}
    sides = {name: square_side(stated[name]) for name in ("image_size", "patch_size") if stated.get(name)}
    return {**shape, **sides}


def _read(source: Path, *, token_order: TokenOrder | None, chat_template: str | None) -> Components:
    if not source.is_dir():
        raise ValueError(f"{source} is not a folder; download the repository and give its folder")
    if nvlabs.is_nvlabs(source):
        return nvlabs.read(source, token_order=token_order, chat_template=chat_template)
    if token_order is not None:
        raise ValueError("--token-order is for checkpoints of NVlabs/VILA; a LLaVA-HF folder has one token order")
    return llava_hf.read(source, chat_template=chat_template)


def _grow_vocabulary(language_model: PreTrainedModel, vocabulary: int) -> None:
    """Add zero rows to embedding and head for tokens without one, in place; they are never looked up or trained.

    v1 checkpoints have no image token. A checkpoint with enough rows keeps their number.
    """
    rows = language_model.get_input_embeddings().weight.shape[0]
    if vocabulary <= rows:
        return
    padded = -(-vocabulary // build.VOCABULARY_MULTIPLE) * build.VOCABULARY_MULTIPLE
    with isolated(0, "resize"):  # its draws are replaced below
        language_model.resize_token_embeddings(padded, mean_resizing=False)
    with torch.no_grad():
        for matrix in (language_model.get_input_embeddings().weight, language_model.get_output_embeddings().weight):
            matrix[rows:] = 0


def _section(components: Components, out: Path) -> Model:
    vision = components.tower.config
    return Model(
        vision_tower=HubTower(name=str(out), revision=REVISION, shape=shape_of(vision)),
        projector=components.projector,
        language_model=HubLanguageModel(
            name=str(out), revision=REVISION, shape=shape_of(components.language_model.config)
        ),
        image_size=square_side(vision.image_size),
        patch_size=square_side(vision.patch_size),
        feature_layer=components.feature_layer,
        image_aspect_ratio=components.image_aspect_ratio,
        weights=FolderWeights(path=str(out)),
        chat_template=components.chat_template,
        after_image=components.after_image,
    )


def _assembled(
    components: Components, model: Model, *, image_id: int, eos_id: int | None
) -> VilaForConditionalGeneration:
    if eos_id is None:
        raise ValueError("the tokenizer has no eos token, so no answer would end; set it in tokenizer_config.json")
    config = build.config_of(model, components.tower, components.language_model, image_id=image_id, eos_id=eos_id)
    config.dtype = components.language_model.dtype
    with torch.device("meta"):
        whole = VilaForConditionalGeneration(config)
    whole.model.vision_tower = components.tower
    whole.model.language_model = components.language_model.get_decoder()
    whole.take_head(components.language_model.get_output_embeddings())
    _fill(whole.model.multi_modal_projector, components.layers)
    ready: VilaForConditionalGeneration = whole.eval()
    return ready


def _fill(projector: nn.Module, layers: list[dict[str, Tensor]]) -> None:
    """Set a projector's weights, given for its norms and linear layers in the order of their application."""
    wanted = [module for module in projector.modules() if isinstance(module, nn.LayerNorm | nn.Linear)]
    if len(wanted) != len(layers):
        raise CorruptArtifact(f"the projector has {len(wanted)} layers with weights, the checkpoint has {len(layers)}")
    for number, (module, held) in enumerate(zip(wanted, layers, strict=True)):
        shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
        stored = {name: tuple(tensor.shape) for name, tensor in held.items()}
        if shapes != stored:
            raise CorruptArtifact(
                f"layer {number} of the projector is {shapes} by its type, {stored} in the checkpoint"
            )
        module.load_state_dict(held, assign=True)
