"""Every inline path on a device with the rules of a GPU, in a process of its own, as torch has one such device each."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

PATHS = Path(__file__).with_name("inline_paths.py")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_inline_path_computes_on_the_device_what_it_computes_on_the_cpu() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(PATHS)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    done = subprocess.run(command, cwd=PATHS.parents[2], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-10_000:]
