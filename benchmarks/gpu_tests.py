"""The tests that are marked gpu. `ours` passed, of the `peer` that ran. Target: all, and at least one on a GPU.

Without a GPU they skip themselves, which VILA_BENCH_SMALL=1 accepts.
"""

import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from gpu_model import SMALL, device
from result import result

from vila_ops.device import describe

ROOT = Path(__file__).parents[1]
FILES = ("tests/model/test_attention.py", "tests/model/test_copies.py", "tests/model/test_loss.py")


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        arguments = ["-q", "-m", "gpu", "-p", "no:cacheprovider", "-p", "no:xdist", f"--junit-xml={report}", *FILES]
        subprocess.run([sys.executable, "-m", "pytest", *arguments], cwd=ROOT, check=False)
        suite = next(ElementTree.parse(report).getroot().iter("testsuite"))
    ran, skipped, *failed = (int(suite.attrib[key]) for key in ("tests", "skipped", "failures", "errors"))
    passed = ran - skipped - sum(failed)
    result(
        "gpu_tests",
        ours=passed,
        peer=max(1, ran - skipped),
        target=1.0,
        ok=not any(failed) and (SMALL or passed > 0),
        unit="tests",
        skipped=skipped,
        device=describe(device()),
    )


if __name__ == "__main__":
    main()
