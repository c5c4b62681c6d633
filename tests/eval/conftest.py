"""The tiny recipe in a store of each test module, and its untrained model."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.eval.stub_endpoint import Server, serving
from vila_ops.artifacts.kinds import Pretrained
from vila_ops.config import Run, load
from vila_ops.eval import endpoint_target
from vila_ops.model.assemble import assemble

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The tiny recipe, inline."""
    folder = tmp_path_factory.mktemp("evaluation")
    where = (f"resources.storage.store={folder}/store", f"resources.storage.cache={folder}/cache")
    return load(ROOT / "configs/recipes/tiny.yaml", resources=ROOT / "configs/resources/inline.yaml", overrides=where)


@pytest.fixture(scope="module")
def model(run: Run) -> Pretrained:
    """The model before its first stage."""
    return assemble(run.recipe.model, run.resources)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A stub endpoint; what asks it again does not wait."""
    monkeypatch.setattr(endpoint_target, "FIRST_WAIT_SECONDS", 0.001)
    with serving() as server:
        yield server
