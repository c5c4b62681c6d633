"""Run the numerical tests as on other processors: `python tests/faults/processors.py [PYTEST'S ARGUMENTS]`.

torch, oneDNN and MKL choose kernels by the processor's instructions, and each kernel sums in another order. Each line
of the printed table is a run with one change. The last line has all changes but the second thread, as two threads wait
for each other in loops and are many times slower beside busy cores. Levels that this processor does not have or uses by
default, are skipped. Exits with 1 if a run failed.
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
"""Levels of torch's kernels, from the fewest required instructions to the most."""
BUSY = "import os\nparent = os.getppid()\nwhile os.getppid() == parent: pass"
"""A busy loop that also ends when its parent is gone."""


class Way(NamedTuple):
    """One way to run the tests."""

    name: str
    env: dict[str, str] = {}
    is_busy: bool = False
    """Whether a busy loop runs on each core."""


def ways() -> list[Way]:
    """Return each change alone, and several at once. Each changes the order of sums or the timing."""
    own = LEVELS.index(torch.backends.cpu.get_cpu_capability())
    threads = {"VILA_TEST_THREADS": "2", "OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "PASSIVE"}
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
    """Run a busy loop on each core, and end the loops by their process ids."""
    loops = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(os.cpu_count() or 1)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def run(way: Way, arguments: list[str]) -> bool:
    """Run the tests and print their line, and pytest's output if a test failed. Returns whether all passed."""
    command = [sys.executable, "-m", "pytest", *ARGUMENTS, *arguments]
    env = {**os.environ, **way.env}
    started = time.monotonic()
    if way.is_busy:
        with busy_cores():
            done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    else:
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    output = (done.stdout + done.stderr).rstrip()
    result = "passed" if done.returncode == 0 else "FAILED"
    _write(f"{way.name:<32} {result}  {output.rpartition(chr(10))[2]}  ({time.monotonic() - started:.0f} s)")
    if done.returncode:
        _write(f"{' '.join(f'{name}={value}' for name, value in way.env.items())}\n{output[-20_000:]}")
    return done.returncode == 0


def _write(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    passed = [run(way, sys.argv[1:] or TESTS) for way in ways()]
    sys.exit(not all(passed))
