"""Memory of one worker while a stage trains, from shapes alone: bytes by what they hold.

**States** (Rajbhandari et al. 2020, ZeRO, arXiv:1910.02054, figure 1) as this engine keeps them, which is not the
paper's 2 + 2 + 12 bytes: what trains has fp32 weights, fp32 gradients and two fp32 moments, 16 bytes a parameter, and
under bf16 autocast a bf16 copy of every matrix as long as its graph lives. DeepSpeed adds an fp32 copy of the rank's
share. What of the language model is frozen is kept in the dtype that it computes in; a frozen tower is whole on every
rank, in fp32.

**Activations** (after Korthikanti et al. 2022, arXiv:2205.05198, section 4.1, whose 34 bytes x tokens x width of a GPT
layer become those of transformers' Llama under autocast, and whose 5 a s / h of scores no kernel here keeps). Of a
token in a layer, with width D, attention width A, key-value width K, inner width F and b bytes of the dtype:

    trains   16 D, input and output of both norms in fp32, + 10 D in bf16, one cast for each of q, k, v, gate and up
             (8 D in fp32), + 4 F b of the MLP + the attention's q, k, v and output
    frozen    8 D, input of both norms, + 3 F b + the same of the attention
    attention 4 A b, as keys and values are repeated for SDPA, + T b of the mask, which it turns into numbers and keeps;
             FlashAttention and FlexAttention keep 2 (A + K) b and no mask

and with gradient checkpointing the input of every layer and all of one.
"""

from dataclasses import dataclass

from pydantic import computed_field

from vila_ops.config import Config, Resources, Stage
from vila_ops.config.train import FullTuning, Lora, VisualExpert
from vila_ops.model.features import BATCH
from vila_ops.model.loss import chunk_tokens
from vila_ops.plan.shapes import Block, Shapes, numbers, widths

BUCKET = 500_000_000
"""DeepSpeed's default `reduce_bucket_size`, in numbers."""
LIVE = 1_000_000_000
"""DeepSpeed's default `stage3_max_live_parameters`."""
GIB = 2**30
FP32, BF16 = 4, 2
NF4 = 0.52
"""Bytes of a weight in 4 bits, with its share of a block's scale (arXiv:2305.14314)."""


@dataclass(frozen=True)
class Weights:
    """Numbers of parameters while a stage trains."""

    trained: int
    frozen_decoder: int
    frozen_rest: int
    """Of tower and projector."""


@dataclass(frozen=True)
class MicroBatch:
    """The largest one that may come."""

    rows: int
    tokens: int
    """Of a row, padding included."""
    images: int
    """Of all rows."""


class Memory(Config):
    """Of one worker, in bytes or GiB; where nothing else is said, at the peak of a step."""

    weights: float
    gradients: float
    optimizer: float
    """Moments, and DeepSpeed's fp32 copy of the weights."""
    copies: float
    """bf16 copies of the trained matrices."""
    activations: float
    buffers: float
    """DeepSpeed's, and the tower's pass over images where that is more than the activations."""
    loading: float
    """Before the first step: the model is whole on each GPU until ZeRO-3 takes its share."""
    host: float
    """Offloaded, in the host's memory."""

    @computed_field  # type: ignore[prop-decorator]  # mypy knows no decorated property
    @property
    def total(self) -> float:
        """The most that is on the GPU at once."""
        step = self.weights + self.gradients + self.optimizer + self.copies + self.activations + self.buffers
        return max(self.loading, step)

    def in_gib(self) -> "Memory":
        """The same of a memory in bytes."""
        return Memory(**{name: value / GIB for name, value in self})


def memory(shapes: Shapes, weights: Weights, stage: Stage, resources: Resources, largest: MicroBatch) -> Memory:
    """The peak of a step of a stage on `resources.for_stage`'s settings."""
    zero, workers = resources.train.zero_stage, resources.train.num_workers
    trained, frozen = FP32 * weights.trained, _frozen(weights, stage)
    parted = [workers if zero >= least else 1 for least in (1, 2, 3)]  # optimizer, gradients, weights
    optimizer = (3 if zero else 2) * trained / parted[0]
    gradients = trained / parted[1]
    held = (trained + frozen) / parted[2]
    live = min(LIVE / max(1, weights.trained + weights.frozen_decoder), 1 - 1 / workers) if zero == 3 else 0
    bucket = FP32 * (BUCKET if zero == 2 else min(BUCKET, weights.trained)) if workers > 1 else 0
    host = 0.0
    if resources.train.offload != "none":
        host, optimizer = optimizer + gradients, 0.0
        gradients = 0.0 if zero >= 2 else gradients
    if resources.train.offload == "parameters":
        host, held = host + held, 0.0
    held += live * (trained + frozen)
    whole = FP32 * weights.frozen_rest
    copies = BF16 * _trained_matrices(shapes, stage) if value_bytes(stage) == BF16 else 0
    kept = activations(shapes, stage, resources, largest)
    per_pass = resources.train.micro_batch_size * workers
    if stage.global_batch_size == per_pass and zero in (0, 1):
        # Of one micro-batch a step the gradients grow as the activations go.
        gradients = max(0.0, gradients - copies - kept)
    return Memory(
        weights=held + whole,
        gradients=gradients,
        optimizer=optimizer,
        copies=copies,
        activations=kept,
        buffers=bucket + max(0.0, tower_pass(shapes, stage, largest) - kept - copies),
        loading=trained + frozen + whole,
        host=host,
    )


def value_bytes(stage: Stage) -> int:
    """Of a number in the precision of a stage: activations, frozen weights, and features in the cache."""
    return BF16 if stage.precision == "bf16" else FP32


