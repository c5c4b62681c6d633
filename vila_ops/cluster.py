"""The connection of this process to the Ray cluster that is already up."""

import logging
import sys

from vila_ops.config import Resources


def connect(resources: Resources) -> None:
    """Connect this process to the cluster of the resources, until the process ends or another cluster is asked for.

    Rooms of one flow share the connection: Ray then gives them the same worker processes, imports done already.
    """
    import ray

    if ray.is_initialized():
        if ray.get_runtime_context().gcs_address == resources.ray_address:
            return
        ray.shutdown()
    try:
        ray.init(address=resources.ray_address, logging_level=logging.WARNING, log_to_driver=True)
    except ConnectionError as error:
        raise ValueError(
            f"no Ray cluster answers at {resources.ray_address}; start one with `vila-ops up` or `ray start --head`"
        ) from error


def log_to_driver() -> None:
    """Send this worker's log lines to its standard output, which Ray forwards to the driver."""
    logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(name)s: %(message)s", force=True)
    for noisy in ("httpx", "urllib3", "huggingface_hub", "DeepSpeed"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
