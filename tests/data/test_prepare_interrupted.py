"""Prepare that is killed goes on at the first unit that is not sealed, and ends with the same bytes."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from vila_ops.config import Mixture, Resources, TextFormat
from vila_ops.data.preprocess.prepare import prepare

ROOT = Path(__file__).parents[2]
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

sys.addaudithook(end_before_the_second_seal)
print(prepare(mixture, text, resources).digest)
"""
"""Killed from outside after its first seal, and where that is late on a busy machine, by itself before the second."""


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
    kills = 0
    while True:
        process = subprocess.Popen([sys.executable, "-c", PROGRAM, said], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        while process.poll() is None and len(now := _sealed(resources)) <= len(sealed):
            time.sleep(0.002)
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
        said_last, _ = process.communicate(timeout=60)
        now = _sealed(resources)
        assert sealed.items() <= now.items(), "a sealed shard was made again"
        sealed = now
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL
        kills += 1
    assert kills >= 3
    assert said_last.split() == [whole.digest]
    assert len(sealed) == shards


def _sealed(resources: Resources) -> dict[Path, tuple[int, int]]:
    """Inode and time of every sealed shard's manifest."""
    found: dict[Path, tuple[int, int]] = {}
    for path in Path(resources.storage.store).glob("shard/*/manifest.json"):
        status = path.stat()
        found[path] = (status.st_ino, status.st_mtime_ns)
    return found
