"""A prepared dataset and an assembled model to train on, built once per session, and a stage that is killed."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.forks import Fork
from vila_ops.artifacts.kinds import Dataset, Pretrained
from vila_ops.config import Mixture, Model, Resources
from vila_ops.data.preprocess.prepare import prepare
from vila_ops.model.assemble import assemble
from vila_ops.train import verify_resume
from vila_ops.train.job import StageInputs

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


@pytest.fixture(scope="session")
def train_and_kill() -> Callable[..., None]:
    """Trains a stage in a process, and kills it some seconds (`moment`) after a condition is true."""

    def run(inputs: StageInputs, folder: Path, *, when: Callable[[], bool], moment: float = 0.0) -> None:
        file = folder / "inputs.json"
        file.write_text(inputs.model_dump_json())
        with Fork(verify_resume.__file__, file) as process:
            while not when():
                assert process.poll() is None, "it ended before it was killed"
                time.sleep(0.01)
            time.sleep(moment)

    return run
