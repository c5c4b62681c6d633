"""Registers a model in a process that starts with others: `racing.py INPUTS.json FOLDER COUNT` prints the version.

Each process makes a file in FOLDER when MLflow is loaded and connected, and registers when there are COUNT files.
"""

import json
import os
import sys
import time
from pathlib import Path

from vila_ops.artifacts.kinds import Checkpoint, EvalReport
from vila_ops.config import Gate, Resources
from vila_ops.registry.register import champion, register


def main(inputs: Path, folder: Path, count: int) -> None:
    """Register."""
    gate, model, report, given = json.loads(inputs.read_text())
    resources = Resources.model_validate(given)
    champion(Gate.model_validate(gate), resources)
    (folder / str(os.getpid())).touch()
    while len(list(folder.iterdir())) < count:
        time.sleep(0.001)
    arguments = Gate.model_validate(gate), Checkpoint.model_validate(model), EvalReport.model_validate(report)
    sys.stdout.write(register(*arguments, None, resources).model_dump_json())


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
