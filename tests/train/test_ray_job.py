"""Ids of a stage's Ray jobs, without a cluster; tests/faults/test_nodes.py runs jobs on a cluster."""

import socket
from types import SimpleNamespace
from typing import Any

import pytest
import requests
from ray.job_submission import JobDetails, JobStatus, JobType

from vila_ops.config import Resources
from vila_ops.errors import ClusterUnreachable, JobFailed, is_final
from vila_ops.train import ray_job
from vila_ops.train.ray_job import live_jobs, next_attempt
from vila_ops.train.ray_workers import network_variables

KEY = "0123456789abcdef0123456789abcdef"


def job(submission_id: str | None, status: JobStatus, **more: int) -> JobDetails:
    kind = JobType.DRIVER if submission_id is None else JobType.SUBMISSION
    return JobDetails(type=kind, submission_id=submission_id, status=status, entrypoint="python", **more)


@pytest.mark.parametrize(
    ("jobs", "live", "following"),
    [
        ([], [], 1),
        ([(f"{KEY}-1", "FAILED"), (f"{KEY}-2", "STOPPED")], [], 3),
        ([(f"{KEY}-9", "RUNNING"), (f"{KEY}-10", "PENDING"), (f"{KEY}-8", "RUNNING")], [10, 9, 8], 11),
        ([(f"{KEY}-1", "RUNNING"), (f"{KEY}-2", "SUCCEEDED")], [1], 3),
        ([(f"{KEY[::-1]}-7", "RUNNING"), (None, "RUNNING"), (f"{KEY}-by-hand", "RUNNING")], [], 1),
    ],
)
def test_the_live_jobs_of_an_address_are_found_among_all_jobs(
    jobs: list[tuple[str | None, str]], live: list[int], following: int
) -> None:
    details = [job(name, JobStatus(status)) for name, status in jobs]
    assert live_jobs(details, KEY) == [f"{KEY}-{number}" for number in live]
    assert next_attempt(details, KEY) == f"{KEY}-{following}"


def test_a_job_that_ray_lost_while_it_was_submitted_is_waited_for_no_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    """It stays pending for ever (ray-project/ray#62766). Its times are in milliseconds."""
    began = 1_700_000_000
    lost = job(f"{KEY}-3", JobStatus.PENDING, start_time=began * 1000)

    class Server:
        def get_job_info(self, name: str) -> JobDetails:
            return lost

        def get_job_logs(self, name: str) -> str:
            return ""

    def looked(seconds: int) -> list[str]:
        monkeypatch.setattr(ray_job.time, "time", lambda: began + seconds)
        return live_jobs([lost], KEY)

    assert looked(1800) == [f"{KEY}-3"]
    assert looked(1801) == []
    assert next_attempt([lost], KEY) == f"{KEY}-4"
    with pytest.raises(JobFailed, match=f"^job {KEY}-3 has waited for its start for 30 minutes$"):
        ray_job._watch(Server(), f"{KEY}-3")  # type: ignore[arg-type] its two questions
    assert not is_final(JobFailed("")), "the next try submits another job"


@pytest.mark.parametrize("starting", [0, 2, 3])
def test_a_job_that_ray_is_about_to_start_is_stopped_once_it_can_be(
    starting: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray's answer is False until the job has a supervisor."""
    asked: list[str] = []
    waits: list[float] = []

    class Server:
        def list_jobs(self) -> list[JobDetails]:
            return [job(f"{KEY}-1", JobStatus.FAILED), job(f"{KEY}-2", JobStatus.PENDING)]

        def stop_job(self, name: str) -> bool:
            asked.append(name)
            return len(asked) > starting

    monkeypatch.setattr(ray_job, "_client", lambda _: Server())
    monkeypatch.setattr(ray_job.time, "sleep", waits.append)
    if starting < 3:
        ray_job.stop_job(KEY, "http://head")
    else:
        with pytest.raises(ClusterUnreachable, match=f"RUNNING, `ray job stop {KEY}-2 --address http://head` ends it"):
            ray_job.stop_job(KEY, "http://head")
    assert asked == [f"{KEY}-2"] * min(starting + 1, 3)
    assert waits == [2.0] * min(starting, 2), "none after the last try"


@pytest.mark.parametrize("appears", [1, 2, 3])
def test_every_live_job_is_stopped_also_one_that_appears_late(appears: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal may cut off the request that submits a job, which Ray's list then has a moment later."""
    looks: list[int] = []
    stopped: list[str] = []

    class Server:
        def list_jobs(self) -> list[JobDetails]:
            looks.append(1)
            live = [job(f"{KEY}-1", JobStatus.RUNNING), job(f"{KEY}-2", JobStatus.RUNNING)]
            return live if len(looks) >= appears else []

        def stop_job(self, name: str) -> bool:
            stopped.append(name)
            return True

    monkeypatch.setattr(ray_job, "_client", lambda _: Server())
    monkeypatch.setattr(ray_job.time, "sleep", lambda _: None)
    ray_job.stop_job(KEY, "http://head")
    assert len(looks) == min(appears, 2)
    assert stopped == [f"{KEY}-2", f"{KEY}-1"] * (appears <= 2), "without a job, the second look is the last"


def test_a_job_server_that_says_nothing_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setattr(ray_job, "REQUEST_SECONDS", 0.2)
        with pytest.raises(ClusterUnreachable, match=address):
            ray_job.stop_job(KEY, address)


@pytest.mark.parametrize("silent", ["list_jobs", "submit_job"])
def test_a_submission_that_is_not_answered_may_be_followed_by_the_next_try(
    silent: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Server:
        def list_jobs(self) -> list[JobDetails]:
            return self._answer("list_jobs", [])

        def submit_job(self, **_: Any) -> list[JobDetails]:
            return self._answer("submit_job", [])

        def _answer(self, what: str, jobs: list[JobDetails]) -> list[JobDetails]:
            if what == silent:
                raise requests.ReadTimeout("Read timed out.")
            return jobs

    monkeypatch.setattr(ray_job, "_client", lambda _: Server())
    payload: Any = SimpleNamespace(
        resources=SimpleNamespace(job_address="http://head"), stage=SimpleNamespace(name="sft"),
        model_dump_json=lambda: "{}",
    )  # fmt: skip
    with pytest.raises(ClusterUnreachable, match=r"; the job may run, run the stage again to re-attach$"):
        ray_job.train_as_job(KEY, payload)


def test_variables_of_the_network_win_over_its_interface() -> None:
    cluster = {"launch": "ray", "ray_address": "head:1"}
    assert network_variables(Resources.model_validate(cluster)) == {}
    network = {"interface": "eth0", "env": {"NCCL_SOCKET_IFNAME": "ib0", "NCCL_DEBUG": "WARN"}}
    assert network_variables(Resources.model_validate({**cluster, "train": {"network": network}})) == {
        "GLOO_SOCKET_IFNAME": "eth0",
        "NCCL_SOCKET_IFNAME": "ib0",
        "NCCL_DEBUG": "WARN",
    }
