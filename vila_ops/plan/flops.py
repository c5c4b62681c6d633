"""FLOPs of training: the rule that MFU, hours and cost are computed from.

A multiply-add is two FLOPs. Only matrix products count: norms, softmax, rotary positions, the optimizer and embedding
look-ups do not. The rule counts the mathematics, not the work of a kernel:

- A product counts once in the forward pass. In the backward pass it counts once for the gradient of its input, if a
  gradient has to pass it, and once for the gradient of its weight, if that trains. A frozen language model in align
  costs two thirds of one that trains, as it passes the gradient to the projector. No gradient passes below the lowest
  weight that trains.
- Attention counts the pairs of a query and a key that it sees: T (T + 1) / 2 for a segment of T tokens, none across
  segments, and all pairs in a tower. Its backward pass is twice its forward pass.
- The head counts only at positions with a label.
- A frozen tower counts forward only, and not at all if its features are cached. Only its layers up to the state that
  the projector reads count (transformers runs the others too, without effect).
- Padding does not count. Recomputation by gradient checkpointing counts as FLOPs of the machine (HFU, hours), and not
  as FLOPs of the model (MFU): see `Flops`.

The usual rule, 6 N FLOPs per token for N parameters (Kaplan et al. 2020, arXiv:2001.08361), counts the embedding as a
product, the head at every position and all weight gradients, and no attention. PaLM's rule (Chowdhery et al. 2022,
arXiv:2204.02311, appendix B), 6 N + 12 L H Q T, adds attention over T keys for every query, twice as much as a causal
mask leaves. Neither rule knows frozen parts, towers or packed rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from vila_ops.config import Stage
from vila_ops.config.train import FullTuning, Lora, VisualExpert
from vila_ops.plan.shapes import Shapes, numbers, widths


@dataclass(frozen=True)
class Load:
    """The quantities of one or more rows that FLOPs depend on."""

    tokens: float
    """Number of tokens, with image tokens and without padding."""
    pairs: float
    """Pairs of a query and a key that it sees: the sum of T (T + 1) / 2 over segments of T tokens."""
    images: float
    targets: float
    """Number of positions with a label."""


@dataclass(frozen=True)
class Flops:
    """FLOPs, or multiply-adds, of forward and backward passes."""

    forward: float
    backward: float
    recomputed: float
    """The forward pass that gradient checkpointing repeats."""

    @property
    def model(self) -> float:
        """FLOPs of the model, for MFU."""
        return self.forward + self.backward

    @property
    def machine(self) -> float:
        """FLOPs of a machine with gradient checkpointing, for HFU and hours."""
        return self.model + self.recomputed

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(self.forward + other.forward, self.backward + other.backward, self.recomputed + other.recomputed)


def training_flops(
    shapes: Shapes, stage: Stage, *, segments: Sequence[int], images: int, targets: int, features_cached: bool = False
) -> float:
    """Return the model FLOPs of the forward and backward pass over one row, by the rule above.

    `segments` are the numbers of tokens of its samples, image tokens included. `targets` is the number of positions
    with a label. With `features_cached`, a frozen tower does not run.
    """
    load = Load(sum(segments), sum(length * (length + 1) / 2 for length in segments), images, targets)
    return flops(shapes, stage, load, features_cached=features_cached).model


def flops(shapes: Shapes, stage: Stage, load: Load, *, features_cached: bool = False) -> Flops:
    """Return the FLOPs of rows that all have images, or all have none. Rows without images skip tower and projector."""
    parts = stage.trainable if load.images else tuple(set(stage.trainable) & {"language_model"})
    tower_trains, projector_trains = "vision_tower" in parts, "projector" in parts
    tuning = stage.tuning if "language_model" in parts else None
    if isinstance(tuning, VisualExpert) and not load.images:
        tuning = None  # the expert does not run
    full = isinstance(tuning, FullTuning)
    into_embeddings = full or projector_trains or tower_trains
    decoder = _decoder(shapes, tuning, load, into_embeddings=into_embeddings)
    head = load.targets * numbers([(shapes.decoder.width, shapes.vocabulary)])
    passed = into_embeddings or tuning is not None
    return (
        decoder
        + _to_flops(Flops(head, head * (passed + full), 0))
        + _projector(shapes, load.images, trains=projector_trains, passes=tower_trains)
        + _tower(shapes, load.images, trains=tower_trains, cached=features_cached and not tower_trains)
    )


def _decoder(
    shapes: Shapes, tuning: FullTuning | Lora | VisualExpert | None, load: Load, *, into_embeddings: bool
) -> Flops:
    """FLOPs of the decoder's layers. With `into_embeddings`, the gradient passes all layers down to the embeddings."""
    block, layers = shapes.decoder, shapes.layers
    products = layers * load.tokens * numbers(block.matrices)
    first = load.tokens * numbers(block.qkv)
    trained = 0.0
    if isinstance(tuning, FullTuning):
        trained = products
    elif isinstance(tuning, Lora):
        trained = layers * load.tokens * tuning.rank * widths(block.matrices)
        products += trained
        first += load.tokens * tuning.rank * sum(inputs for inputs, _ in block.qkv)
    elif isinstance(tuning, VisualExpert):
        trained = layers * load.images * shapes.image_tokens * numbers((*block.qkv, *block.mlp))
    attention = layers * load.pairs * 2 * block.attention
    if not into_embeddings and tuning is None:
        return _to_flops(Flops(products + attention, 0, 0))
    passed = products if into_embeddings else products - first
    return _to_flops(Flops(products + attention, passed + trained + 2 * attention, products + attention))


def _projector(shapes: Shapes, images: float, *, trains: bool, passes: bool) -> Flops:
    """FLOPs of the projector. With `passes`, the gradient passes it to the tower."""
    attention = images * shapes.patches**2 * sum(2 * block.attention for block in shapes.projector_blocks)
    in_blocks = images * shapes.patches * sum(numbers(block.matrices) for block in shapes.projector_blocks)
    after = images * shapes.image_tokens * numbers(shapes.projector)
    products = in_blocks + after
    if not trains and not passes:
        return _to_flops(Flops(products + attention, 0, 0))
    first = 0 if shapes.projector_norm else images * shapes.image_tokens * numbers(shapes.projector[:1])
    passed = products if passes else products - first
    return _to_flops(Flops(products + attention, passed + trains * products + 2 * attention, 0))


def _tower(shapes: Shapes, images: float, *, trains: bool, cached: bool) -> Flops:
    """FLOPs of the tower; with `cached`, it does not run."""
    if cached:
        return Flops(0, 0, 0)
    layers, block = shapes.tower_layers, shapes.tower
    patches = images * shapes.patches * numbers([shapes.patch])
    products = images * layers * shapes.tower_tokens * numbers(block.matrices)
    attention = images * layers * shapes.tower_tokens**2 * 2 * block.attention
    forward = patches + products + attention
    if not trains:
        return _to_flops(Flops(forward, 0, 0))
    return _to_flops(Flops(forward, patches + 2 * products + 2 * attention, products + attention))


def _to_flops(multiply_adds: Flops) -> Flops:
    """Two FLOPs per multiply-add."""
    return Flops(2 * multiply_adds.forward, 2 * multiply_adds.backward, 2 * multiply_adds.recomputed)
