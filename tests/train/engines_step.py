"""Steps of one engine after another: `python engines_step.py JOB.json RANK WORLD_SIZE RENDEZVOUS CASES`.

CASES are resources and norms to clip to, as JSON; launched inline, plain torch takes the place of all resources.
Each takes a step, and then one whose gradient is not finite on the last rank alone. Rank 0 leaves NUMBER.json, with
both norms and what the second step moved, and NUMBER.safetensors, the state after the first, in the attempt's folder.
"""

import json
import sys
from pathlib import Path

import torch
from process_group import end, join
from safetensors.torch import save_file
from torch import Tensor

from vila_ops.config import Resources, Stage
from vila_ops.model.trainable import set_trainable
from vila_ops.train.engine import Engine, build_engine
from vila_ops.train.job import Job, Place
from vila_ops.train.loop import add_gradients, load
from vila_ops.train.objective import Objective


def take_steps(job: Job, place: Place, number: int) -> None:
    model, rows, batches = load(job)
    objective = Objective(model, bf16=False)
    trained = set_trainable(objective, job.stage.trainable, job.stage.tuning)
    engine = build_engine(objective, trained, job.stage, job.resources)
    add_gradients(engine, batches, rows, job, step=0, place=place)
    norm = engine.step(1.0)
    before = state(engine)
    own, _ = rows.batch(1, rank=place.rank, world_size=place.world_size)
    for row in own:
        engine.backward(engine.loss(batches([row]))[0] * (float("nan") if place.rank == place.world_size - 1 else 1.0))
    broken = engine.step(1.0)
    after = state(engine)
    moved = [name for name, tensor in before.items() if not torch.equal(tensor, after[name])]
    if place.rank == 0:
        (Path(job.attempt) / f"{number}.json").write_text(json.dumps({"norm": norm, "broken": broken, "moved": moved}))
        save_file(before, Path(job.attempt) / f"{number}.safetensors")


def state(engine: Engine) -> dict[str, Tensor]:
    return {
        f"{key}/{name}": tensor.detach().clone().contiguous()
        for name, own in engine.state()
        for key, tensor in own.items()
    }


def main(path: Path, place: Place, rendezvous: str, cases: list[tuple[dict[str, object], float | None]]) -> None:
    given = Job.model_validate_json(path.read_text())
    if given.resources.launch == "ray":
        join(place.rank, place.world_size, rendezvous)
    for number, (own, most) in enumerate(cases):
        zero = own if given.resources.launch == "ray" else {}
        stage = Stage.model_validate({**given.stage.model_dump(), "max_grad_norm": most})
        resources = Resources.model_validate({**given.resources.model_dump(), **zero})
        take_steps(Job.model_validate({**given.model_dump(), "stage": stage, "resources": resources}), place, number)
    if given.resources.launch == "ray":
        end()


if __name__ == "__main__":
    job, rank, world_size, rendezvous, cases = sys.argv[1:]
    main(Path(job), Place(rank=int(rank), world_size=int(world_size)), rendezvous, json.loads(cases))
