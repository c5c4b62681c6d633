"""Seconds from the start of a process to the end of its first training step: resumed, and from the beginning.

A stage with a language model of 85 M parameters, inline, each start in a new process, alternating. A resume reads,
checks and restores 1 GB of weights and moments (from the page cache, as after a crash). A start from the beginning
validates first; these seconds are reported. Both read the same model and the same cached features and plan.
Target: 1.2 times the start from the beginning.
"""

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from result import result

from vila_ops.config import NO_CONTEXT, load
from vila_ops.data.preprocess.prepare import prepare
from vila_ops.model.assemble import assemble
from vila_ops.train.job import TrainJob

ROOT = Path(__file__).parents[1]
ROUNDS = 7
TARGET = 1.2
SAVED = 2
"""Steps between checkpoints; a process that resumes ends before the next."""
MODEL = {"hidden_size": 768, "num_layers": 12, "num_heads": 12}
TRAIN = """
import os, sys, time
from pathlib import Path
from vila_ops.train import loop
from vila_ops.train.engine import PlainEngine
from vila_ops.train.job import RankInfo, TrainJob

started, job, last = float(sys.argv[1]), TrainJob.model_validate_json(Path(sys.argv[2]).read_text()), int(sys.argv[3])
step, validate, validated, steps = PlainEngine.step, loop.validate, [], []

def timed_validate(*given, **named):
    begun = time.time()
    loss = validate(*given, **named)
    validated.append(time.time() - begun)
    return loss

def timed_step(self, lr_multiplier):
    norm = step(self, lr_multiplier)
    steps.append(time.time() - started)
    if len(steps) == last:
        print(steps[0], sum(validated), flush=True)
        os._exit(0)
    return norm

loop.validate, PlainEngine.step = timed_validate, timed_step
loop.train(job, RankInfo())
"""


def main() -> None:
    os.chdir(ROOT)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        job = _job(folder)
        saved = Path(job.resume)
        _start(job, folder, steps=4 * SAVED)  # until a checkpoint is complete and the caches are filled
        newest = max(saved.glob("step-*"))
        size = sum(path.stat().st_size for path in newest.iterdir())
        times: dict[str, list[tuple[float, float]]] = {"resumed": [], "cold": []}
        for _ in range(ROUNDS):
            times["resumed"].append(_start(job, folder))
            saved.rename(folder / "aside")
            times["cold"].append(_start(job, folder))
            shutil.rmtree(saved, ignore_errors=True)
            (folder / "aside").rename(saved)
    ours, peer = (statistics.median(seconds for seconds, _ in times[case]) for case in ("resumed", "cold"))
    result(
        "resume_time",
        ours=ours,
        peer=peer,
        target=TARGET,
        ok=ours <= TARGET * peer,
        unit="s to the first step",
        gigabytes=round(size / 1e9, 3),
        validation_of_the_cold_start=round(statistics.median(validation for _, validation in times["cold"]), 3),
        seconds={case: [round(seconds, 2) for seconds, _ in ran] for case, ran in times.items()},
    )


def _job(folder: Path) -> TrainJob:
    """The stage `pretrain` of the tiny recipe with a larger model; its parents are sealed first."""
    where = [f"resources.storage.{name}={folder / name}" for name in ("store", "data", "cache")]
    larger = [f"model.language_model.{key}={value}" for key, value in MODEL.items()]
    stage = [f"stages.pretrain.save_every={SAVED}", "stages.pretrain.num_steps=1000"]
    resources = ROOT / "configs/resources/inline.yaml"
    run = load(ROOT / "configs/recipes/tiny.yaml", resources=resources, overrides=(*where, *larger, *stage))
    pretrain = run.recipe.stages["pretrain"]
    (folder / "attempt").mkdir()
    return TrainJob(
        stage=pretrain.model_validate({**pretrain.model_dump(), "save_every": SAVED, "validate_every": 1000}),
        data=prepare(pretrain.mixture, run.recipe.text(), run.resources),
        init=assemble(run.recipe.model, run.resources),
        resources=run.resources,
        context=NO_CONTEXT,
        attempt=str(folder / "attempt"),
        resume=str(folder / "resume"),
        run_id=None,
        fresh_projector=False,
    )


def _start(job: TrainJob, folder: Path, *, steps: int = 1) -> tuple[float, float]:
    """Seconds to the first step, and of validation, of a process that ends after `steps` steps."""
    file = folder / "job.json"
    file.write_text(job.model_dump_json())
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-c", TRAIN, str(time.time()), str(file), str(steps)]
    said = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True).stdout.split()
    print(*said, file=sys.stderr)
    return float(said[0]), float(said[1])


if __name__ == "__main__":
    main()
