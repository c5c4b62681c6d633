"""What runs a service: the one protocol of the backends. Imports nothing heavy."""

from contextlib import AbstractContextManager
from typing import Protocol

from vila_ops.serve.router.scrape import Headers
from vila_ops.serve.router.state import Register, Track
from vila_ops.serve.spec import Spec

METRICS_SECONDS = 5.0
"""How long the replicas of a track may take to show what they count."""
START_SECONDS = 300.0
"""How long a new replica may take until it answers."""


class ServiceBackend(Protocol):
    """Starts and ends the router and the tracks of one service, which outlive the calling process."""

    register: Register
    """The state of the service."""

    def locked(self) -> AbstractContextManager[None]:
        """Hold off other commands on the service by this machine."""

    def url(self) -> str | None:
        """Where the router listens; None while none runs. Raises ValueError for a port that cannot be used."""

    def open(self) -> str:
        """Start the router unless it runs, and return its URL. Raises ValueError for a port that cannot be used."""

    def start(self, spec: Spec) -> Track:
        """Start the replicas of a spec beside those that run, without waiting until they are ready.

        Raises ValueError for a port of the router that cannot be used.
        """

    def running(self, track: Track) -> bool:
        """Whether all replicas of a track were started."""

    def failure(self, track: Track) -> str | None:
        """Why a track will never be ready; None while it still may be."""

    def state(self, track: Track) -> str:
        """The state or the last output of a track, for a person."""

    def metrics(self, track: Track, headers: Headers) -> list[bytes]:
        """What /metrics of each replica of a track says to a request with these headers. Raises OSError for none."""

    def stop(self, track: Track) -> None:
        """End a track; one that does not run is fine."""

    def close(self) -> None:
        """End the router; one that does not run is fine."""
