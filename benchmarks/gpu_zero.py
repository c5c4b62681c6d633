"""Steps by DeepSpeed's ZeRO-2 and 3 over all GPUs of this machine, against plain torch on one of them.

Tower, projector and language model of gpu_model.py train. `ours` and `peer` are tokens per second and GPU, of ZeRO-2
and of plain torch. Target: 0.8. The first losses have to agree to 1 %. Needs a GPU; with one, the workers' collectives
are those of a single worker. VILA_BENCH_SMALL=1 runs two workers on the CPU.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from gpu_model import PASSES, ROWS, SEQUENCE_LENGTH, SMALL, device, packed, trainee
from result import result

from vila_ops.device import collectives, describe

TARGET, LOSSES_AGREE = 0.8, 0.01
WARM_UP, STEPS = (1, 1) if SMALL else (3, 5)
SECONDS = 200
"""The most that the processes of a stage may take."""


def main() -> None:
    world_size = 2 if SMALL else torch.accelerator.device_count() or len([device()])
    plain = measured(zero_stage=0, world_size=1)
    zero = {f"zero-{stage}": measured(zero_stage=stage, world_size=world_size) for stage in (2, 3)}
    apart = max(abs(one["loss"] / plain["loss"] - 1) for one in zero.values())
    share = zero["zero-2"]["tokens_per_s"] / plain["tokens_per_s"]
    result(
        "gpu_zero",
        ours=zero["zero-2"]["tokens_per_s"],
        peer=plain["tokens_per_s"],
        target=TARGET,
        ok=share >= TARGET and apart <= LOSSES_AGREE,
        unit="tokens per second and GPU",
        workers=world_size,
        losses_apart=round(apart, 6),
        plain=plain,
        **zero,
        device=describe(device()),
    )


def measured(*, zero_stage: int, world_size: int) -> dict[str, Any]:
    """Tokens per second and GPU of a stage, and its first loss, from a process for each worker."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = [str(zero_stage), str(world_size), folder]
        env = {**os.environ, **({"DS_ACCELERATOR": "cpu"} if SMALL else {})}
        workers = [
            subprocess.Popen([sys.executable, __file__, *arguments, str(rank)], env={**env, "LOCAL_RANK": str(rank)})
            for rank in range(world_size)
        ]
        try:
            codes = [worker.wait(SECONDS) for worker in workers]
        finally:
            for worker in workers:
                worker.kill()
        if any(codes):
            raise RuntimeError(f"workers of ZeRO-{zero_stage} ended with {codes}; their errors are above")
        ours: dict[str, Any] = json.loads((Path(folder) / "measured.json").read_text())
        return ours


def work(zero_stage: int, world_size: int, folder: str, rank: int) -> None:
    """Take steps as one worker; the first one writes what was measured."""
    if not SMALL:
        torch.accelerator.set_device_index(rank)
    torch.distributed.init_process_group(
        collectives("cpu" if SMALL else "gpu"), f"file://{folder}/rendezvous", rank=rank, world_size=world_size
    )
    stage = {"global_batch_size": ROWS * PASSES * world_size}
    ours = trainee(stage, num_workers=world_size, zero_stage=zero_stage)
    rows = packed(ROWS * PASSES)  # the same on each worker, so that every loss is that of one worker
    batches = [ours.batch(rows[start : start + ROWS]) for start in range(0, len(rows), ROWS)]
    with torch.no_grad():
        loss = float(ours.engine.loss(batches[0])[0]) / len(batches[0].labels)
    took = statistics.median([ours.step(batches) for _ in range(WARM_UP + STEPS)][WARM_UP:])
    if rank == 0:
        tokens = ROWS * PASSES * SEQUENCE_LENGTH / took
        facts = {"tokens_per_s": round(tokens, 1), "loss": loss, "seconds_per_step": round(took, 4)}
        (Path(folder) / "measured.json").write_text(json.dumps({**facts, "engine": ours.engine.facts()["engine"]}))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    if len(sys.argv) > 1:
        work(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
    else:
        main()
