"""Units of work in this process, or as Ray Data tasks on a cluster. Only configs and artifact references travel."""

import logging
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from vila_ops.artifacts import store
from vila_ops.artifacts.backend import AT_ONCE
from vila_ops.artifacts.kinds import Artifact
from vila_ops.cluster import connect, log_to_driver
from vila_ops.config import Config, Resources
from vila_ops.errors import RemoteError, is_final

Job = TypeVar("Job", bound=Config)
Result = TypeVar("Result", bound=Config)
Query = TypeVar("Query")
Answer = TypeVar("Answer")


def each(
    work: Callable[[Job], Result],
    jobs: Sequence[Job],
    *,
    makes: type[Result],
    resources: Resources,
    told: Callable[[int], object] = lambda _: None,
) -> list[Result]:
    """The result of `work`, a module-level function, for each job, in order; on Ray `prepare.num_workers` run at once.

    `told` is called with the number of jobs that are done, whenever one more is.

    Raises the final error of `work`, wherever it runs; if several jobs fail on Ray, the first that is received.
    """
    made: list[Result] = []
    if resources.launch == "inline" or not jobs:
        for one in jobs:
            made.append(work(one))
            told(len(made))
        return made
    import ray.data

    connect(resources)
    logging.getLogger("ray.data").setLevel(logging.WARNING)  # `told` tells the progress in fewer lines
    here = os.getcwd()
    items = [{"number": number, "job": one.model_dump_json(), "here": here} for number, one in enumerate(jobs)]
    pool = ray.data.TaskPoolStrategy(size=resources.prepare.num_workers)
    tasks = ray.data.from_items(items, override_num_blocks=len(items)).map(
        partial(_task, work=work, kind=type(jobs[0])), compute=pool
    )
    results: dict[int, Result] = {}
    for row in tasks.iter_rows():
        if not row["is_made"]:
            raise RemoteError.from_json(row["output"]).rebuilt()
        results[int(row["number"])] = makes.model_validate_json(row["output"])
        told(len(results))
    return [results[number] for number in range(len(jobs))]


def at_once(ask: Callable[[Query], Answer], queries: Iterable[Query]) -> list[Answer]:
    """The store's answers to many queries, in order, with many queries in flight: on S3 they are mostly waiting."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(ask, queries))


def files(artifacts: Iterable[Artifact], name: str) -> list[Path]:
    """The file of this name in each sealed artifact, on this machine."""
    return at_once(lambda one: store.file(one, name), artifacts)


def _task(row: dict[str, Any], *, work: Callable[[Any], Config], kind: type[Config]) -> dict[str, Any]:
    log_to_driver()
    if os.path.isdir(row["here"]):  # paths are relative to the driver's folder; workers start in another one
        os.chdir(row["here"])
    try:
        is_made, output = True, work(kind.model_validate_json(row["job"])).model_dump_json()
    except Exception as error:
        if not is_final(error):
            raise
        is_made, output = False, RemoteError.of(error).to_json()  # Ray would wrap it in an error of its own
    return {"number": row["number"], "is_made": is_made, "output": output}
