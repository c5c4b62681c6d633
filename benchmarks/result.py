"""The one form of a benchmark's result: a JSON object, printed as the last line and kept in results/.

Those of VILA_BENCH_SMALL=1 are kept in build/small, which git ignores.
"""

import json
import os
import platform
from pathlib import Path
from typing import Any

import psutil

from vila_ops.artifacts.execution import versions


def folder_of_results() -> Path:
    """Where results are kept."""
    here = Path(__file__).parent
    return here.parent / "build/small" if os.environ.get("VILA_BENCH_SMALL") else here / "results"


def result(name: str, *, ours: float, peer: float, target: float, ok: bool, **more: Any) -> None:
    """Print a result and write it to results/; `ratio` is ours / peer."""
    record = {
        "name": name,
        "ours": round(ours, 3),
        "peer": round(peer, 3),
        "ratio": round(ours / peer, 3),
        "target": target,
        "ok": ok,
        **more,
        "machine": f"{platform.machine()}, {psutil.cpu_count()} cores, {psutil.virtual_memory().total >> 30} GiB",
        "versions": versions(),
    }
    folder = folder_of_results()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record))
