"""What an endpoint serves: the one value that a replica is started from. Light: no HTTP, no torch."""

from pathlib import Path
from typing import Literal, Self

from vila_ops import __version__
from vila_ops.artifacts.kinds import ModelVersion
from vila_ops.config import Config, Resources, Service
from vila_ops.config.resources import ServeResources


class Spec(Config):
    """A service and the model version behind it. Two endpoints of equal identity answer alike."""

    service: Service
    capacity: ServeResources
    version: ModelVersion
    launch: Literal["inline", "ray"]
    release: str
    """Version of the code that serves."""

    @classmethod
    def of(cls, service: Service, version: ModelVersion, resources: Resources) -> Self:
        """The spec that a deployment asks for."""
        checkpoint = version.checkpoint
        if "://" not in checkpoint.uri:  # replicas have another working directory
            checkpoint = checkpoint.with_changes({"uri": str(Path(checkpoint.uri).resolve())})
        return cls(
            service=service,
            capacity=resources.serve,
            version=version.with_changes({"checkpoint": checkpoint}),
            launch="inline" if resources.launch == "inline" else "ray",  # replicas live on the cluster either way
            release=__version__,
        )

    def threads(self) -> int:
        """torch's threads in each replica: as many as it reserves; more of them than free cores spin (3x the CPU)."""
        return max(1, int(self.capacity.cpus_per_replica))

    def identity(self) -> str:
        """Fingerprint of everything that a replica does; whether the version is the champion is not part of it."""
        return self.with_changes({"version.promoted": False}).fingerprint()
