import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from vila_ops.train import checkpoint
from vila_ops.train.job import Place

CURVE: list[dict[str, Any]] = [{"step": 0, "validation_loss": 1 / 3}, {"step": 1, "loss": 0.1}]


def states(value: float) -> list[Any]:
    return [
        (name, {key: torch.full((2, 3), value + n) for n, key in enumerate(("param", "exp_avg", "exp_avg_sq"))})
        for name in ("model.a.weight", "model.b/odd.weight")
    ]


def save(folder: Path, step: int) -> None:
    checkpoint.save(folder, step=step, states=iter(states(float(step))), curve=CURVE, place=Place())


def test_what_was_saved_comes_back(tmp_path: Path) -> None:
    assert checkpoint.newest(tmp_path) is None
    save(tmp_path, 4)
    found = checkpoint.newest(tmp_path)
    assert found is not None
    tensors, manifest = found
    assert (manifest["step"], manifest["curve"]) == (4, CURVE)
    assert tensors.keys() == {"model.a.weight", "model.b/odd.weight"}
    assert all((t["exp_avg_sq"] == 6.0).all() for t in tensors.values())


def test_the_newest_two_are_kept(tmp_path: Path) -> None:
    for step in (9, 10, 11, 12):
        save(tmp_path, step)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000011", "step-000012"]


@pytest.mark.parametrize("victim", ["rank-00000-of-00001.safetensors", "manifest.json"])
def test_any_flipped_bit_makes_it_fall_back_and_it_can_be_written_again(victim: str, tmp_path: Path) -> None:
    save(tmp_path / "good", 2)
    save(tmp_path / "good", 4)
    draw = random.Random(victim)
    path = tmp_path / "good/step-000004" / victim
    original = path.read_bytes()
    for _ in range(100):
        flipped = bytearray(original)
        flipped[draw.randrange(len(flipped))] ^= 1 << draw.randrange(8)
        path.write_bytes(flipped)
        found = checkpoint.newest(tmp_path / "good")
        assert found is not None
        assert found[1]["step"] == 2
    save(tmp_path / "good", 4)
    found = checkpoint.newest(tmp_path / "good")
    assert found is not None
    assert found[1]["step"] == 4


def test_leftovers_of_a_killed_writer_do_not_matter(tmp_path: Path) -> None:
    save(tmp_path, 2)
    shutil.copytree(tmp_path / "step-000002", tmp_path / ".step-000004")  # killed before the rename, of two workers
    (tmp_path / ".step-000004/rank-00000-of-00001.safetensors").rename(
        tmp_path / ".step-000004/rank-00001-of-00002.safetensors"
    )
    assert (checkpoint.newest(tmp_path) or ({}, {"step": 0}))[1]["step"] == 2
    save(tmp_path, 4)
    found = checkpoint.newest(tmp_path)
    assert found is not None
    assert list(found[1]["files"]) == ["rank-00000-of-00001.safetensors"]
    (tmp_path / "step-000004/rank-00000-of-00001.safetensors").unlink()
    assert (checkpoint.newest(tmp_path) or ({}, {"step": 0}))[1]["step"] == 2
