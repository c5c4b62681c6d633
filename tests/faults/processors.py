"""The tests of what torch computes, as on other processors: `python tests/faults/processors.py [PYTEST'S ARGUMENTS]`.

torch, oneDNN and MKL choose their kernels by the processor's instructions, and each adds up in an order of its own.
Each line of the table that it prints is a run with one thing changed, and the last with all but the second thread,
which waits for the first in a loop and beside busy cores takes many times as long. Levels that this
processor lacks, or has by itself, are passed over. Ends with 1 where a run failed.
"""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path(__file__).parents[2]
TESTS = [f"tests/{name}" for name in ("train", "model", "generate", "eval")]
ARGUMENTS = [
    "-q",
    "-m",
    "not ray and not real and not gpu",
    "-p",
    "no:cacheprovider",
    "--timeout=3000",
    "--tb=short",
    "--show-capture=no",
]
LEVELS = ("DEFAULT", "AVX2", "AVX512")
"""Of torch's own kernels, by rising demands."""
BUSY = "import os\nparent = os.getppid()\nwhile os.getppid() == parent: pass"
"""Ends by itself too, when whoever started it is gone."""


class Way(NamedTuple):
    """How the tests are run."""

    name: str
    env: dict[str, str] = {}
    is_busy: bool = False
    """Beside a busy loop on each core."""


def ways() -> list[Way]:
    """Each change alone, and several at once; every one of them is another order of sums, or another timing."""
    own = LEVELS.index(torch.backends.cpu.get_cpu_capability())
    threads = {"VILA_TEST_THREADS": "2", "OMP_NUM_THREADS": "2"}
    least = {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_CBWR": "COMPATIBLE"}
    return [
        Way("as it is"),
        *(Way(f"ATen {level}", {"ATEN_CPU_CAPABILITY": level.lower()}) for level in LEVELS[:own]),
        Way("oneDNN SSE41", {"ONEDNN_MAX_CPU_ISA": "SSE41"}),
        *([Way("oneDNN AVX2", {"ONEDNN_MAX_CPU_ISA": "AVX2"})] if own == LEVELS.index("AVX512") else []),
        Way("MKL of any processor", {"MKL_CBWR": "COMPATIBLE"}),
        Way("two threads", threads),
        Way("busy cores", is_busy=True),
        Way("the least of each, busy cores", least, is_busy=True),
    ]


@contextmanager
def busy_cores() -> Iterator[None]:
    """A loop on each core, ended by its process id."""
    loops = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(os.cpu_count() or 1)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def run(way: Way, arguments: list[str]) -> bool:
    """Run the tests, print their line, and where one failed what pytest says; returns whether all passed."""
    command = [sys.executable, "-m", "pytest", *ARGUMENTS, *arguments]
    env = {**os.environ, **way.env}
    started = time.monotonic()
    if way.is_busy:
        with busy_cores():
            done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    else:
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    said = (done.stdout + done.stderr).rstrip()
    result = "passed" if done.returncode == 0 else "FAILED"
    _write(f"{way.name:<32} {result}  {said.rpartition(chr(10))[2]}  ({time.monotonic() - started:.0f} s)")
    if done.returncode:
        _write(f"{' '.join(f'{name}={value}' for name, value in way.env.items())}\n{said[-20_000:]}")
    return done.returncode == 0


def _write(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    passed = [run(way, sys.argv[1:] or TESTS) for way in ways()]
    sys.exit(not all(passed))
