"""What a service consists of: one register, which commands and the router change by compare-and-swap. Light."""

import json
from collections.abc import Callable

from pydantic import ValidationError

from vila_ops.artifacts.store import backend, root_of
from vila_ops.config import CanaryRules, Config
from vila_ops.config.resources import StorageResources
from vila_ops.errors import CorruptArtifact
from vila_ops.processes import ProcessId
from vila_ops.serve.spec import Spec

SUFFIX = ".state"
"""Of the name of an inline service's register."""


class Track(Config):
    """The replicas of one spec."""

    spec: Spec
    url: str
    """Base of their routes, where the router reaches them."""
    process: ProcessId | None = None
    """Of launch inline."""
    application: str | None = None
    """Of Ray Serve."""


class Canary(Config):
    """A version that answers a share of the conversations."""

    track: Track
    rules: CanaryRules
    salt: str
    """Secret of the hash that says which conversations, so that no client chooses."""


class Rollback(Config):
    """A canary that was taken back."""

    version: int
    digest: str
    reason: str
    at: str
    """Time, in UTC."""


class ServiceState(Config):
    """The tracks of a service."""

    stable: Track | None = None
    starting: Track | None = None
    """Started by a command that may have been killed meanwhile; gets no requests."""
    canary: Canary | None = None
    retired: tuple[Track, ...] = ()
    """They get no new requests; the router ends each when its last request has ended."""
    previous: Spec | None = None
    """What was stable before."""
    rolled_back: Rollback | None = None
    """The last canary that was taken back."""

    def tracks(self) -> tuple[Track, ...]:
        """Every track that may have processes."""
        canary = self.canary.track if self.canary else None
        return tuple(track for track in (self.stable, self.starting, canary, *self.retired) if track is not None)


def registers(storage: StorageResources) -> dict[str, "Register"]:
    """The register of each service by its name, on Ray Serve NAME@HEAD: of a store, and inline of this machine."""
    shared, inline = f"{root_of(storage.store)}/services", storage.scratch() / "serve"
    names = sorted({entry.name.partition("/")[0] for entry in backend(shared).entries(shared)})
    return {name: Register(f"{shared}/{name}") for name in names} | {
        place.stem: Register(str(place)) for place in sorted(inline.glob(f"*{SUFFIX}"))
    }


class Register:
    """The state of one service in a store, on disk or S3."""

    def __init__(self, uri: str) -> None:
        self.uri = uri

    def load(self) -> ServiceState:
        """The state; an empty one where nothing was deployed. Raises CorruptArtifact."""
        return self._load()[0]

    def change(self, change: Callable[[ServiceState], ServiceState]) -> ServiceState:
        """Change the state, and return the new one; `change` is called again where another process was faster."""
        while True:
            state, tag = self._load()
            new = change(state)
            data = json.dumps(new.model_dump(mode="json"), sort_keys=True).encode()
            if new == state or backend(self.uri).swap(self.uri, data, tag) is not None:
                return new

    def _load(self) -> tuple[ServiceState, str | None]:
        version = backend(self.uri).load(self.uri)
        if version is None:
            return ServiceState(), None
        try:
            return ServiceState.model_validate_json(version.data), version.tag
        except ValidationError as error:
            raise CorruptArtifact(
                f"{self.uri} is not the register of a service; end what serves, if it runs, remove it and run again: "
                f"{error}"
            ) from error
