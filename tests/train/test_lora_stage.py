"""LoRA through the real task: killed and resumed, with several workers, merged, and as an adapter for stock PEFT."""

import json
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.forks import ranks
from tests.seed import SEED
from tests.train.closeness import ROUNDING, apart, way
from vila_ops.artifacts.kinds import Checkpoint
from vila_ops.artifacts.store import content
from vila_ops.config import NO_CONTEXT, Stage
from vila_ops.data.preprocess.prepare import prepare
from vila_ops.model import folder as model_folder
from vila_ops.model import lora
from vila_ops.model.assemble import assemble
from vila_ops.model.trainable import set_trainable
from vila_ops.model.vila import VilaForConditionalGeneration
from vila_ops.train.engine import build_engine
from vila_ops.train.job import StageInputs, TrainJob
from vila_ops.train.loop import load
from vila_ops.train.objective import Objective
from vila_ops.train.optim import parameter_groups
from vila_ops.train.stage import train_stage

LORA = {"kind": "lora", "rank": 4, "alpha": 8, "dropout": 0.3}
STOCK = """
import json, sys
import numpy as np, torch
from peft import PeftModel
from transformers import LlavaForConditionalGeneration
torch.set_num_threads(1)
ids = torch.tensor([[1, 40, *[3] * 16, 41, 2], [1, *[3] * 16, 7, 8, 2]])
values = torch.rand(2, 3, 56, 56, generator=torch.Generator().manual_seed(0))
def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=ids, pixel_values=values).logits.numpy()
for init, trained, out in json.loads(sys.argv[1]):
    base = LlavaForConditionalGeneration.from_pretrained(init, dtype=torch.float32)
    logits_by_model = {"base": logits(base), "adapter": logits(PeftModel.from_pretrained(base, trained + "/adapter"))}
    logits_by_model["merged"] = logits(LlavaForConditionalGeneration.from_pretrained(trained, dtype=torch.float32))
    np.savez(out, **logits_by_model)
assert "vila_ops" not in sys.modules
"""
STOCK_PROJECTORS: dict[str, tuple[str, ...]] = {
    "mlp_gelu": ("projector", "language_model"),
    "linear": ("vision_tower", "projector", "language_model"),
}
"""Projectors that stock LLaVA has, and what trains with each."""

Train = Callable[..., Checkpoint]


@pytest.fixture(scope="module")
def plain(
    bench: Any, make_model: Any, make_text: Any, make_resources: Any, tmp_path_factory: pytest.TempPathFactory
) -> Any:
    """The inputs of `bench`, with a projector that stock LLaVA has."""
    model = make_model("clip", "mlp_gelu")
    resources = make_resources(tmp_path_factory.mktemp("plain"))
    data = prepare(bench.mixture, make_text(projector="mlp_gelu"), resources)
    return replace(bench, model=model, data=data, init=assemble(model, resources), resources=resources)


@pytest.fixture(scope="module")
def stage(bench: Any, make_stage: Any) -> Callable[..., Stage]:
    def make(tuning: dict[str, Any] = LORA, **more: Any) -> Stage:
        given = {
            "trainable": ["projector", "language_model"],
            "num_steps": 24,
            "save_every": 2,
            "tuning": tuning,
            "learning_rate": 1e-2,
        }
        made: Stage = make_stage(bench.mixture, **{**given, **more})
        return made

    return make


@pytest.fixture(scope="module")
def train(plain: Any, tmp_path_factory: pytest.TempPathFactory) -> Train:
    """Trains a stage by the task, in a separate store."""

    def run(stage: Stage, *, bench: Any = plain, init: Any = None, **more: Any) -> Checkpoint:
        store = str(tmp_path_factory.mktemp("store"))
        resources = bench.resources.with_changes({"storage.store": store, **more})
        return train_stage(stage, bench.model, bench.data, init or bench.init, resources)

    return run


@pytest.fixture(scope="module")
def unbroken(train: Train, stage: Callable[..., Stage]) -> Checkpoint:
    return train(stage())


def values(folder: Path, key: str = "loss") -> list[float]:
    return [float.fromhex(row[key]) for row in json.loads((folder / "curve.json").read_text()) if key in row]