def _frozen(weights: Weights, stage: Stage) -> float:
    """Bytes of the language model's frozen weights."""
    if isinstance(stage.tuning, Lora) and stage.tuning.quantise and "language_model" in stage.trainable:
        return NF4 * weights.frozen_decoder
    return value_bytes(stage) * weights.frozen_decoder


def _trained_matrices(shapes: Shapes, stage: Stage) -> int:
    """Weights that autocast copies: of linear layers that train."""
    total = 0
    block = shapes.decoder
    if "language_model" in stage.trainable:
        match stage.tuning:
            case FullTuning():
                total += shapes.layers * numbers(block.matrices) + shapes.vocabulary * block.width
            case Lora(rank=rank):
                total += shapes.layers * rank * widths(block.matrices)
            case VisualExpert():
                total += shapes.layers * numbers((*block.qkv, *block.mlp))
    if "projector" in stage.trainable:
        total += sum(numbers(one.matrices) for one in shapes.projector_blocks) + numbers(shapes.projector)
    if "vision_tower" in stage.trainable:
        total += shapes.tower_layers * numbers(shapes.tower.matrices) + numbers([shapes.patch])
    return total


def activations(shapes: Shapes, stage: Stage, resources: Resources, largest: MicroBatch) -> float:
    """Bytes that the forward pass of a micro-batch keeps for its backward pass."""
    b = value_bytes(stage)
    tokens, block = largest.rows * largest.tokens, shapes.decoder
    tunes = "language_model" in stage.trainable
    full = tunes and isinstance(stage.tuning, FullTuning)
    dense = resources.train.attention == "sdpa" or (
        resources.train.attention == "auto" and not resources.train.gpus_per_worker
    )
    attention = _attention(block, b, repeated=dense) + (largest.tokens * b if dense else 0)
    layer = tokens * (_llama(block, b, trains=full) + attention)
    if tunes and not full:
        layer += tokens * _beside(stage.tuning, block, b)
    stream = FP32 if full or b == FP32 else BF16
    kept = shapes.layers * layer
    if resources.train.gradient_checkpointing:
        kept = shapes.layers * tokens * block.width * stream + layer
    return (
        kept
        + tokens * block.width * (16 if full else 8)
        + _projector_and_tower(shapes, stage, resources, largest, b)
        + _head(shapes, tokens, b, trains=full)
    )


def _llama(block: Block, b: int, *, trains: bool) -> float:
    """Of a token in a decoder layer, but for its attention; both norms keep a number too."""
    inner = block.mlp[0][1]
    if not trains:
        return 8 * block.width + 3 * inner * b + 8
    return 16 * block.width + (10 if b == BF16 else 8) * block.width + 4 * inner * b + 8


def _attention(block: Block, b: int, *, repeated: bool) -> float:
    """Of a token: q, k, v, output, and the logarithm of each head's sum."""
    keys = block.attention if repeated else block.key_value
    return 2 * (block.attention + keys) * b + FP32 * block.heads


def _beside(tuning: Lora | VisualExpert | FullTuning, block: Block, b: int) -> float:
    """Of a token in a frozen layer with adapters or an expert: what their weights' gradients read."""
    inputs = sum(inputs for inputs, _ in block.matrices)
    if not isinstance(tuning, Lora):
        return inputs * b
    ranks = tuning.rank * b * len(block.matrices)
    if tuning.dropout:
        return inputs * (b + 1) + ranks  # of each layer its own, and a byte of the mask
    return (inputs if b == BF16 else 2 * block.width + block.mlp[0][1]) * b + ranks  # in fp32 none is a cast


def _projector_and_tower(shapes: Shapes, stage: Stage, resources: Resources, largest: MicroBatch, b: int) -> float:
    kept = 0.0
    if "projector" in stage.trainable or "vision_tower" in stage.trainable:
        kept += largest.images * shapes.image_tokens * widths(shapes.projector) * b
        kept += largest.images * shapes.patches * sum(_vit(block, b) for block in shapes.projector_blocks)
    if "vision_tower" in stage.trainable:
        tokens = largest.images * shapes.tower_tokens
        layer = tokens * _vit(shapes.tower, b)
        layers = shapes.tower_layers * layer
        if resources.train.gradient_checkpointing:
            layers = shapes.tower_layers * tokens * shapes.tower.width * FP32 + layer
        kept += layers
    return kept


def _vit(block: Block, b: int) -> float:
    """Of a token in a tower's layer: norms' inputs in fp32, those of q, k, v and the MLP, its activation (CLIP's)."""
    return 16 * block.width + _attention(block, b, repeated=True) + 3 * block.mlp[0][1] * b + 16


def _head(shapes: Shapes, tokens: int, b: int, *, trains: bool) -> float:
    """The loss chunk by chunk: a chunk's logits in fp32 and in 16 bits, its inputs' gradients, the weight's in fp32."""
    width, vocabulary = shapes.decoder.width, shapes.vocabulary
    logits = min(tokens, chunk_tokens(width)) * vocabulary * (FP32 if b == FP32 else FP32 + b)
    return logits + tokens * width * 2 * b + trains * vocabulary * width * FP32


def tower_pass(shapes: Shapes, stage: Stage, largest: MicroBatch) -> float:
    """Bytes of a frozen tower's pass: it keeps the states of all its layers, in fp32, for a batch of the cache."""
    if not largest.images or "vision_tower" in stage.trainable:
        return 0.0
    tokens = BATCH * shapes.tower_tokens
    return FP32 * tokens * (shapes.tower.width * (shapes.tower_layers + 2) + 2 * shapes.tower.mlp[0][1])
