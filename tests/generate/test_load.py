import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from vila_ops.artifacts.kinds import Pretrained
from vila_ops.artifacts.store import content
from vila_ops.config import Model, Resources
from vila_ops.config.engine import AutoEngine, TorchEngine, VllmEngine
from vila_ops.generate.engine import EngineOptions, generate_all, score_all
from vila_ops.generate.load import chosen, load_engine, open_folder
from vila_ops.generate.request import Prompt, Sampling
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


def test_a_model_whose_tokenizer_has_no_bos_token_answers_and_scores(
    make_model: Callable[..., Model], make_resources: Callable[..., Resources], tiny: Path, tmp_path: Path
) -> None:
    """As Qwen2.5's: its tokenizer_config.json has `"bos_token": null`."""
    folder = tmp_path / "tokenizer"
    shutil.copytree(tiny / "tokenizer", folder)
    stated = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**stated, "bos_token": None}))
    language_model = {"kind": "random", "tokenizer": str(folder)}
    sealed = assemble(make_model(language_model=language_model), make_resources(tmp_path))
    generation = json.loads((content(sealed) / "generation_config.json").read_text())
    assert generation.get("bos_token_id") is None
    engine = load_engine(sealed, TorchEngine(), EngineOptions(tmp_path))
    tokenizer = engine.tokenizer

    (answer,) = generate_all(engine, [Prompt(tokenizer.prompt([("user", ("Dog?",))]))], Sampling(3, frozenset()))
    assert len(answer.ids) == 3
    text = tokenizer.text_ids("A dog.")
    ((scored,),) = score_all(engine, [(Prompt(tokenizer.context), [text])])
    assert scored.tokens == len(text)


def test_a_missing_or_broken_vllm_is_told_with_the_way_out_and_passed_over_by_auto(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, options = Pretrained(uri=str(tmp_path), digest="d"), EngineOptions(tmp_path)
    missing = (None, "is not installed in")
    for there, fault in (missing, (object(), r"cannot be imported \(ModuleNotFoundError\('import of vllm halted")):
        monkeypatch.setattr("vila_ops.generate.load.find_spec", lambda _, there=there: there)
        monkeypatch.setitem(sys.modules, "vllm", None)
        monkeypatch.delitem(sys.modules, "vila_ops.generate.vllm", raising=False)
        with pytest.raises(ValueError, match=rf"{fault}.*docs/serving\.md says how .* engine to torch"):
            open_folder(tmp_path, VllmEngine(), options)
        assert chosen(model, AutoEngine(), options) == TorchEngine()


def test_a_vllm_beside_another_torchvision_is_passed_over_by_auto(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its import then raises no ImportError."""
    (tmp_path / "vllm.py").write_text('raise RuntimeError("operator torchvision::nms does not exist")')
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "vllm", raising=False)
    monkeypatch.delitem(sys.modules, "vila_ops.generate.vllm", raising=False)
    options = EngineOptions(tmp_path)
    with pytest.raises(
        ValueError, match=r"cannot be imported \(RuntimeError\('operator torchvision::nms does not exist"
    ):
        open_folder(tmp_path, VllmEngine(), options)
    assert chosen(Pretrained(uri=str(tmp_path), digest="d"), AutoEngine(), options) == TorchEngine()
