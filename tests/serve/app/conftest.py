"""The tiny model, loaded once."""

import pytest

from tests.serve.app.live import ScriptedEngine
from vila_ops.artifacts.kinds import ModelVersion
from vila_ops.artifacts.store import content
from vila_ops.config.engine import TorchEngine
from vila_ops.generate.engine import Engine, EngineOptions
from vila_ops.generate.load import open_folder


@pytest.fixture(scope="session")
def real_engine(versions: tuple[ModelVersion, ModelVersion], tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """The engine of the first version."""
    options = EngineOptions(tmp_path_factory.mktemp("features"), device="cpu", max_batch=4)
    return open_folder(content(versions[0].checkpoint), TorchEngine(), options)


@pytest.fixture
def scripted(real_engine: Engine) -> ScriptedEngine:
    """An engine whose answers the test writes."""
    return ScriptedEngine(real_engine)


@pytest.fixture(scope="module")
def module_scripted(real_engine: Engine) -> ScriptedEngine:
    """As `scripted`, for the tests of a module together."""
    return ScriptedEngine(real_engine)
