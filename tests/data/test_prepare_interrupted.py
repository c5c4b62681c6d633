"""Prepare that is killed goes on at the first unit that is not sealed, and ends with the same bytes."""

import json
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.forks import Fork
from vila_ops.config import Mixture, Resources, TextFormat
from vila_ops.data.preprocess.prepare import prepare

KILLS = 2


@pytest.mark.slow
def test_a_killed_prepare_goes_on_where_it_was(
    make_mixture: Callable[..., Mixture],
    make_text: Callable[..., TextFormat],
    make_resources: Callable[..., Resources],
    tmp_path: Path,
) -> None:
    asked = make_mixture("pairs", "documents", "instructions", "definitions", shard_bytes=15_000)
    whole = prepare(asked, make_text(), make_resources(tmp_path / "whole"))
    shards = len(list((tmp_path / "whole/store/shard").glob("*/manifest.json")))
    assert shards >= 6
    resources = make_resources(tmp_path / "killed")
    inputs, log = tmp_path / "inputs.json", tmp_path / "log"
    inputs.write_text(json.dumps([one.model_dump(mode="json") for one in (asked, make_text(), resources)]))
    sealed: dict[Path, tuple[int, int]] = {}
    for how in (*["killed"] * KILLS, "whole"):
        with Fork(Path(__file__).parent / "killed_prepare.py", inputs, how, log=log) as process:
            code = process.wait()
        now = _sealed(resources)
        assert sealed.items() <= now.items(), "a sealed shard was made again"
        if how == "killed":
            assert code == -signal.SIGKILL
            assert len(now) == len(sealed) + 1
        sealed = now
    assert log.read_text().splitlines()[-1] == whole.digest
    assert len(sealed) == shards


def _sealed(resources: Resources) -> dict[Path, tuple[int, int]]:
    """Inode and time of every sealed shard's manifest."""
    sealed: dict[Path, tuple[int, int]] = {}
    for path in Path(resources.storage.store).glob("shard/*/manifest.json"):
        status = path.stat()
        sealed[path] = (status.st_ino, status.st_mtime_ns)
    return sealed
