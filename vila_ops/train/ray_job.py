"""A stage as a job of the cluster: it goes on when the process that asked for it ends, and a new one finds it again.

The job is the whole task under launch `ray`, on the cluster's head: it takes the lease, trains and seals. So the
process that asked only watches, and a stage that ends while nobody does is in the store all the same. Also the job
itself: `python -m vila_ops.train.ray_job` reads what was asked for from the environment.
"""

import logging
import os
import sys
import time
from contextlib import suppress

import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from vila_ops.cluster import log_to_driver
from vila_ops.train.job import FINAL, RemoteError, StageInputs
from vila_ops.train.stage import train_stage

ASKED = "VILA_OPS_STAGE"
"""Variable of the job that says which stage; it holds no secret, and is in no command line."""
SAYS = "vila-ops says "
"""Before what is wrong, on a line of its own: Ray may print workers' lines around it."""
POLL_SECONDS = 2.0
UNHEARD_SECONDS = 60.0
"""A job server that does not answer for so long is given up; the job may well go on."""

log = logging.getLogger(__name__)


class JobPayload(StageInputs):
    """What a job is told."""

    here: str
    """Working directory of who asks: what is relative is so to it, if the head has such a folder."""


def train_as_job(key: str, asked: JobPayload) -> None:
    """Return when the stage of this address is sealed, by a job that runs already or a new one.

    A job outlives this process, however that ends, Ctrl-C included; `ray job stop ID` ends one. Raises what the task
    raised where another try would raise it again (FINAL), else RuntimeError, and OSError where the
    job server does not answer.
    """
    address = asked.resources.job_address
    try:
        client = JobSubmissionClient(address)
    except ConnectionError as error:
        raise ConnectionError(f"no job server answers at {address}; job_address is that of the dashboard") from error
    except AuthenticationError as error:
        raise ValueError(
            f"the job server at {address} asks for a token: set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH=FILE"
        ) from error
    name = newest_live(client.list_jobs(), key) or _submit(client, key, asked)
    log.info("stage %s is job %s; `ray job stop %s --address %s` ends it", asked.stage.name, name, name, address)
    job = _watch(client, name)
    if job.status == JobStatus.STOPPED:
        raise RuntimeError(f"job {name} was stopped; asked for again, {asked.stage.name} goes on from its checkpoint")
    if job.driver_exit_code == os.EX_DATAERR:
        lines = client.get_job_logs(name).splitlines()
        said = next(line for line in reversed(lines) if line.startswith(SAYS)).removeprefix(SAYS)
        raise RemoteError.model_validate_json(said).again()
    if job.status != JobStatus.SUCCEEDED:
        raise RuntimeError(f"job {name} failed: {job.message}")


def newest_live(jobs: list[JobDetails], key: str) -> str | None:
    """The id of an address's newest job that has not ended; None where there is none."""
    live = [number for number, job in _attempts(jobs, key).items() if not job.status.is_terminal()]
    return f"{key}-{max(live)}" if live else None


def next_attempt(jobs: list[JobDetails], key: str) -> str:
    """The id of an address's next job."""
    return f"{key}-{1 + max(_attempts(jobs, key), default=0)}"


def _attempts(jobs: list[JobDetails], key: str) -> dict[int, JobDetails]:
    """Jobs of an address by attempt; their ids are ADDRESS-ATTEMPT."""
    ids = [(job, *(job.submission_id or "").rpartition("-")) for job in jobs]
    return {int(number): job for job, own, _, number in ids if own == key and number.isdecimal()}


def _submit(client: JobSubmissionClient, key: str, asked: JobPayload) -> str:
    """The id of a new job, or of the one that another process submitted at the same moment."""
    name = next_attempt(client.list_jobs(), key)
    told = {"env_vars": {ASKED: asked.model_dump_json()}}
    try:
        client.submit_job(
            entrypoint="python -m vila_ops.train.ray_job",
            submission_id=name,
            runtime_env=told,
            metadata={"stage": asked.stage.name, "address": key},
        )
    except RuntimeError:
        if name not in {job.submission_id for job in client.list_jobs()}:
            raise
    return name


def _watch(client: JobSubmissionClient, name: str) -> JobDetails:
    """The job when it has ended. Until then its lines go to the log, on its first look those from before too."""
    shown, heard = 0, time.monotonic()
    while True:
        try:
            job = client.get_job_info(name)
            lines = client.get_job_logs(name).splitlines(keepends=True)
        except (requests.RequestException, RuntimeError) as error:
            if time.monotonic() - heard > UNHEARD_SECONDS:
                raise ConnectionError(f"the job server says nothing of job {name} any more: {error}") from error
            time.sleep(POLL_SECONDS)
            continue
        heard = time.monotonic()
        whole = len(lines) if job.status.is_terminal() or not lines or lines[-1].endswith("\n") else len(lines) - 1
        for line in lines[shown:whole]:
            log.info("%s", line.rstrip("\n"))
        shown = whole
        if job.status.is_terminal():
            return job
        time.sleep(POLL_SECONDS)


def main() -> None:
    """The job: the task, and where it says what is wrong, that on a line of its own."""
    log_to_driver()
    asked = JobPayload.model_validate_json(os.environ.pop(ASKED))
    with suppress(FileNotFoundError):
        os.chdir(asked.here)
    resources = asked.resources.with_changes({"launch": "ray", "job_address": None})
    try:
        train_stage(asked.stage, asked.model, asked.data, asked.init, resources, asked.context)
    except FINAL as error:
        sys.stdout.write(f"\n{SAYS}{RemoteError.of(error).model_dump_json()}\n")
        sys.exit(os.EX_DATAERR)


if __name__ == "__main__":
    main()
