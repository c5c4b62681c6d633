"""A projector's last layer as the solution of a ridge regression, against NumPy's least squares."""

from typing import Any

import numpy as np
import pytest
import torch

from tests.model.test_projectors import CHANNELS, DIM, KINDS, projector
from vila_ops.model.projectors.least_squares import RIDGE, LeastSquares

IMAGES, PATCHES = 40, 16


def pairs() -> tuple[torch.Tensor, torch.Tensor]:
    """Features of images, and targets that follow from them but for noise."""
    draw = torch.Generator().manual_seed(3)
    features = torch.randn(IMAGES, PATCHES, CHANNELS, generator=draw) * torch.linspace(1, 5, CHANNELS) + 2
    mixing = torch.randn(CHANNELS, DIM, generator=draw)
    return features, features.mean(1) @ mixing + torch.randn(IMAGES, DIM, generator=draw) + 1


@pytest.mark.parametrize("choice", KINDS, ids=str)
def test_the_last_layer_solves_the_regression_that_numpy_solves(choice: dict[str, Any]) -> None:
    built, (features, targets) = projector(choice), pairs()
    last = [module for module in built.modules() if isinstance(module, torch.nn.Linear)][-1]
    seen: list[torch.Tensor] = []
    hook = last.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    with torch.no_grad():
        built(features)
    hook.remove()
    inputs = seen[0].flatten(0, 1).double().numpy()
    repeated = targets.double().numpy().repeat(seen[0].shape[1], axis=0)
    centred = inputs - inputs.mean(0)
    penalty = np.sqrt(RIDGE * (centred**2).mean() * len(inputs))
    rows = np.concatenate([centred, penalty * np.eye(inputs.shape[1])])
    wanted = np.concatenate([repeated - repeated.mean(0), np.zeros((inputs.shape[1], DIM))])
    guess = centred @ np.linalg.lstsq(rows, wanted)[0]

    squares = LeastSquares(built)
    squares.add(features[:7], targets[:7])
    squares.add(features[7:], targets[7:])
    squares.fit(0.04)
    with torch.no_grad():
        out = built(features).flatten(0, 1).double().numpy()
    assert out - out.mean(0) == pytest.approx(guess * 0.04 / np.sqrt((guess**2).mean()), abs=1e-4)
    assert out.mean(0) == pytest.approx(targets.double().numpy().mean(0), abs=1e-4)


def test_without_an_image_there_is_nothing_to_fit() -> None:
    with pytest.raises(ValueError, match="no image was added"):
        LeastSquares(projector({"kind": "linear"})).fit(0.04)


@pytest.mark.parametrize("alike", ["images", "words"])
def test_images_or_words_that_are_all_alike_are_refused(alike: str) -> None:
    features, targets = pairs()
    squares = LeastSquares(projector({"kind": "linear"}))
    if alike == "images":
        squares.add(features[:1, :1].expand(IMAGES, PATCHES, -1), targets)
    else:
        squares.add(features, targets[:1].expand(IMAGES, -1))
    with pytest.raises(ValueError, match=r"are all alike.*projector_fit: scale"):
        squares.fit(0.04)
