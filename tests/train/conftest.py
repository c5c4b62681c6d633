"""A prepared dataset and an assembled model to train on, built once per session."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from vila_ops.artifacts.kinds import Dataset, Pretrained
from vila_ops.config import Mixture, Model, Resources
from vila_ops.data.preprocess.prepare import prepare
from vila_ops.model.assemble import assemble

SPLIT = {"salt": "tiny", "validation": 0.2, "test": 0.2}


@dataclass(frozen=True)
class Bench:
    """The inputs of a stage."""

    model: Model
    mixture: Mixture
    data: Dataset
    init: Pretrained
    resources: Resources


@pytest.fixture(scope="session")
def bench(
    make_model: Any, make_mixture: Any, make_text: Any, make_resources: Any, tmp_path_factory: pytest.TempPathFactory
) -> Bench:
    """A dataset of captions and of text without images, so that some rows have no image."""
    root: Path = tmp_path_factory.mktemp("bench")
    resources = make_resources(root)
    model = make_model("clip", "mlp_downsample")
    mixture = make_mixture("pairs", "documents", "definitions", split=SPLIT, long_documents="split")
    data = prepare(mixture, make_text(projector="mlp_downsample"), resources)
    return Bench(model, mixture, data, assemble(model, resources), resources)
