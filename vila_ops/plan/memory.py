"""Memory of one worker while a stage trains, computed from shapes alone.

**States** (Rajbhandari et al. 2020, ZeRO, arXiv:1910.02054, figure 1). In bf16 a trained parameter has a bf16 weight,
an fp32 master weight, an fp32 gradient and two fp32 moments, 18 bytes together. In fp32 it has a weight, a gradient and
two moments, 16 bytes, and DeepSpeed adds an fp32 copy of the rank's shard. In bf16, DeepSpeed's ZeRO-1 also keeps the
bf16 gradients of a pass. Frozen weights have the dtype of the computation. A frozen tower is whole on every rank.

**Activations** (after Korthikanti et al. 2022, arXiv:2205.05198, section 4.1). The paper's 34 bytes x tokens x width of
a GPT layer are replaced by those of transformers' Llama, and its 5 a s / h of attention scores are left out, as no
kernel here keeps scores. Bytes per token and layer, with width D, attention width A, key-value width K, inner width F
and b bytes of the dtype:

    trains     8 D, inputs of both norms in fp32, + 4 D b, their outputs with and without weight, + 4 F b of the MLP
               + the attention's q, k, v and output
    frozen     8 D, inputs of both norms, + 3 F b + the same of the attention
    attention  4 A b, as keys and values are repeated for SDPA, + T b of the mask, which SDPA keeps as numbers;
               FlashAttention and FlexAttention keep 2 (A + K) b and no mask

Gradient checkpointing keeps the input of every layer, and all activations of one layer.
"""

from dataclasses import dataclass

from pydantic import computed_field

from vila_ops.config import Config, Resources, Stage
from vila_ops.config.train import FullTuning, Lora, VisualExpert
from vila_ops.model.features import BATCH
from vila_ops.model.loss import chunk_tokens
from vila_ops.plan.messages import sizes_by_shapes
from vila_ops.plan.shapes import Block, Shapes, widths

LIVE = 1_000_000_000
"""DeepSpeed's default `stage3_max_live_parameters`, in elements."""
GIB = 2**30
FP32, BF16 = 4, 2
NF4 = 0.52
"""Bytes per 4-bit weight, with its share of the block's scale (QLoRA, arXiv:2305.14314)."""


@dataclass(frozen=True)
class Weights:
    """Numbers of parameters while a stage trains, by state."""

    trained: int
    frozen_decoder: int
    frozen_rest: int
    """Frozen parameters of tower and projector."""


@dataclass(frozen=True)
class MicroBatch:
    """The largest micro-batch of a stage."""

    rows: int
    tokens: int
    """Tokens per row, padding included."""
    images: int
    """Images of all rows together."""


class Memory(Config):
    """Memory of one worker at the peak of a step, in bytes or GiB."""

    weights: float
    gradients: float
    optimizer: float
    """Moments, and the fp32 master weights that are not the weights themselves."""
    activations: float
    buffers: float
    """DeepSpeed's buffers, and what the tower's pass needs beyond the memory of activations."""
    host: float
    """Offloaded state in the host's memory."""

    @computed_field  # type: ignore[prop-decorator]  # mypy does not support a decorated property
    @property
    def total(self) -> float:
        """Peak memory of the GPU. Loading takes less: weights come in the dtype of the computation, and ZeRO-3's one by
        one."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.buffers

    def in_gib(self) -> "Memory":
        """Return this memory, which is in bytes, in GiB."""
        return Memory(**{name: value / GIB for name, value in self})


def memory(shapes: Shapes, weights: Weights, stage: Stage, resources: Resources, largest: MicroBatch) -> Memory:
    """Return the peak memory of a step in bytes. `resources` must be those of the stage, `Resources.for_stage`."""
    zero, workers, b = resources.train.zero_stage, resources.train.num_workers, value_bytes(stage)
    trained, frozen = weights.trained, _frozen(weights, stage)
    parted = [workers if zero >= least else 1 for least in (1, 2, 3)]  # optimizer, gradients, weights
    optimizer = FP32 * (3 if zero or b == BF16 else 2) * trained / parted[0]
    gradients = (FP32 + (BF16 if zero == 1 and b == BF16 else 0)) * trained / parted[1]
    held = (b * trained + frozen) / parted[2]
    live = min(LIVE / max(1, weights.trained + weights.frozen_decoder), 1 - 1 / workers) if zero == 3 else 0
    gathered = live * (b * trained + frozen)
    host = 0.0
    if resources.train.offload != "none":
        host, optimizer = optimizer + gradients, 0.0
        gradients = 0.0 if zero >= 2 else gradients
    if resources.train.offload == "parameters":
        host, held = host + held, 0.0
    kept = activations(shapes, stage, resources, largest)
    per_pass = resources.train.micro_batch_size * workers
    if stage.global_batch_size == per_pass and zero in (0, 1):
        # With one micro-batch per step, gradients grow while activations are freed.
        gradients = max(0.0, gradients - kept)
    return Memory(
        weights=held + gathered + b * weights.frozen_rest,
        gradients=gradients,
        optimizer=optimizer,
        activations=kept,
        buffers=_buckets(shapes, weights, stage, resources) + max(0.0, tower_pass(shapes, stage, largest) - kept),
        host=host,
    )


def _buckets(shapes: Shapes, weights: Weights, stage: Stage, resources: Resources) -> float:
    """Return the bytes of the gradients that DeepSpeed collects, and of their copy that is reduced."""
    if resources.train.zero_stage == 0 or resources.train.num_workers == 1:
        return 0.0
    b = value_bytes(stage)
    reduced = BF16 if b == BF16 and resources.train.reductions == "bf16" else FP32
    return (b + reduced) * min(sizes_by_shapes(shapes).reduce, weights.trained)


def value_bytes(stage: Stage) -> int:
    """Return the bytes per value of activations, frozen weights and cached features."""
    return BF16 if stage.precision == "bf16" else FP32


def _frozen(weights: Weights, stage: Stage) -> float:
    """Return the bytes of the language model's frozen weights."""
    if isinstance(stage.tuning, Lora) and stage.tuning.quantise and "language_model" in stage.trainable:
        return NF4 * weights.frozen_decoder
    return value_bytes(stage) * weights.frozen_decoder


