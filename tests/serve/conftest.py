"""Two versions of one registered model, of random weights, sealed once; and a picture."""

import io
from collections.abc import Callable

import pytest
from PIL import Image as Pillow

from vila_ops.artifacts.kinds import Checkpoint, ModelVersion
from vila_ops.config import Model, Resources
from vila_ops.model.assemble import assemble


@pytest.fixture(scope="session")
def versions(
    make_model: Callable[..., Model],
    make_resources: Callable[..., Resources],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[ModelVersion, ModelVersion]:
    """They differ in their weights."""
    resources = make_resources(tmp_path_factory.mktemp("sealed"))

    def version(number: int) -> ModelVersion:
        sealed = assemble(make_model(seed=number), resources)
        checkpoint = Checkpoint(uri=sealed.uri, digest=sealed.digest, parents=sealed.parents, stage="sft", step=number)
        return ModelVersion(name="tiny-vila", version=number, checkpoint=checkpoint, promoted=True)

    return version(1), version(2)


@pytest.fixture(scope="session")
def picture() -> bytes:
    """A small PNG."""
    out = io.BytesIO()
    Pillow.linear_gradient("L").resize((40, 30)).convert("RGB").save(out, "PNG")
    return out.getvalue()
