"""Ids of a stage's Ray jobs, without a cluster; tests/faults/test_nodes.py runs jobs on a cluster."""

import pytest
from ray.job_submission import JobDetails, JobStatus, JobType

from vila_ops.config import Resources
from vila_ops.train.ray_job import newest_live, next_attempt
from vila_ops.train.ray_workers import network_variables

KEY = "0123456789abcdef0123456789abcdef"


def job(submission_id: str | None, status: JobStatus) -> JobDetails:
    kind = JobType.DRIVER if submission_id is None else JobType.SUBMISSION
    return JobDetails(type=kind, submission_id=submission_id, status=status, entrypoint="python")


@pytest.mark.parametrize(
    ("jobs", "live", "following"),
    [
        ([], None, f"{KEY}-1"),
        ([(f"{KEY}-1", "FAILED"), (f"{KEY}-2", "STOPPED")], None, f"{KEY}-3"),
        ([(f"{KEY}-9", "RUNNING"), (f"{KEY}-10", "PENDING"), (f"{KEY}-8", "RUNNING")], f"{KEY}-10", f"{KEY}-11"),
        ([(f"{KEY}-1", "RUNNING"), (f"{KEY}-2", "SUCCEEDED")], f"{KEY}-1", f"{KEY}-3"),
        ([(f"{KEY[::-1]}-7", "RUNNING"), (None, "RUNNING"), (f"{KEY}-by-hand", "RUNNING")], None, f"{KEY}-1"),
    ],
)
def test_the_newest_live_job_of_an_address_is_found_among_all_jobs(
    jobs: list[tuple[str | None, str]], live: str | None, following: str
) -> None:
    details = [job(name, JobStatus(status)) for name, status in jobs]
    assert newest_live(details, KEY) == live
    assert next_attempt(details, KEY) == following


def test_variables_of_the_network_win_over_its_interface() -> None:
    cluster = {"launch": "ray", "ray_address": "head:1"}
    assert network_variables(Resources.model_validate(cluster)) == {}
    network = {"interface": "eth0", "env": {"NCCL_SOCKET_IFNAME": "ib0", "NCCL_DEBUG": "WARN"}}
    assert network_variables(Resources.model_validate({**cluster, "train": {"network": network}})) == {
        "GLOO_SOCKET_IFNAME": "eth0",
        "NCCL_SOCKET_IFNAME": "ib0",
        "NCCL_DEBUG": "WARN",
    }
