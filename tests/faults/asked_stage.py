"""A flow that asks for one stage: `python asked_stage.py ASKED.json MADE.json`; writes the checkpoint's handle."""

import logging
import sys
from pathlib import Path

from vila_ops.train.job import JobPayload
from vila_ops.train.stage import train_stage

if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, stream=sys.stdout, format="%(message)s")
    logging.getLogger("vila_ops").setLevel(logging.INFO)
    asked = JobPayload.model_validate_json(Path(sys.argv[1]).read_text())
    made = train_stage(asked.stage, asked.model, asked.data, asked.init, asked.resources)
    Path(sys.argv[2]).write_text(made.model_dump_json())
