"""The first weights of a fresh projector, from data of its first stage."""

# I images, D language model dim

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from vila_ops.data.loading.loader import RowLoader
from vila_ops.data.loading.packing import PackedRow, images_of
from vila_ops.model.build import embedding_std
from vila_ops.model.projectors.initialise import fit_to
from vila_ops.model.projectors.least_squares import LeastSquares
from vila_ops.model.vila import VilaForConditionalGeneration
from vila_ops.train.batch_builder import BatchBuilder

MAX_IMAGES = 4096
"""To which a projector is fitted by least squares."""


def fit_projector(
    model: VilaForConditionalGeneration,
    row_loader: RowLoader,
    batch_builder: BatchBuilder,
    *,
    alive: Callable[[], None],
) -> None:
    """Fit a fresh projector in place to the first rows of its stage, as its `projector_fit` says.

    Every rank fits it to the same rows. `alive` is called after each step's rows.
    """
    projector, std = model.model.multi_modal_projector, embedding_std(model)
    rows, _ = row_loader.batch(0)
    if images := images_of(rows):
        fit_to(projector, batch_builder.feature_cache(images).cpu(), std)
    if row_loader.stage.projector_fit == "scale":
        return
    squares, count = LeastSquares(projector), 0
    embeddings = model.get_input_embeddings().weight.detach()
    for step in range(row_loader.num_steps()):
        if step:
            rows, _ = row_loader.batch(step)
        followed = [words for row in rows for words in words_after_images(row, image_id=model.config.image_token_index)]
        pairs = [(image, words) for image, words in zip(images_of(rows), followed, strict=True) if len(words)]
        if pairs:
            targets = torch.stack([embeddings[words].mean(0) for _, words in pairs])
            squares.add(batch_builder.feature_cache([image for image, _ in pairs]).cpu(), targets)
        count += len(pairs)
        alive()
        if count >= MAX_IMAGES:
            break
    if count:
        squares.fit(2 * std)


def words_after_images(row: PackedRow, *, image_id: int) -> list[Tensor]:
    """For each image of a row the target tokens of its sample after it and before the next image; none of some."""
    words = []
    for segment, number in enumerate(row.num_images, start=1):
        (inside,) = (row.segment_ids == segment).nonzero()
        (placeholders,) = (row.input_ids[inside] == image_id).nonzero()
        starts = [*placeholders.reshape(number, -1)[:, 0].tolist(), len(inside)] if number else []
        for begin, end in itertools.pairwise(starts):
            labels = row.labels[inside[begin:end]]
            words.append(torch.from_numpy(labels[labels >= 0]))
    return words
