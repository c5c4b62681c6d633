"""Submit a stage as a Ray job and watch it: the job outlives this process, and a new process re-attaches to it.

The job (`ray_job_main.py`, on the cluster's head) runs the whole task under launch `ray`: it takes the lease, trains
and seals. This process only submits and watches, so a stage that ends while nobody watches is in the store as well.
"""

import logging
import os
import time
from typing import Any

import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from vila_ops.cluster import passed_on
from vila_ops.errors import ClusterUnreachable, JobFailed, JobStopped, RemoteError
from vila_ops.train.job import JobPayload

ENTRYPOINT = "python -m vila_ops.train.ray_job_main"
PAYLOAD_VARIABLE = "VILA_OPS_STAGE"
"""Environment variable of the job that holds the JobPayload as JSON. It holds no secret."""
ERROR_PREFIX = "vila-ops error: "
"""Starts the line of the job's log that holds a RemoteError as JSON. Ray may print workers' lines around it."""
POLL_SECONDS = 2.0
STOP_TRIES = 3
"""How often jobs are looked for and stopped: one that Ray is about to start cannot be stopped yet, and would start; one
whose submission was cut off may not be in Ray's list yet."""
REQUEST_SECONDS = 30.0
"""How long one request to a job server may take; Ray's own client waits for ever."""
SILENCE_SECONDS = 60.0
"""How long a job server may give no answer before this process stops watching. The job may still run."""
PENDING_SECONDS = 1800.0
"""How long a job may wait for its start, by the clocks of the head and of who looks. Ray gives one up after 15 minutes,
but a job whose request broke off while it was submitted stays pending for ever.

RAY_JOB_START_TIMEOUT_SECONDS of the head sets Ray's time. Above this one, a retry submits another job beside one that
may still start; the lease of the stage lets one of them work at a time."""

log = logging.getLogger(__name__)


def train_as_job(key: str, payload: JobPayload) -> None:
    """Return when a job has sealed the stage of this address: the job that is running, or else a new one.

    A job outlives this process, however that ends, Ctrl-C included; `ray job stop ID` ends a job. Raises the task's
    error where that is final, JobFailed where the job failed otherwise, JobStopped, and ClusterUnreachable where the
    job server does not answer.
    """
    address = payload.resources.job_address
    client = _client(address)
    try:
        name = next(iter(live_jobs(client.list_jobs(), key)), None) or _submit(client, key, payload)
    except requests.RequestException as error:
        raise ClusterUnreachable(
            f"the job server at {address} did not say whether it took the job of {key}: {error}; the job may run, run "
            f"the stage again to re-attach"
        ) from error
    log.info("stage %s is job %s; `ray job stop %s --address %s` ends it", payload.stage.name, name, name, address)
    job = _watch(client, name)
    if job.status == JobStatus.STOPPED:
        raise JobStopped(f"job {name} was stopped; run {payload.stage.name} again to resume from its checkpoint")
    if job.driver_exit_code == os.EX_DATAERR:
        lines = client.get_job_logs(name).splitlines()
        text = next((line for line in reversed(lines) if line.startswith(ERROR_PREFIX)), None)
        if text is None:
            raise JobFailed(f"job {name} ended with a final error that its log lacks; see `ray job logs {name}`")
        raise RemoteError.from_json(text.removeprefix(ERROR_PREFIX)).rebuilt()
    if job.status != JobStatus.SUCCEEDED:
        raise JobFailed(f"job {name} failed: {job.message}")


def stop_job(key: str, address: str | None) -> None:
    """End the live jobs of an address, if there are any.

    Raises ClusterUnreachable, also for a job that Ray does not start meanwhile: nothing of ours ends it later.
    """
    client, left = _client(address), set[str]()
    try:
        for made in range(STOP_TRIES):
            if made:
                time.sleep(POLL_SECONDS)
            found = live_jobs(client.list_jobs(), key)
            stopped = {name for name in found if client.stop_job(name)}
            for name in sorted(stopped):
                log.info("stopped job %s", name)
            left = set(found) - stopped
            if not left and (found or made):
                return
    except (requests.RequestException, RuntimeError) as error:
        raise ClusterUnreachable(
            f"the job server at {address} did not stop the job of {key}: {error}; `ray job list --address {address}` "
            f"names it and `ray job stop` ends it"
        ) from error
    name = min(left)
    raise ClusterUnreachable(
        f"Ray has not started job {name} yet, so it did not stop it, and the job may still start and train; once it is "
        f"RUNNING, `ray job stop {name} --address {address}` ends it"
    )


