"""A fresh projector is fitted to the words after the images of its first stage."""

from pathlib import Path
from typing import Any

import torch

from vila_ops.config import NO_CONTEXT, Stage
from vila_ops.data.loading.packing import images_of, pack
from vila_ops.data.shards import Sample
from vila_ops.train.job import TrainJob
from vila_ops.train.loop import load
from vila_ops.train.projector_fit import words_after_images

IMAGE = 9


def sample(ids: list[int], targets: list[int], *, images: int) -> Sample:
    """A sample of two placeholders for each image; tokens of `targets` are to be predicted."""
    is_target = [token in targets for token in ids]
    return Sample("id", "source", "", "", "", "", "", ids, is_target, (b"image",) * images)


def test_an_image_is_followed_by_the_targets_up_to_the_next_image_of_its_sample() -> None:
    row = pack(
        [
            sample([1, IMAGE, IMAGE, 20, 21, 2], [20, 21, 2], images=1),
            sample([1, 30, 31], [30, 31], images=0),
            sample([1, 40, IMAGE, IMAGE, 41, IMAGE, IMAGE, 42, 43], [40, 41, 43], images=2),
            sample([1, 50, IMAGE, IMAGE], [50], images=1),
        ],
        capacity=40,
    )
    assert [words.tolist() for words in words_after_images(row, image_id=IMAGE)] == [[20, 21, 2], [41], [43], []]


def closeness(bench: Any, stage: Stage, root: Path) -> tuple[float, float]:
    """How alike image tokens and embeddings of the words after them are: of the same image, and of the next one."""
    job = TrainJob(
        stage=stage,
        data=bench.data,
        init=bench.init,
        resources=bench.resources,
        context=NO_CONTEXT,
        attempt=str(root),
        resume=str(root),
        run_id=None,
        fresh_projector=True,
    )
    model, row_loader, batch_builder = load(job)
    rows, _ = row_loader.batch(0)
    words = [one for row in rows for one in words_after_images(row, image_id=model.config.image_token_index)]
    with torch.no_grad():
        embeddings = model.get_input_embeddings().weight
        wanted = torch.stack([embeddings[one].mean(0) for one in words])
        tokens = model.model.multi_modal_projector(batch_builder.feature_cache(images_of(rows))).mean(1)
        alike = torch.cosine_similarity((tokens - tokens.mean(0))[:, None], (wanted - wanted.mean(0))[None], dim=-1)
    return float(alike.diagonal().mean()), float(alike.roll(1, dims=1).diagonal().mean())


def test_least_squares_bring_an_image_to_its_own_words_and_a_drawn_projector_does_not(
    bench: Any, make_stage: Any, tmp_path: Path
) -> None:
    own, other = closeness(bench, make_stage(bench.mixture, projector_fit="least_squares"), tmp_path)
    assert own > 0.5 > 0.2 > other
    own, other = closeness(bench, make_stage(bench.mixture), tmp_path)
    assert abs(own) < 0.2
