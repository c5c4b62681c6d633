"""What one node of a cluster measures of itself and, with another node, of the network. Ray runs this there."""

import socket
import time
from contextlib import closing
from datetime import timedelta
from importlib.metadata import version

import torch
import torch.distributed as dist

from vila_ops.artifacts.store import throughput
from vila_ops.config import Config
from vila_ops.device import describe, device_of

PACKAGES = ("vila-ops", "torch", "ray", "transformers", "deepspeed")
"""Packages of which all nodes need one version."""
MESSAGE_BYTES = 64 * 2**20
MEET_SECONDS = 60.0
"""How long a node waits for another one, less than it may take to answer, so that it says which address is missing."""
ROUNDS = 3
"""Times that something is measured; the best one counts, since what runs beside it can only make it slower."""
SIDE = 2048
"""Of the matrices that are multiplied."""


class NodeReport(Config):
    """What a node is and how fast."""

    host: str
    packages: dict[str, str]
    device: str
    """Its name and library."""
    multiply: float
    """Operations a second of a product of fp32 matrices on the device, on one thread of a CPU."""
    wrote: float
    """Bytes a second into the store."""
    read: float
    """Bytes a second out of the store."""


class NodeProbe:
    """An actor on a node."""

    def __init__(self, store: str) -> None:
        self.store, self.device = store, device_of("auto")
        torch.set_num_threads(1)

    def clock(self) -> float:
        """Seconds since 1970 here."""
        return time.time()

    def measure(self) -> NodeReport:
        """Measure this node. Raises what the store raises."""
        wrote, read = throughput(self.store)
        return NodeReport(
            host=socket.gethostname(),
            packages={name: version(name) for name in PACKAGES},
            device=describe(self.device),
            multiply=2 * SIDE**3 / min(self._multiply() for _ in range(ROUNDS)),
            wrote=wrote,
            read=read,
        )

    def rendezvous(self, host: str) -> str:
        """An address of this node where the others can meet it."""
        with closing(socket.create_server((host, 0))) as free:
            return f"tcp://{host}:{free.getsockname()[1]}"

    def join(self, address: str, rank: int, size: int) -> None:
        """Join the process group of all nodes."""
        backend = dist.get_default_backend_for_device(self.device)
        patience = timedelta(seconds=MEET_SECONDS)
        dist.init_process_group(backend, init_method=address, rank=rank, world_size=size, timeout=patience)
        self.message = torch.ones(MESSAGE_BYTES // 4, device=self.device)

    def exchange(self, other: int, *, first: bool) -> float:
        """Bytes a second of sending a message to a rank and getting it back, which that rank does the other way round.

        The first message, which makes the connection, is not timed.
        """
        seconds = []
        for _ in range(ROUNDS + 1):
            self._wait()
            started = time.perf_counter()
            for sends in (first, not first):
                if sends:
                    dist.send(self.message, other)
                else:
                    dist.recv(self.message, other)
            self._wait()
            seconds.append(time.perf_counter() - started)
        return 2 * MESSAGE_BYTES / min(seconds[1:])

    def all_reduce(self) -> float:
        """Bus bandwidth in bytes a second: 2 (n - 1) / n times the bytes by the time, as in nccl-tests."""
        seconds, size = [], dist.get_world_size()
        for _ in range(ROUNDS + 1):
            dist.barrier()
            started = time.perf_counter()
            dist.all_reduce(self.message)
            self._wait()
            seconds.append(time.perf_counter() - started)
        return 2 * (size - 1) / size * MESSAGE_BYTES / min(seconds[1:])

    def _multiply(self) -> float:
        """Seconds of one product."""
        matrix = torch.ones(SIDE, SIDE, device=self.device)
        self._wait()
        started = time.perf_counter()
        matrix @ matrix
        self._wait()
        return time.perf_counter() - started

    def _wait(self) -> None:
        """Wait for the device."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