class _Client(JobSubmissionClient):
    """Ray's client, whose requests end."""

    def _do_request(self, method: str, endpoint: str, **settings: Any) -> requests.Response:
        answer: requests.Response = super()._do_request(method, endpoint, **{"timeout": REQUEST_SECONDS, **settings})
        return answer


def _client(address: str | None) -> JobSubmissionClient:
    try:
        return _Client(address)
    except (ConnectionError, requests.Timeout) as error:
        raise ClusterUnreachable(
            f"no job server answers at {address}; set job_address to the address of Ray's dashboard"
        ) from error
    except AuthenticationError as error:
        raise ValueError(
            f"the job server at {address} asks for a token: set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH=FILE"
        ) from error


def live_jobs(jobs: list[JobDetails], key: str) -> list[str]:
    """Return the ids of an address's jobs that have not ended, the newest first."""
    live = [n for n, job in _attempts(jobs, key).items() if not job.status.is_terminal() and not _is_abandoned(job)]
    return [f"{key}-{number}" for number in sorted(live, reverse=True)]


def _is_abandoned(job: JobDetails) -> bool:
    """Whether a job will never start; where it does, it finds the lease of the next one."""
    if job.status != JobStatus.PENDING or job.start_time is None:
        return False
    return time.time() - job.start_time / 1000 > PENDING_SECONDS


def next_attempt(jobs: list[JobDetails], key: str) -> str:
    """Return the id for an address's next job."""
    return f"{key}-{1 + max(_attempts(jobs, key), default=0)}"


def _attempts(jobs: list[JobDetails], key: str) -> dict[int, JobDetails]:
    """Return an address's jobs by attempt number. Their ids are ADDRESS-ATTEMPT."""
    ids = [(job, *(job.submission_id or "").rpartition("-")) for job in jobs]
    return {int(number): job for job, address, _, number in ids if address == key and number.isdecimal()}


def _submit(client: JobSubmissionClient, key: str, payload: JobPayload) -> str:
    """Submit a job and return its id, or the id of a job that another process submitted at the same moment."""
    name = next_attempt(client.list_jobs(), key)
    try:
        client.submit_job(
            entrypoint=ENTRYPOINT,
            submission_id=name,
            runtime_env={"env_vars": {PAYLOAD_VARIABLE: payload.model_dump_json(), **passed_on()}},
            metadata={"stage": payload.stage.name, "address": key},
        )
    except RuntimeError:
        if name not in {job.submission_id for job in client.list_jobs()}:
            raise
    return name


def _watch(client: JobSubmissionClient, name: str) -> JobDetails:
    """Copy the job's lines to the log, from its first line on, until it ends. Returns the ended job."""
    shown, last_answer = 0, time.monotonic()
    while True:
        try:
            job = client.get_job_info(name)
            lines = client.get_job_logs(name).splitlines(keepends=True)
        except (requests.RequestException, RuntimeError) as error:
            if time.monotonic() - last_answer > SILENCE_SECONDS:
                raise ClusterUnreachable(
                    f"the job server has not answered about job {name} for {SILENCE_SECONDS:.0f} s: {error}; the job "
                    f"may still run, run the stage again to re-attach"
                ) from error
            time.sleep(POLL_SECONDS)
            continue
        last_answer = time.monotonic()
        if _is_abandoned(job):
            raise JobFailed(f"job {name} has waited for its start for {PENDING_SECONDS / 60:.0f} minutes")
        complete = len(lines) if job.status.is_terminal() or not lines or lines[-1].endswith("\n") else len(lines) - 1
        for line in lines[shown:complete]:
            log.info("%s", line.rstrip("\n"))
        shown = complete
        if job.status.is_terminal():
            return job
        time.sleep(POLL_SECONDS)
