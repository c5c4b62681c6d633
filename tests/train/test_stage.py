import json
import logging
import random
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.seed import SEED
from vila_ops.artifacts import s3, store
from vila_ops.artifacts.disk import sha256
from vila_ops.artifacts.kinds import Checkpoint, Pretrained
from vila_ops.artifacts.store import content, verify
from vila_ops.config import Model, Resources, Stage
from vila_ops.data.shards import read_index
from vila_ops.errors import CorruptArtifact, NonFiniteLoss
from vila_ops.model import folder as model_folder
from vila_ops.model.assemble import assemble
from vila_ops.model.modify import Modifications
from vila_ops.train.job import StageInputs
from vila_ops.train.stage import train_stage


@pytest.fixture(scope="module")
def stage(bench: Any, make_stage: Any) -> Stage:
    """A stage with enough steps to be killed before its end."""
    made: Stage = make_stage(
        bench.mixture, trainable=["projector", "language_model"], num_steps=24, save_every=4, validate_every=8
    )
    return made


def elsewhere(bench: Any, root: Path | str, **more: Any) -> Resources:
    """Return the same resources with another store."""
    return bench.resources.with_changes({"storage.store": str(root), **more})


def outcome(checkpoint: Checkpoint) -> tuple[str, str]:
    folder = content(checkpoint)
    return (folder / "curve.json").read_text(), sha256(folder / "model.safetensors")


