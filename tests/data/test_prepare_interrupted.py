"""Prepare that is killed goes on at the first unit that is not sealed, and ends with the same bytes."""

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from vila_ops.config import Mixture, Resources, TextFormat
from vila_ops.data.preprocess.prepare import prepare

ROOT = Path(__file__).parents[2]
KILLS = 2
PROGRAM = """
import json, os, signal, sys
from vila_ops.config import Mixture, Resources, TextFormat
from vila_ops.data.preprocess.prepare import prepare
mixture, text, resources = (
    kind.model_validate(asked)
    for kind, asked in zip((Mixture, TextFormat, Resources), json.loads(sys.argv[1]), strict=True)
)
seals = 0

def end_before_the_second_seal(event, arguments):
    global seals
    if event == "os.link" and "/shard/" in str(arguments[1]) and str(arguments[1]).endswith("manifest.json"):
        seals += 1
        if seals == 2:
            os.kill(os.getpid(), signal.SIGKILL)

if sys.argv[2] == "killed":
    sys.addaudithook(end_before_the_second_seal)
print(prepare(mixture, text, resources).digest)
"""
"""Prepares a mixture; `killed` ends it just before its second shard is sealed, when all of its files are there."""


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
    said = json.dumps([one.model_dump(mode="json") for one in (asked, make_text(), resources)])
    sealed: dict[Path, tuple[int, int]] = {}
    for how in (*["killed"] * KILLS, "whole"):
        process = subprocess.run(
            [sys.executable, "-c", PROGRAM, said, how], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False
        )
        now = _sealed(resources)
        assert sealed.items() <= now.items(), "a sealed shard was made again"
        if how == "killed":
            assert process.returncode == -signal.SIGKILL
            assert len(now) == len(sealed) + 1
        sealed = now
    assert process.stdout.split() == [whole.digest]
    assert len(sealed) == shards


def _sealed(resources: Resources) -> dict[Path, tuple[int, int]]:
    """Inode and time of every sealed shard's manifest."""
    sealed: dict[Path, tuple[int, int]] = {}
    for path in Path(resources.storage.store).glob("shard/*/manifest.json"):
        status = path.stat()
        sealed[path] = (status.st_ino, status.st_mtime_ns)
    return sealed
