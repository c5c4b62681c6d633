"""Units of work in this process, or as Ray Data tasks on a cluster's nodes. Only addresses travel, never images."""

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

Asked = TypeVar("Asked", bound=Config)
Made = TypeVar("Made", bound=Config)
Place = TypeVar("Place")
Answer = TypeVar("Answer")


def each(
    work: Callable[[Asked], Made], asked: Sequence[Asked], *, makes: type[Made], resources: Resources
) -> list[Made]:
    """What `work`, a function of a module, makes of each, in their order; `prepare_workers` at once on Ray.

    Raises the final error that `work` raises, wherever it runs; of several on Ray the first that arrives.
    """
    if resources.launch == "inline" or not asked:
        return [work(one) for one in asked]
    import ray.data

    connect(resources)
    here = os.getcwd()
    items = [{"number": number, "asked": one.model_dump_json(), "here": here} for number, one in enumerate(asked)]
    pool = ray.data.TaskPoolStrategy(size=resources.prepare.num_workers)
    tasks = ray.data.from_items(items, override_num_blocks=len(items)).map(
        partial(_task, work=work, kind=type(asked[0])), compute=pool
    )
    made: dict[int, Made] = {}
    for row in tasks.iter_rows():
        if not row["is_made"]:
            raise RemoteError.from_json(row["said"]).rebuilt()
        made[int(row["number"])] = makes.model_validate_json(row["said"])
    return [made[number] for number in range(len(asked))]


def at_once(ask: Callable[[Place], Answer], places: Iterable[Place]) -> list[Answer]:
    """The store's answers about many places, in their order: on S3 almost all of each is waiting."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(ask, places))


def files(made: Iterable[Artifact], name: str) -> list[Path]:
    """The file of that name of each sealed artifact, on this machine."""
    return at_once(lambda one: store.file(one, name), made)


def _task(row: dict[str, Any], *, work: Callable[[Any], Config], kind: type[Config]) -> dict[str, Any]:
    log_to_driver()
    if os.path.isdir(row["here"]):  # what is relative is so to the driver's folder; a node starts workers in its own
        os.chdir(row["here"])
    try:
        is_made, said = True, work(kind.model_validate_json(row["asked"])).model_dump_json()
    except Exception as error:
        if not is_final(error):
            raise
        is_made, said = False, RemoteError.of(error).to_json()  # Ray would wrap it in an error of its own
    return {"number": row["number"], "is_made": is_made, "said": said}
