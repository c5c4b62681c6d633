"""The connection of this process to the Ray cluster that is already up."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from vila_ops.config import Resources


@contextmanager
def connected(resources: Resources) -> Iterator[None]:
    """Connect to the cluster of the resources for the body; a connection that is there already is kept."""
    import ray

    if ray.is_initialized():
        yield
        return
    try:
        ray.init(address=resources.ray_address, logging_level=logging.WARNING, log_to_driver=True)
    except ConnectionError as error:
        raise ValueError(
            f"no Ray cluster answers at {resources.ray_address}; start one with `vila-ops up` or `ray start --head`"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def log_to_driver() -> None:
    """Send this worker's log lines to its standard output, which Ray forwards to the driver."""
    logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(name)s: %(message)s", force=True)
    for noisy in ("httpx", "urllib3", "huggingface_hub", "DeepSpeed"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
