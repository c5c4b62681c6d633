"""FLOPs of training: the stated rule that MFU, hours and money go by.

A multiply-add is two FLOPs, and matrix products alone count: norms, softmax, rotary positions, the optimizer and the
look-up of embeddings do not. Only what the mathematics needs counts, not how a kernel goes about it:

- forward once; backward once for the gradient of a product's input, wherever a gradient has to pass it, and once for
  that of its weight, where that trains. A frozen language model in align costs two thirds of one that trains: it passes
  the gradient on to the projector. Nothing is passed below the lowest weight that trains.
- attention over the pairs that a query sees: T (T + 1) / 2 of a segment of T tokens, none across segments; all pairs in
  a tower. Its backward pass is twice its forward pass.
- the head at the positions that have a label, and nowhere else.
- a frozen tower forward only, and not at all where its features are cached; of its layers those up to the state that
  the projector reads (transformers runs the rest as well, for nothing).
- padding is no token. Recomputation by gradient checkpointing is no FLOP of the model (MFU), but one of the machine
  (HFU, hours): see `Flops`.

The usual rule, 6 N FLOPs a token for N parameters (Kaplan et al. 2020, arXiv:2001.08361), counts the embedding as a
product, the head at every position and weight gradients of everything, and no attention; PaLM's (Chowdhery et al. 2022,
arXiv:2204.02311, appendix B), 6 N + 12 L H Q T, adds attention over T keys for every query, twice what a causal mask
leaves. Neither knows a frozen part, a tower or a packed row.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from vila_ops.config import Stage
from vila_ops.config.train import FullTuning, Lora, VisualExpert
from vila_ops.plan.shapes import Shapes, numbers, widths


@dataclass(frozen=True)
class Load:
    """What of one or more rows costs FLOPs."""

    tokens: float
    """Image tokens included, padding not."""
    pairs: float
    """Of a query and a key that it sees: sum of T (T + 1) / 2 over the segments."""
    images: float
    targets: float
    """Positions with a label."""


@dataclass(frozen=True)
class Flops:
    """Of forward and backward passes."""

    forward: float
    backward: float
    recomputed: float
    """What gradient checkpointing runs forward a second time."""

    @property
    def model(self) -> float:
        """What the mathematics needs: MFU's."""
        return self.forward + self.backward

    @property
    def machine(self) -> float:
        """What a machine with gradient checkpointing does: HFU's."""
        return self.model + self.recomputed

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(self.forward + other.forward, self.backward + other.backward, self.recomputed + other.recomputed)


def training_flops(
    shapes: Shapes, stage: Stage, *, segments: Sequence[int], images: int, targets: int, features_cached: bool = False
) -> float:
    """Model FLOPs of forward and backward passes over one row, by the rule above.

    `segments` are the tokens of each sample in it, image tokens included, `images` its images, `targets` its
    positions with a label; `features_cached`: a frozen tower is not run.
    """
    load = Load(sum(segments), sum(length * (length + 1) / 2 for length in segments), images, targets)
    return flops(shapes, stage, load, features_cached=features_cached).model


def flops(shapes: Shapes, stage: Stage, load: Load, *, features_cached: bool = False) -> Flops:
    """Of rows that all have images, or all have none: without them nothing goes through tower and projector."""
    parts = stage.trainable if load.images else tuple(set(stage.trainable) & {"language_model"})
    tower_trains, projector_trains = "vision_tower" in parts, "projector" in parts
    tuning = stage.tuning if "language_model" in parts else None
    if isinstance(tuning, VisualExpert) and not load.images:
        tuning = None  # the expert is not run
    whole = isinstance(tuning, FullTuning)
    into_embeddings = whole or projector_trains or tower_trains
    decoder = _decoder(shapes, tuning, load, into_embeddings=into_embeddings)
    head = load.targets * numbers([(shapes.decoder.width, shapes.vocabulary)])
    passed = into_embeddings or tuning is not None
    return (
        decoder
        + _twice(Flops(head, head * (passed + whole), 0))
        + _projector(shapes, load.images, trains=projector_trains, passes=tower_trains)
        + _tower(shapes, load.images, trains=tower_trains, cached=features_cached and not tower_trains)
    )


def _decoder(
    shapes: Shapes, tuning: FullTuning | Lora | VisualExpert | None, load: Load, *, into_embeddings: bool
) -> Flops:
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
        return _twice(Flops(products + attention, 0, 0))
    passed = products if into_embeddings else products - first
    return _twice(Flops(products + attention, passed + trained + 2 * attention, products + attention))


def _projector(shapes: Shapes, images: float, *, trains: bool, passes: bool) -> Flops:
    """`passes`: the gradient goes on to the tower."""
    attention = images * shapes.patches**2 * sum(2 * block.attention for block in shapes.projector_blocks)
    in_blocks = images * shapes.patches * sum(numbers(block.matrices) for block in shapes.projector_blocks)
    after = images * shapes.image_tokens * numbers(shapes.projector)
    products = in_blocks + after
    if not trains and not passes:
        return _twice(Flops(products + attention, 0, 0))
    first = 0 if shapes.projector_norm else images * shapes.image_tokens * numbers(shapes.projector[:1])
    passed = products if passes else products - first
    return _twice(Flops(products + attention, passed + trains * products + 2 * attention, 0))


def _tower(shapes: Shapes, images: float, *, trains: bool, cached: bool) -> Flops:
    if cached:
        return Flops(0, 0, 0)
    layers, block = shapes.tower_layers, shapes.tower
    patches = images * shapes.patches * numbers([shapes.patch])
    products = images * layers * shapes.tower_tokens * numbers(block.matrices)
    attention = images * layers * shapes.tower_tokens**2 * 2 * block.attention
    forward = patches + products + attention
    if not trains:
        return _twice(Flops(forward, 0, 0))
    return _twice(Flops(forward, patches + 2 * products + 2 * attention, products + attention))


def _twice(multiply_adds: Flops) -> Flops:
    return Flops(2 * multiply_adds.forward, 2 * multiply_adds.backward, 2 * multiply_adds.recomputed)