@pytest.fixture(scope="module")
def stock_logits(
    plain: Any, stage: Any, train: Train, make_model: Any, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """Logits of stock transformers and PEFT by projector, computed in one process that has none of our code."""
    folder, cases = tmp_path_factory.mktemp("stock"), []
    for projector, parts in STOCK_PROJECTORS.items():
        model = make_model("clip", projector)
        given = replace(plain, model=model, init=assemble(model, plain.resources))
        made = train(stage(trainable=parts, num_steps=4), bench=given)
        cases.append([str(content(given.init)), str(content(made)), str(folder / f"{projector}.npz")])
    subprocess.run([sys.executable, "-c", STOCK, json.dumps(cases)], check=True, cwd=folder)
    return {projector: np.load(folder / f"{projector}.npz") for projector in STOCK_PROJECTORS}


@pytest.mark.slow
def test_only_the_language_model_s_linear_layers_and_the_projector_change(plain: Any, unbroken: Checkpoint) -> None:
    assert values(content(unbroken), "validation_loss")[-1] < values(content(unbroken), "validation_loss")[0] - 0.03
    before, after = (load_file(content(made) / "model.safetensors") for made in (plain.init, unbroken))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        adapted = "language_model" in name and name.endswith("_proj.weight")
        assert torch.equal(tensor, after[name]) != (adapted or "multi_modal_projector" in name), name


@pytest.mark.slow
@pytest.mark.parametrize("projector", STOCK_PROJECTORS)
def test_stock_peft_makes_the_merged_model_of_the_first_one_and_the_adapter(
    projector: str, stock_logits: dict[str, Any]
) -> None:
    logits = stock_logits[projector]
    assert np.abs(logits["merged"] - logits["base"]).max() > 1e-2
    assert np.abs(logits["merged"] - logits["adapter"]).max() < 1e-5


def test_unmerge_takes_a_checkpoint_back_to_the_language_model_that_it_started_from(
    plain: Any, unbroken: Checkpoint
) -> None:
    before, after = (load_file(content(made) / "model.safetensors") for made in (plain.init, unbroken))
    back = lora.unmerge(after, lora.read(content(unbroken) / "adapter"))
    changed = [name for name in before if "language_model" in name and not torch.equal(before[name], after[name])]
    assert len(changed) == 14
    assert all(float((back[name] - before[name]).abs().max()) < 1e-6 for name in before if "language_model" in name)


@pytest.mark.slow
def test_a_later_stage_does_not_carry_the_adapter_along(
    unbroken: Checkpoint, train: Train, stage: Callable[..., Stage]
) -> None:
    full = train(stage({"kind": "full"}, num_steps=1), init=unbroken)
    assert not (content(full) / "adapter").exists()
    own = train(stage({**LORA, "rank": 2}, num_steps=1), init=unbroken)
    assert lora.read(content(own) / "adapter").tuning.rank == 2


@pytest.mark.slow
def test_killed_and_started_again_gives_the_same_bytes_with_dropout(
    plain: Any, stage: Callable[..., Stage], unbroken: Checkpoint, tmp_path: Path, train_and_kill: Any
) -> None:
    resources = plain.resources.with_changes({"storage.store": str(tmp_path / "store")})
    inputs = StageInputs(stage=stage(), model=plain.model, data=plain.data, init=plain.init, resources=resources)
    at = random.Random(SEED).choice((2, 4, 6, 8, 10))
    train_and_kill(inputs, tmp_path, when=lambda: any(tmp_path.glob(f"store/resume/*/step-{at:06d}")))
    assert not list(tmp_path.glob("store/checkpoint/*/manifest.json")), "it was sealed before it was killed"
    resumed = train_stage(stage(), plain.model, plain.data, plain.init, resources)
    assert resumed.digest == unbroken.digest, f"killed after step {at}"


@pytest.mark.slow
def test_dropout_acts_in_training_and_not_in_validation_nor_by_micro_batch(
    train: Train, stage: Callable[..., Stage], unbroken: Checkpoint
) -> None:
    without = content(train(stage({**LORA, "dropout": 0.0})))
    curve, plain_curve = values(content(unbroken)), values(without)
    assert curve[0] == plain_curve[0]  # B is 0 at first, so what A reads does not matter
    assert all(one != other for one, other in zip(curve[2:], plain_curve[2:], strict=True))
    first, last = (values(folder, "validation_loss") for folder in (content(unbroken), without))
    assert first[0] == last[0]
    together = content(train(stage(), **{"train.micro_batch_size": 2}))
    assert values(together) == pytest.approx(curve, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("zero_stage", "quantise"), [(2, None), (3, None), (3, "nf4")])
def test_two_workers_walk_the_curve_of_one_dropout_included(
    zero_stage: int, quantise: str | None, plain: Any, stage: Callable[..., Stage], train: Train, tmp_path: Path
) -> None:
    if quantise:
        pytest.importorskip("bitsandbytes", reason="QLoRA needs bitsandbytes (extra qlora)")
    short = stage({**LORA, "quantise": quantise}, num_steps=4)
    alone = content(train(short))
    two = {"num_workers": 2, "zero_stage": zero_stage, "gradient_checkpointing": zero_stage == 3}
    on_ray = {"launch": "ray", "ray_address": "127.0.0.1:1", **{f"train.{key}": value for key, value in two.items()}}
    job = _job(plain, short, tmp_path, **on_ray)
    (tmp_path / "job.json").write_text(job.model_dump_json())
    with ranks(Path(__file__).parent / "one_rank.py", tmp_path / "job.json") as both:
        assert [rank.wait() for rank in both] == [0, 0]
    for key in ("loss", "validation_loss"):
        assert values(Path(job.attempt), key) == pytest.approx(values(alone, key), rel=1e-6, abs=1e-6)
    for file in ("model.safetensors", "adapter/adapter_model.safetensors"):
        own, reference = (load_file(folder / file) for folder in (Path(job.attempt), alone))
        assert apart(own, reference, way=way(short)) < ROUNDING


def _job(bench: Any, stage: Stage, folder: Path, **resources: Any) -> TrainJob:
    (folder / "attempt").mkdir()
    return TrainJob(
        stage=stage,
        data=bench.data,
        init=bench.init,
        resources=bench.resources.with_changes(resources),
        context=NO_CONTEXT,
        attempt=str(folder / "attempt"),
        resume=str(folder / "resume"),
        run_id=None,
        fresh_projector=True,
    )


def test_a_frozen_base_is_kept_in_bf16_while_it_trains_and_merged_in_full(
    plain: Any, stage: Callable[..., Stage], train: Train, tmp_path: Path
) -> None:
    half = stage(precision="bf16", num_steps=2)
    model = _placed(_job(plain, half, tmp_path))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    made = content(train(half))
    before, after = (load_file(folder / "model.safetensors") for folder in (content(plain.init), made))
    _is_base_plus_adapter(before, after, made)


def _placed(job: TrainJob) -> VilaForConditionalGeneration:
    """Return the model of a job as its engine trains it."""
    model, _, _ = load(job)
    objective = Objective(model)
    build_engine(objective, set_trainable(objective, job.stage.trainable, job.stage.tuning), job.stage, job.resources)
    return model


def _is_base_plus_adapter(before: dict[str, Any], after: dict[str, Any], made: Path) -> None:
    """Checks W + 8 / 4 * B A with the adapter's file, in fp32, whatever dtype the base had during training."""
    tensors = load_file(made / "adapter/adapter_model.safetensors")
    layers = [name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight")]
    assert len(layers) == 14
    for layer in layers:
        name = f"{layer.removeprefix('base_model.model.')}.weight"
        product = tensors[f"{layer}.lora_B.weight"].double() @ tensors[f"{layer}.lora_A.weight"].double()
        assert float(product.abs().max()) > 1e-4
        assert float((after[name].double() - before[name].double() - 2 * product).abs().max()) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_qlora_trains_on_4_bit_weights_and_merges_into_the_full_ones(
    precision: str, plain: Any, stage: Callable[..., Stage], train: Train, tmp_path: Path
) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="QLoRA needs bitsandbytes (extra qlora)")
    quantised = stage({**LORA, "quantise": "nf4"}, num_steps=2, precision=precision)
    model = _placed(_job(plain, quantised, tmp_path))
    kept = [m for m in model.modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
    assert len(kept) == 14
    assert all(layer.weight.dtype == torch.uint8 and layer.weight.quant_state.nested for layer in kept)
    made = content(train(quantised))
    assert not any(torch.isnan(torch.tensor(values(made))))
    before, after = (load_file(folder / "model.safetensors") for folder in (content(plain.init), made))
    _is_base_plus_adapter(before, after, made)
    exact = content(train(stage(num_steps=2, precision=precision)))
    assert values(made) != values(exact)
    assert values(made) == pytest.approx(values(exact), abs=0.1)
    assert not model_folder.load(made).training


def test_qlora_is_refused_at_once_without_bitsandbytes(
    plain: Any, stage: Callable[..., Stage], train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vila_ops.train.checks.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs bitsandbytes; pip install 'vila-ops\[qlora\]'"):
        train(stage({**LORA, "quantise": "nf4"}))


def test_llava_s_script_is_a_matter_of_config(plain: Any, stage: Callable[..., Stage], tmp_path: Path) -> None:
    """Rank 128, alpha 256, learning rate 2e-4, and 2e-5 of the projector, as in finetune_lora.sh of LLaVA-1.5."""
    rates = {"learning_rate": 2e-4, "learning_rates": {"projector": 2e-5}}
    script = stage({"kind": "lora", "rank": 128, "alpha": 256}, **rates)
    model, _, _ = load(_job(plain, script, tmp_path))
    trained = set_trainable(model, script.trainable, script.tuning)
    peaks = {name: group["peak"] for group in parameter_groups(script, trained) for name in _names(group, trained)}
    layer = "model.language_model.layers.0.mlp.up_proj"
    assert {peaks[f"{layer}.lora_{which}.default.weight"] for which in "AB"} == {2e-4}
    assert peaks["model.multi_modal_projector.linear_1.weight"] == 2e-5
    assert model.get_submodule(layer).scaling == {"default": 2.0}
    assert f"{layer}.base_layer.weight" not in peaks


def _names(group: dict[str, Any], trained: Any) -> list[str]:
    held = {id(parameter) for parameter in group["params"]}
    return [name for named in trained.values() for name, parameter in named if id(parameter) in held]


@pytest.mark.parametrize("kind", ["lora", "visual_expert"])
def test_a_tuning_of_a_language_model_that_does_not_train_is_refused(kind: str, stage: Callable[..., Stage]) -> None:
    with pytest.raises(ValueError, match=r"does not train here; trainable is \['projector'\]: add language_model"):
        stage({"kind": kind}, trainable=["projector"])
