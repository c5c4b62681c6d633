"""The Ray job that `ray_job.py` submits: `python -m vila_ops.train.ray_job_main`, on the cluster's head.

It reads a JobPayload from its environment and runs the task `train_stage` under launch `ray`.
"""

import os
import sys
from contextlib import suppress

from vila_ops.cluster import log_to_driver
from vila_ops.errors import RemoteError, is_final
from vila_ops.train.job import JobPayload
from vila_ops.train.ray_job import ERROR_PREFIX, PAYLOAD_VARIABLE
from vila_ops.train.stage import train_stage


def main() -> None:
    """Run the task. A final error is printed as a RemoteError on a line of its own."""
    log_to_driver()
    payload = JobPayload.model_validate_json(os.environ.pop(PAYLOAD_VARIABLE))
    with suppress(FileNotFoundError):
        os.chdir(payload.working_directory)
    resources = payload.resources.with_changes({"launch": "ray", "job_address": None})
    try:
        train_stage(payload.stage, payload.model, payload.data, payload.init, resources, payload.context)
    except Exception as error:
        if not is_final(error):
            raise
        sys.stdout.write(f"\n{ERROR_PREFIX}{RemoteError.of(error).to_json()}\n")
        sys.exit(os.EX_DATAERR)


if __name__ == "__main__":
    main()
