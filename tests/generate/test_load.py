from collections.abc import Callable
from pathlib import Path

import pytest

from vila_ops.config import Model, Resources
from vila_ops.config.engine import TorchEngine
from vila_ops.generate.engine import EngineOptions
from vila_ops.generate.load import load_engine
from vila_ops.model.assemble import assemble


@pytest.mark.parametrize("after_image", ["", "\n"])
@pytest.mark.parametrize("projector", ["mlp_gelu", "mlp_downsample"])
def test_a_folder_carries_how_text_and_images_are_written(
    make_model: Callable[..., Model],
    make_resources: Callable[..., Resources],
    tmp_path: Path,
    projector: str,
    after_image: str,
) -> None:
    model = make_model(projector=projector, after_image=after_image, chat_template="plain")
    sealed = assemble(model, make_resources(tmp_path))
    tokenizer = load_engine(sealed, TorchEngine(), EngineOptions(tmp_path)).tokenizer
    assert tokenizer.image == [tokenizer.image_id] * model.image_tokens() + tokenizer.text_ids(after_image)
    assert tokenizer.prompt([("user", ("Dog?",))]) == tokenizer.bos  # plain leaves questions out