def activations(shapes: Shapes, stage: Stage, resources: Resources, largest: MicroBatch) -> float:
    """Return the bytes that the forward pass of a micro-batch keeps for its backward pass."""
    b = value_bytes(stage)
    tokens, block = largest.rows * largest.tokens, shapes.decoder
    tunes = "language_model" in stage.trainable
    full = tunes and isinstance(stage.tuning, FullTuning)
    kernel, on_cpu = resources.train.attention, not resources.plans_gpu()
    dense = kernel == "sdpa" or (kernel == "auto" and on_cpu and resources.train.compile)
    varlen = kernel == "varlen" or (kernel == "auto" and on_cpu and not dense)
    attention = _attention(block, b, repeated=dense or varlen) + (largest.tokens * b if dense else 0)
    layer = tokens * (_llama(block, b, trains=full) + attention)
    if tunes and not full:
        layer += tokens * _adapter_inputs(stage.tuning, block, b)
    kept = shapes.layers * layer
    if resources.train.gradient_checkpointing:
        kept = shapes.layers * tokens * block.width * b + layer
    joined = 6 * tokens * block.attention * b if varlen else 0  # gradients of q, k and v, by segment and joined
    return (
        kept
        + joined
        + tokens * block.width * ((FP32 + 3 * b) if full else 2 * FP32)
        + _projector_and_tower(shapes, stage, resources, largest, b)
        + _head(shapes, tokens, b, trains=full)
    )


def _llama(block: Block, b: int, *, trains: bool) -> float:
    """Return the bytes per token of a decoder layer without its attention. Both norms keep one fp32 value too."""
    inner = block.mlp[0][1]
    if not trains:
        return 8 * block.width + 3 * inner * b + 8
    return (8 + 4 * b) * block.width + 4 * inner * b + 8


def _attention(block: Block, b: int, *, repeated: bool) -> float:
    """Return the bytes per token of attention: q, k, v, output, and each head's log-sum-exp."""
    keys = block.attention if repeated else block.key_value
    return 2 * (block.attention + keys) * b + FP32 * block.heads


def _adapter_inputs(tuning: Lora | VisualExpert | FullTuning, block: Block, b: int) -> float:
    """Return the extra bytes per token of a frozen layer with adapters or an expert: the inputs of their layers."""
    inputs = sum(inputs for inputs, _ in block.matrices)
    if not isinstance(tuning, Lora):
        return inputs * b
    ranks = tuning.rank * b * len(block.matrices)
    if tuning.dropout:
        return inputs * (b + 1) + ranks  # each linear layer keeps its dropped-out input, and a byte of mask
    return (2 * block.width + block.mlp[0][1]) * b + ranks


def _projector_and_tower(shapes: Shapes, stage: Stage, resources: Resources, largest: MicroBatch, b: int) -> float:
    """Return the bytes of activations of projector and tower."""
    kept = 0.0
    if "projector" in stage.trainable or "vision_tower" in stage.trainable:
        kept += largest.images * shapes.image_tokens * widths(shapes.projector) * b
        kept += largest.images * shapes.patches * sum(_vit(block, b) for block in shapes.projector_blocks)
    if "vision_tower" in stage.trainable:
        tokens = largest.images * shapes.tower_tokens
        layer = tokens * _vit(shapes.tower, b)
        layers = shapes.tower_layers * layer
        if resources.train.gradient_checkpointing:
            layers = shapes.tower_layers * tokens * shapes.tower.width * b + layer
        kept += layers
    return kept


def _vit(block: Block, b: int) -> float:
    """Return the bytes per token of a tower's layer (as CLIP's): norms, attention, MLP and activation."""
    return 4 * b * block.width + _attention(block, b, repeated=True) + 3 * block.mlp[0][1] * b + 16


def _head(shapes: Shapes, tokens: int, b: int, *, trains: bool) -> float:
    """Return the bytes of the chunked loss: logits of a chunk, gradients of the inputs, fp32 gradient of the weight.

    In bf16 that gradient is rounded once the logits are gone.
    """
    width, vocabulary = shapes.decoder.width, shapes.vocabulary
    logits = min(tokens, chunk_tokens(width)) * vocabulary * (FP32 if b == FP32 else FP32 + b)
    rounded = trains * vocabulary * width * (0 if b == FP32 else b)
    return max(logits, rounded) + tokens * width * 2 * b + trains * vocabulary * width * FP32


def tower_pass(shapes: Shapes, stage: Stage, largest: MicroBatch) -> float:
    """Return the bytes of a frozen tower's pass over a batch of the feature cache: the states of all layers."""
    if not largest.images or "vision_tower" in stage.trainable:
        return 0.0
    tokens = BATCH * shapes.tower_tokens
    return value_bytes(stage) * tokens * (shapes.tower.width * (shapes.tower_layers + 2) + 2 * shapes.tower.mlp[0][1])
