"""What is refused before a stage or an evaluation works: devices that are not there, samples beyond the context."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner

from tests.model.test_language_models import hub
from tests.model.test_language_models import write as write_language_model
from vila_ops.cli import app
from vila_ops.config import Resources, load
from vila_ops.device import device_of, precision_notes
from vila_ops.eval.evaluate import evaluate
from vila_ops.model.assemble import assemble
from vila_ops.train.stage import train_stage

ROOT = Path(__file__).parents[2]
NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")


def entries(resources: Resources) -> set[str]:
    """What the store holds besides its leases."""
    store = Path(resources.storage.store)
    return {str(path) for path in store.rglob("*") if path.relative_to(store).parts[0] != "leases"}


def test_samples_beyond_the_context_are_refused_before_training(
    bench: Any, make_model: Any, make_stage: Any, tmp_path: Path
) -> None:
    write_language_model(tmp_path / "words", "llama", max_position_embeddings=32)
    model = make_model("clip", "mlp_downsample", language_model=hub(tmp_path / "words"))
    init = assemble(model, bench.resources)
    before = entries(bench.resources)
    with pytest.raises(ValueError, match=r"has a sample of \d+ tokens, but .* has 32 positions; set max_tokens"):
        train_stage(make_stage(bench.mixture), model, bench.data, init, bench.resources)
    assert entries(bench.resources) == before


@NO_GPU
def test_a_gpu_that_is_not_there_is_refused_before_a_stage_works(bench: Any, make_stage: Any) -> None:
    before = entries(bench.resources)
    with pytest.raises(ValueError, match=r"device is cuda, but torch .* of this process .*; or set device to cpu"):
        train_stage(
            make_stage(bench.mixture), bench.model, bench.data, bench.init,
            bench.resources.with_changes({"device": "cuda"}),
        )  # fmt: skip
    assert entries(bench.resources) == before


@NO_GPU
def test_a_gpu_that_is_not_there_is_refused_before_an_evaluation_works(
    bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    recipe, resources = (Path(f"configs/{name}.yaml") for name in ("recipes/tiny", "resources/inline"))
    suite = load(recipe, resources=resources).recipe.stage_suite
    before = entries(bench.resources)
    with pytest.raises(ValueError, match=r"device is rocm, but torch .* of this process"):
        evaluate(suite, bench.init, bench.data, bench.resources.with_changes({"device": "rocm"}))
    assert entries(bench.resources) == before


@pytest.mark.slow
@NO_GPU
def test_doctor_names_a_missing_gpu_and_show_and_plan_need_none(
    tmp_path: Path, free_servers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    places = {name: str(tmp_path / name) for name in ("store", "cache", "data")}
    settings = {"launch": "inline", "storage": places, "device": "cuda"}
    (tmp_path / "gpu.yaml").write_text(yaml.safe_dump(settings))
    (tmp_path / "servers.yaml").write_text(yaml.safe_dump(free_servers(tmp_path).model_dump(mode="json")))
    files = ["-r", str(tmp_path / "gpu.yaml")]
    told = CliRunner().invoke(app, ["doctor", *files, "--servers", str(tmp_path / "servers.yaml"), "--json"])
    bad = [one["text"] for one in json.loads(told.stdout) if not one["ok"]]
    assert told.exit_code == 1
    assert any(text.startswith("device: device is cuda, but torch") for text in bad)
    for command in (["show"], ["plan", "--lengths", "configs/lengths/vila.yaml"]):
        recipe = "configs/recipes/vila-7b.yaml" if "plan" in command else "configs/recipes/tiny.yaml"
        done = CliRunner().invoke(app, [command[0], recipe, *files, *command[1:]])
        assert done.exit_code == 0


def test_the_cpu_is_a_device_everywhere() -> None:
    assert device_of("cpu") == torch.device("cpu")


def test_bf16_is_noted_where_the_cpu_has_no_instructions_for_it() -> None:
    """oneDNN multiplies bf16 from AVX-512 (BW, VL, DQ) on; see its page "CPU Dispatcher Control"."""
    cpuinfo = Path("/proc/cpuinfo").read_text()
    if "avx2" not in cpuinfo:
        pytest.skip("not an x86 CPU that says what it has")
    has = all(f" {flag} " in cpuinfo for flag in ("avx512bw", "avx512vl", "avx512dq"))
    notes = precision_notes("bf16", torch.device("cpu"))
    assert len(notes) == (0 if has else 1)
    assert precision_notes("fp32", torch.device("cpu")) == []
