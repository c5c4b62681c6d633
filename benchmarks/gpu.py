"""What a GPU can show, in parts that each take at most four minutes and leave a result: `make gpu`.

`python benchmarks/gpu.py [PART ...]` runs some. A part that takes longer is ended. VILA_BENCH_SMALL=1 runs all in small
without a GPU. Results of parts on a GPU are kept in results/; ends with 1 if a part failed or missed its target.
"""

import json
import subprocess
import sys
import time
from pathlib import Path

from gpu_model import SMALL, device
from result import folder_of_results

PARTS = ("gpu_tests", "gpu_mfu", "gpu_memory", "gpu_kernels", "gpu_zero", "gpu_decode")
SECONDS = 240


def main(names: list[str]) -> int:
    """Run parts one after another, and list what became of each."""
    device()  # ends the process here if there is none
    outcomes = {name: outcome(name) for name in names or PARTS}
    for name, (text, took) in outcomes.items():
        print(f"{name:<12} {took:4.0f} s  {text}")
    return 0 if all(text.startswith("ok") or (SMALL and "missed" in text) for text, _ in outcomes.values()) else 1


def outcome(name: str) -> tuple[str, float]:
    """What became of a part, and its seconds."""
    started, file = time.monotonic(), folder_of_results() / f"{name}.json"
    before = file.stat().st_mtime_ns if file.exists() else 0
    try:
        subprocess.run([sys.executable, Path(__file__).with_name(f"{name}.py")], check=True, timeout=SECONDS)
    except subprocess.CalledProcessError as error:
        return f"failed with exit code {error.returncode}; its error is above", time.monotonic() - started
    except subprocess.TimeoutExpired:
        return f"ended after {SECONDS} s", time.monotonic() - started
    took = time.monotonic() - started
    if not file.exists() or file.stat().st_mtime_ns == before:
        return "left no result", took
    said = json.loads(file.read_text())
    told = f"{said['ours']} {said['unit']}, {said['ratio']} of {said['peer']}; target {said['target']}"
    return f"{'ok' if said['ok'] else 'missed'}: {told}; {file}", took


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
