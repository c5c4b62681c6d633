"""Two versions of a registered model with random weights, an image, and a deploying process."""

import io
import subprocess
import sys
import tempfile
from collections.abc import Callable

import pytest
from PIL import Image as Pillow

from vila_ops.artifacts.kinds import Checkpoint, ModelVersion
from vila_ops.config import Config, Model, Resources
from vila_ops.model.assemble import assemble


@pytest.fixture(scope="session")
def versions(
    make_model: Callable[..., Model],
    make_resources: Callable[..., Resources],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[ModelVersion, ModelVersion]:
    """Two versions that differ in their weights."""
    resources = make_resources(tmp_path_factory.mktemp("sealed"))

    def version(number: int) -> ModelVersion:
        sealed = assemble(make_model(seed=number), resources)
        checkpoint = Checkpoint(uri=sealed.uri, digest=sealed.digest, parents=sealed.parents, stage="sft", step=number)
        return ModelVersion(name="tiny-vila", version=number, checkpoint=checkpoint, promoted=True)

    return version(1), version(2)


@pytest.fixture(scope="session")
def image() -> bytes:
    """A small PNG."""
    out = io.BytesIO()
    Pillow.linear_gradient("L").resize((40, 30)).convert("RGB").save(out, "PNG")
    return out.getvalue()


@pytest.fixture(scope="session")
def deploy_elsewhere() -> Callable[..., str]:
    """A function that deploys (service, version, resources) in a process that has ended when it returns the URL."""

    def run(*arguments: Config) -> str:
        code = (
            "import sys; from vila_ops.config import *; from vila_ops.artifacts.kinds import *;"
            "from vila_ops.serve.deploy import deploy;"
            "assert not {'torch', 'ray', 'transformers', 'fastapi', 'mlflow'} & set(sys.modules);"
            "s, v, r = (k.model_validate_json(t) for k, t in zip((Service, ModelVersion, Resources), sys.argv[1:]));"
            "open(sys.argv[4], 'w').write(deploy(s, v, r).url)"
        )
        with tempfile.NamedTemporaryFile("r") as out:
            command = [sys.executable, "-c", code, *(value.model_dump_json() for value in arguments), out.name]
            subprocess.run(command, check=True)
            return out.read()

    return run
