"""What runs a service: the one protocol of the backends. Imports nothing heavy."""

from contextlib import AbstractContextManager
from typing import Protocol

from vila_ops.serve.spec import Spec

START_SECONDS = 300.0
"""How long a new replica may take until it answers."""


class ServiceBackend(Protocol):
    """Starts, updates and removes one service, which outlives the calling process."""

    def locked(self) -> AbstractContextManager[None]:
        """Hold off other changes of the service by this machine."""

    def url(self) -> str | None:
        """Where the service listens; None while nothing runs. Raises ValueError for a port that cannot be used."""

    def apply(self, spec: Spec) -> str:
        """Bring the service to the spec and return its URL without waiting for it to be ready.

        A replica that still loads the same spec is kept. Raises ValueError for a port that cannot be used.
        """

    def running(self) -> bool:
        """Whether requests reach replicas of the last spec."""

    def failure(self) -> str | None:
        """Why the service will never be ready; None while it still may be."""

    def state(self) -> str:
        """The state or the last output of the service, for a person."""

    def remove(self) -> None:
        """End the service; one that does not run is fine."""
