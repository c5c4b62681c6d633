"""Fixtures that start hundreds of processes."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from vila_ops.config import Stage, load
from vila_ops.data.preprocess.prepare import prepare
from vila_ops.model.assemble import assemble
from vila_ops.train.verify_resume import ResumeTrial

TESTS = Path(__file__).parents[1]
CONFIGS = TESTS.parent / "configs"


@pytest.fixture(scope="session")
def fork() -> Iterator[Callable[..., list[int]]]:
    """Runs a task of `forks.py`. Returns the exit codes of its processes."""
    paths = [str(TESTS.parent), str(TESTS / "train"), os.environ.get("PYTHONPATH", "")]
    env = {
        **os.environ, "PYTHONPATH": ":".join(paths), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }  # fmt: skip
    command = [sys.executable, str(TESTS / "faults/forks.py")]
    with subprocess.Popen(
        command, env=env, cwd=TESTS.parent, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdin is not None
        assert server.stdout is not None
        into, out = server.stdin, server.stdout
        while (line := out.readline()) != '"ready"\n':
            assert line, "it ended before it was ready"

        def run(**task: Any) -> list[int]:
            into.write(json.dumps(task) + "\n")
            into.flush()
            codes: list[int] = json.loads(out.readline())
            return codes

        yield run
        server.kill()


@pytest.fixture(scope="session")
def make_trial(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., ResumeTrial]:
    """Makes a stage of the tiny recipe with some settings changed, in a given store."""
    root = tmp_path_factory.mktemp("faults")
    places = (
        f"resources.storage.store={root}/store",
        f"resources.storage.cache={root}/cache",
        "resources.train.record_samples=true",
    )
    run = load(CONFIGS / "recipes/tiny.yaml", resources=CONFIGS / "resources/inline.yaml", overrides=places)

    def make(store: Path, *, sources: Iterable[str] = (), **changes: Any) -> ResumeTrial:
        stage = run.recipe.stages["pretrain"]
        mixture = stage.mixture.model_dump()
        kept = {name: one for name, one in mixture["sources"].items() if name in sources or not sources}
        own = {"mixture": {**mixture, "name": "-".join(kept), "sources": kept}, **changes}
        changed = Stage.model_validate({**stage.model_dump(), **own})
        return ResumeTrial(
            stage=changed,
            model=run.recipe.model,
            data=prepare(changed.mixture, run.recipe.text(), run.resources),
            init=assemble(run.recipe.model, run.resources),
            resources=run.resources.with_changes({"storage.store": str(store)}),
        )

    return make