@pytest.fixture(scope="module")
def unbroken(bench: Any, stage: Stage, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    resources = elsewhere(bench, tmp_path_factory.mktemp("unbroken"))
    return train_stage(stage, bench.model, bench.data, bench.init, resources)


@pytest.mark.slow
def test_a_stage_trains_seals_and_is_not_trained_twice(bench: Any, stage: Stage, unbroken: Checkpoint) -> None:
    verify(unbroken)
    curve = json.loads((content(unbroken) / "curve.json").read_text())
    losses = [float.fromhex(row["loss"]) for row in curve[1:]]
    validations = {row["step"]: float.fromhex(row["validation_loss"]) for row in curve if "validation_loss" in row}
    assert [row["step"] for row in curve] == list(range(25))
    assert sorted(validations) == [0, 8, 16, 24]
    assert validations[24] < validations[0] - 0.5
    assert sum(losses[-5:]) < sum(losses[:5]) - 2.5
    before, after = (model_folder.load(content(m)).state_dict() for m in (bench.init, unbroken))
    changed = {name.split(".")[1] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"multi_modal_projector", "language_model"} | (
        {"weight"} if "lm_head.weight" in before else set()
    )
    root = Path(unbroken.uri).parents[1]
    assert not list(root.glob("resume/*"))
    stamp = (Path(unbroken.uri) / "manifest.json").stat().st_mtime_ns
    again = train_stage(stage, bench.model, bench.data, bench.init, elsewhere(bench, root))
    assert again == unbroken
    assert (Path(unbroken.uri) / "manifest.json").stat().st_mtime_ns == stamp


@pytest.mark.slow
@pytest.mark.parametrize("damaged", [False, True])
def test_killed_at_a_random_step_and_started_again_gives_the_same_bytes(
    damaged: bool, bench: Any, stage: Stage, unbroken: Checkpoint, tmp_path: Path, train_and_kill: Any
) -> None:
    resources = elsewhere(bench, tmp_path / "store")
    inputs = StageInputs(stage=stage, model=bench.model, data=bench.data, init=bench.init, resources=resources)
    draw = random.Random(SEED)
    at = draw.choice((4, 8, 12, 16))
    moment = draw.random() * 0.05
    train_and_kill(inputs, tmp_path, when=lambda: any(tmp_path.glob(f"store/resume/*/step-{at:06d}")), moment=moment)
    assert not list(tmp_path.glob("store/checkpoint/*/manifest.json")), "it was sealed before it was killed"
    saved = sorted(tmp_path.glob("store/resume/*/step-*"))
    assert len(saved) >= 1
    if damaged:
        weights = saved[-1] / "rank-00000-of-00001.safetensors"
        flipped = bytearray(weights.read_bytes())
        flipped[-5] ^= 1
        weights.write_bytes(flipped)
    resumed = train_stage(stage, bench.model, bench.data, bench.init, resources)
    assert outcome(resumed) == outcome(unbroken), f"killed after step {at}"
    assert resumed.digest == unbroken.digest
    shutil.rmtree(tmp_path / "store")


@pytest.mark.slow
def test_the_split_into_micro_batches_does_not_change_the_curve(
    bench: Any, stage: Stage, unbroken: Checkpoint, tmp_path: Path
) -> None:
    wide = train_stage(
        stage, bench.model, bench.data, bench.init, elsewhere(bench, tmp_path, **{"train.micro_batch_size": 2})
    )
    narrow, together = (json.loads(outcome(c)[0]) for c in (unbroken, wide))
    for one, two in zip(narrow, together, strict=True):
        for key in one.keys() - {"step"}:
            near = 1e-6 if one["step"] <= 5 else 1e-5  # rounding differs, and the difference grows with the steps
            assert float.fromhex(one[key]) == pytest.approx(float.fromhex(two[key]), abs=near)


def test_a_stage_of_epochs_without_packing_seals_its_steps_and_says_what_it_ran_with(
    bench: Any, make_stage: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    stage = make_stage(bench.mixture, num_steps=None, epochs=0.5, pack=False, global_batch_size=6, max_grad_norm=None)
    resources = elsewhere(bench, tmp_path, **{"train.stages": {stage.name: {"micro_batch_size": 3}}})
    trained = train_stage(stage, bench.model, bench.data, bench.init, resources)
    (worker,) = json.loads((Path(trained.uri) / "manifest.json").read_text())["execution"]["workers"]
    samples = sum(share["samples_per_epoch"] for share in worker["composition"]["shares"].values())
    assert trained.step == worker["steps"] == -(-samples // 12)
    assert worker["micro_batch_size"] == 3
    curve = json.loads((content(trained) / "curve.json").read_text())
    assert [row["step"] for row in curve] == list(range(trained.step + 1))
    before, after = (float.fromhex(curve[at]["validation_loss"]) for at in (0, -1))
    assert f"validation loss {before:.3f} before the first step, {after:.3f} after the last" in caplog.text


def test_a_projector_that_a_recipe_starts_from_is_trained_on_as_it_is(
    bench: Any, make_stage: Any, unbroken: Checkpoint, tmp_path: Path
) -> None:
    resources = elsewhere(bench, tmp_path)
    weights = {"kind": "folder", "path": str(content(unbroken))}
    model = Model.model_validate({**bench.model.model_dump(), "weights": weights})
    goes_on = train_stage(
        make_stage(bench.mixture, num_steps=1), model, bench.data, assemble(model, resources), resources
    )
    before, after = (json.loads(outcome(checkpoint)[0]) for checkpoint in (unbroken, goes_on))
    assert after[0]["validation_loss"] == before[-1]["validation_loss"]


def test_a_loss_that_is_not_finite_stops_before_any_update_and_names_the_samples(
    bench: Any, make_stage: Any, tmp_path: Path
) -> None:
    model = model_folder.load(content(bench.init))
    with torch.no_grad():
        model.model.language_model.norm.weight[0] = float("inf")
    at = store.address(Pretrained, revision=0, recipe={"broken": True}, parents=())
    attempt = store.begin(at, store=str(tmp_path))
    names = {f"{n}": p for n, p in model.named_parameters() if n == "model.language_model.norm.weight"}
    model_folder.save_trained(names, attempt, init=content(bench.init), modifications=Modifications())
    broken = store.seal(Pretrained, at, attempt, facts={}, execution={})
    stage = make_stage(bench.mixture, global_batch_size=3, save_every=1)
    with pytest.raises(NonFiniteLoss, match=r"at step 1; nothing was updated") as raised:
        train_stage(stage, bench.model, bench.data, broken, elsewhere(bench, tmp_path))
    keys = {row["key"] for row in read_index(content(bench.data)).to_pylist()}
    assert any(key in str(raised.value) for key in keys)
    assert not list(tmp_path.glob("checkpoint/*/manifest.json"))
    assert not list(tmp_path.glob("resume/*/step-*"))


@pytest.mark.slow
def test_a_stage_that_cannot_be_protected_stops_and_goes_on_when_it_can(
    bench: Any, stage: Stage, unbroken: Checkpoint, tmp_path: Path
) -> None:
    (tmp_path / "resume").write_text("in the way")
    resources = elsewhere(bench, tmp_path)
    with pytest.raises(OSError, match=r"Not a directory: '.*/resume/\w+'"):
        train_stage(stage, bench.model, bench.data, bench.init, resources)
    assert not list(tmp_path.glob("checkpoint/*/manifest.json"))
    (tmp_path / "resume").unlink()
    assert train_stage(stage, bench.model, bench.data, bench.init, resources).digest == unbroken.digest


@pytest.mark.slow
def test_on_s3_another_machine_goes_on_where_a_killed_stage_was(
    bench: Any, stage: Stage, unbroken: Checkpoint, s3_store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture, train_and_kill: Any,
) -> None:  # fmt: skip
    resources = elsewhere(bench, s3_store)
    inputs = StageInputs(stage=stage, model=bench.model, data=bench.data, init=bench.init, resources=resources)

    def eight_steps_are_saved() -> bool:
        names = s3.names(f"{s3_store}/resume")
        return any("step-000008" in name and name.endswith("manifest.json") for name in names)

    train_and_kill(inputs, tmp_path, when=eight_steps_are_saved)
    monkeypatch.setenv("VILA_CACHE", str(tmp_path / "other"))
    with caplog.at_level(logging.INFO):
        resumed = train_stage(stage, bench.model, bench.data, bench.init, resources)
    assert re.search(r"resuming after step (8|12|16|20)", caplog.text)
    assert resumed.digest == unbroken.digest
    assert s3.names(f"{s3_store}/resume") == []


def test_how_often_it_saves_is_no_part_of_the_question_and_all_else_is(
    bench: Any, stage: Stage, unbroken: Checkpoint
) -> None:
    resources = elsewhere(bench, Path(unbroken.uri).parents[1])
    often = Stage.model_validate({**stage.model_dump(), "save_every": 7})
    assert train_stage(often, bench.model, bench.data, bench.init, resources) == unbroken


def test_a_damaged_input_is_not_trained_on(bench: Any, stage: Stage, tmp_path: Path) -> None:
    shutil.copytree(bench.data.uri, tmp_path / "data")
    data = bench.data.model_validate({**bench.data.model_dump(), "uri": str(tmp_path / "data")})
    shard = sorted(content(data).glob("*.tar"))[0]
    flipped = bytearray(shard.read_bytes())
    flipped[700] ^= 4
    shard.write_bytes(flipped)
    with pytest.raises(CorruptArtifact, match=shard.name):
        train_stage(stage, bench.model, data, bench.init, elsewhere(bench, tmp_path / "store"))
