"""Fixtures that start hundreds of processes, or make stores fail."""

import contextlib
import json
import subprocess
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.forks import Fork
from tests.s3_servers import Proxy
from vila_ops.config import Stage, load
from vila_ops.data.preprocess.prepare import prepare
from vila_ops.model.assemble import assemble
from vila_ops.train.verify_resume import ResumeTrial

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture(scope="session")
def fork(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[int]]:
    """Runs a task of `stages.py`. Returns the exit codes of its processes."""
    folder = tmp_path_factory.mktemp("forks")

    def run(**task: Any) -> list[int]:
        files = folder / "task.json", folder / "codes.json"
        files[0].write_text(json.dumps(task))
        with Fork(Path(__file__).parent / "stages.py", *files) as process:
            assert process.wait(timeout=None) == 0
        codes: list[int] = json.loads(files[1].read_text())
        return codes

    return run


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


@pytest.fixture
def proxy(s3_store: str, moto_endpoint: str, aws: Callable[..., None]) -> Iterator[Proxy]:
    """A proxy between boto3 and moto."""
    server = Proxy(moto_endpoint)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    aws(server.endpoint)
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def make_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Makes a file system of some bytes."""
    disk = tmp_path / "disk"
    with contextlib.ExitStack() as stack:

        def make(size: int) -> Path:
            disk.mkdir()
            mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", disk]
            mounted = subprocess.run(mount, capture_output=True, check=False)
            if mounted.returncode:
                pytest.skip(f"no right to mount: {mounted.stderr.decode().strip()}")
            stack.callback(subprocess.run, ["umount", "--lazy", disk], check=True)  # a traceback may hold its files
            return disk

        yield make
