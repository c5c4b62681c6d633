"""The packing planner at 10^5 ... 10^8 samples with LLaVA-like lengths, sequences of 4096: seconds, peak memory, slope.

Each size runs in a process of its own; the memory includes Python, numpy and the lengths (uint16). Peer: TRL's
best-fit decreasing over all samples at once, at the sizes that fit in memory; it moves the tokens too (here of one
byte). Targets: 10^8 samples in 60 s and 2 GB, and a slope of log seconds over log samples of at most 1.1, over all
sizes and in the last step. The slope is that of CPU seconds, which other processes disturb less.
"""

import json
import os
import subprocess
import sys

import numpy as np
from peers import TRL, installed
from result import result

SIZES = (10**5, 10**6, 10**7, 10**8)
PEER_SIZES = (10**5, 10**6)
MAX_SECONDS, MAX_BYTES, MAX_SLOPE = 60.0, 2 * 10**9, 1.1
OURS = """
import json, resource, sys, time
from peers import llava_like
from vila_ops.data.loading.planner import plan

lengths, shows = llava_like(int(sys.argv[1]))
del shows
plan(lengths[:1000], capacity=4096, seed=[0])
start, cpu = time.perf_counter(), time.process_time()
made = plan(lengths, capacity=4096, seed=[0])
seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
share = int(lengths.sum(dtype="int64")) / (len(made) * 4096)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"seconds": round(seconds, 2), "cpu": round(cpu, 2), "bytes": peak, "share": round(share, 4)}))
"""
THEIRS = """
import json, resource, sys, time
from peers import llava_like, trl_rows

lengths, _ = llava_like(int(sys.argv[1]))
trl_rows(lengths[:1000], 4096, batch_size=None)
start, cpu = time.perf_counter(), time.process_time()
rows = trl_rows(lengths, 4096, batch_size=None)
seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
share = int(lengths.sum(dtype="int64")) / (rows * 4096)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"seconds": round(seconds, 2), "cpu": round(cpu, 2), "bytes": peak, "share": round(share, 4)}))
"""


def main() -> None:
    ours = {size: _measured(OURS, size) for size in SIZES}
    with installed(*TRL):
        theirs = {size: _measured(THEIRS, size) for size in PEER_SIZES}
    seconds = [ours[size]["cpu"] for size in SIZES]
    slope = float(np.polyfit(np.log(SIZES), np.log(seconds), 1)[0])
    last = float(np.log(seconds[-1] / seconds[-2]) / np.log(SIZES[-1] / SIZES[-2]))
    largest = ours[SIZES[-1]]
    result(
        "planner",
        ours=ours[PEER_SIZES[-1]]["seconds"],
        peer=theirs[PEER_SIZES[-1]]["seconds"],
        target=MAX_SECONDS,
        ok=largest["seconds"] <= MAX_SECONDS and largest["bytes"] <= MAX_BYTES and max(slope, last) <= MAX_SLOPE,
        unit="s for 10^6 samples; the target is for 10^8",
        seconds_for_1e8=largest["seconds"],
        gb_for_1e8=round(largest["bytes"] / 1e9, 3),
        slope=round(slope, 3),
        slope_of_last_step=round(last, 3),
        sizes=ours,
        trl_bfd=theirs,
    )


def _measured(code: str, size: int) -> dict[str, float]:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run(
        [sys.executable, "-c", code, str(size)], env=env, stdout=subprocess.PIPE, text=True, check=True
    )
    said: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    print(f"{size:.0e}: {said}", file=sys.stderr)
    return said


if __name__ == "__main__":
    main()
