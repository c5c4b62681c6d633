"""Runs one stage: `python stage_process.py PAYLOAD.json CHECKPOINT.json`; writes the reference of its checkpoint."""

import logging
import sys
from pathlib import Path

from vila_ops.train.job import JobPayload
from vila_ops.train.stage import train_stage

if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, stream=sys.stdout, format="%(message)s")
    logging.getLogger("vila_ops").setLevel(logging.INFO)
    payload = JobPayload.model_validate_json(Path(sys.argv[1]).read_text())
    checkpoint = train_stage(payload.stage, payload.model, payload.data, payload.init, payload.resources)
    Path(sys.argv[2]).write_text(checkpoint.model_dump_json())
