"""Whose turn it is: a host that is slow or told to wait holds up its own URLs and no others."""

import asyncio

from vila_ops.data.download.schedule import FetchJob, HostSchedule


def jobs(*hosts: str) -> list[FetchJob]:
    return [FetchJob(f"http://{host}/{number}", host.encode()) for number, host in enumerate(hosts)]


def test_a_host_that_is_full_lets_the_next_one_go_first():
    async def order() -> list[str]:
        turns = HostSchedule(jobs("a", "a", "a", "b"), per_host=1, per_second=1e6)
        first, second = await turns.next(), await turns.next()
        turns.done(first)
        third = await turns.next()
        for job in (second, third):
            turns.done(job)
        fourth = await turns.next()
        turns.done(fourth)
        assert await turns.next() is None
        return [job.url[7:] for job in (first, second, third, fourth)]

    assert asyncio.run(order()) == ["a/0", "b/3", "a/1", "a/2"]


def test_a_job_that_comes_again_waits_and_the_others_of_its_host_do_not():
    async def order() -> list[str]:
        turns = HostSchedule(jobs("a", "a"), per_host=4, per_second=1e6)
        first = await turns.next()
        turns.again(first, seconds=0.05, pause_host=False)
        second = await turns.next()
        turns.done(second)
        third = await turns.next()
        turns.done(third)
        assert third.attempts == 2
        return [job.url[7:] for job in (first, second, third)]

    assert asyncio.run(order()) == ["a/0", "a/1", "a/0"]


def test_a_paused_host_waits_as_a_whole_while_others_go_on():
    async def order() -> list[str]:
        turns = HostSchedule(jobs("a", "a", "a", "b", "b"), per_host=2, per_second=1e6)
        first = await turns.next()
        turns.again(first, seconds=0.1, pause_host=True)
        begun = asyncio.get_running_loop().time()
        seen = []
        while (job := await turns.next()) is not None:
            seen.append(job.url[7:])
            if job.host == b"a":
                assert asyncio.get_running_loop().time() - begun >= 0.1
            turns.done(job)
        return seen

    seen = asyncio.run(order())
    assert seen[:2] == ["b/3", "b/4"]
    assert sorted(seen[2:]) == ["a/0", "a/1", "a/2"]
