"""A flipped bit anywhere in a checkpoint is detected before it is used, and the checkpoint before is used.

VILA_FLIPS sets the number of bits (60; `make faults`: 1000), on S3 a tenth of it, VILA_SEED which.
"""

import logging
import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.seed import SEED
from vila_ops.artifacts import s3
from vila_ops.artifacts.s3_calls import client, place
from vila_ops.config import Resources
from vila_ops.train.checkpoint.checkpointer import Checkpointer
from vila_ops.train.job import RankInfo

FLIPS = int(os.environ.get("VILA_FLIPS", "60"))
Attempt = Callable[[], Checkpointer]


@pytest.fixture(params=["disk", "s3"])
def resume(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A location for checkpoints on each storage."""
    return str(tmp_path / "resume") if request.param == "disk" else f"{request.getfixturevalue('s3_store')}/resume/a"


@pytest.mark.slow
@pytest.mark.timeout(1200 + FLIPS)
def test_every_flipped_bit_is_found(
    resume: str, make_resources: Callable[..., Resources], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    draw, on_s3 = random.Random(SEED), "://" in resume
    flips = FLIPS // 10 if on_s3 else FLIPS
    curve = [{"step": step, "loss": draw.random() * 10.0**-step} for step in range(1, 9)]

    def attempt() -> Checkpointer:
        return Checkpointer(resume, RankInfo(), make_resources(tmp_path), live=True)

    for step in (2, 4):
        checkpoints = attempt()
        state = {key: torch.full((64,), float(step)) for key in ("param", "exp_avg", "exp_avg_sq")}
        checkpoints.save(step, iter([("layer.weight", state)]), curve)
        checkpoints.close()
    names = s3.names(resume) if on_s3 else [str(path.relative_to(resume)) for path in Path(resume).glob("*/*")]
    victims = sorted(name for name in names if "step-000004" in name)
    assert [name.rpartition("/")[2] for name in victims] == ["manifest.json", "rank-00000-of-00001.safetensors"]
    whole = {name: s3.read(f"{resume}/{name}") if on_s3 else (Path(resume) / name).read_bytes() for name in victims}

    def put(name: str, data: bytes) -> None:
        if on_s3:  # keeps the sha256 of the upload, as damage in the store does
            metadata = client().head_object(**place(f"{resume}/{name}"))["Metadata"]
            client().put_object(**place(f"{resume}/{name}"), Body=data, Metadata=metadata)
        else:
            (Path(resume) / name).write_bytes(data)

    detected = 0
    for _ in range(flips):
        name = draw.choice(victims)
        flipped = bytearray(whole[name] or b"")
        flipped[draw.randrange(len(flipped))] ^= 1 << draw.randrange(8)
        put(name, bytes(flipped))
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            taken = attempt().newest()
        put(name, whole[name] or b"")
        assert taken is not None
        tensors, manifest = taken
        detected += manifest["step"] == 2 and bool((tensors["layer.weight"]["param"] == 2.0).all())
        assert name.rpartition("/")[2] in caplog.text
        assert "step-000004" in caplog.text
    assert detected == flips, f"seed {SEED}"
    last = attempt().newest()
    assert last is not None
    assert last[1]["step"] == 4
