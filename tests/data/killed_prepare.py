"""Prepares a mixture: `killed_prepare.py INPUTS.json HOW` prints the dataset's digest.

HOW is `whole`, or `killed`: it is killed just before its second shard is sealed, when all of its files are there.
"""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from vila_ops.config import Mixture, Resources, TextFormat
from vila_ops.data.preprocess.prepare import prepare

seals = 0


def end_before_the_second_seal(event: str, arguments: tuple[Any, ...]) -> None:
    """An audit hook."""
    global seals
    if event == "os.link" and "/shard/" in str(arguments[1]) and str(arguments[1]).endswith("manifest.json"):
        seals += 1
        if seals == 2:
            os.kill(os.getpid(), signal.SIGKILL)


def main(inputs: Path, how: str) -> None:
    """Prepare."""
    mixture, text, resources = json.loads(inputs.read_text())
    if how == "killed":
        sys.addaudithook(end_before_the_second_seal)
    dataset = prepare(
        Mixture.model_validate(mixture), TextFormat.model_validate(text), Resources.model_validate(resources)
    )
    sys.stdout.write(dataset.digest)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
