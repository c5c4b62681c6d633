"""What an endpoint serves: the one value from which a replica is started. Light: no HTTP, no torch."""

from pathlib import Path
from typing import Any, Literal, Self

from vila_ops import __version__
from vila_ops.artifacts.kinds import ModelVersion
from vila_ops.artifacts.store import root_of
from vila_ops.config import CanaryRules, Config, Resources, Service
from vila_ops.config.kinds import provenance
from vila_ops.config.resources import ServeResources
from vila_ops.device import Device
from vila_ops.generate.load import ENGINES


class Spec(Config):
    """A service and the model version behind it. Two endpoints of equal identity answer alike."""

    service: Service
    """How the endpoint behaves."""
    capacity: ServeResources
    """What the endpoint may use."""
    version: ModelVersion
    launch: Literal["inline", "ray"]
    device: Device
    """What a replica computes on, as the resources say it."""
    release: str
    """Version of this package in the deploying process."""
    plugin: dict[str, Any] | None = None
    """Package, version and revision of an engine that a third-party package adds."""

    @classmethod
    def of(cls, service: Service, version: ModelVersion, resources: Resources) -> Self:
        """The spec of a version served with these resources."""
        checkpoint, access = version.checkpoint, resources.serve.access
        places = {
            f"access.{name}": value for name in ("key_file", "audit") if (value := getattr(access, name)) is not None
        }
        capacity = resources.serve.with_changes({name: str(Path(value).absolute()) for name, value in places.items()})
        if capacity.samples is not None:
            place = capacity.samples.place or f"{resources.storage.store.rstrip('/')}/samples/{service.name}"
            capacity = capacity.with_changes({"samples.place": root_of(place)})
        if "://" not in checkpoint.uri:  # replicas have another working directory
            checkpoint = checkpoint.with_changes({"uri": str(Path(checkpoint.uri).resolve())})
        return cls(
            service=service,
            capacity=capacity,
            version=version.with_changes({"checkpoint": checkpoint}),
            launch="inline" if resources.launch == "inline" else "ray",  # replicas live on the cluster either way
            device=resources.serve.device or resources.device,
            release=__version__,
            plugin=provenance("vila_ops.engines", ENGINES, resources.serve.engine.kind),
        )

    def threads(self) -> int:
        """CPU threads of each replica: as many as the CPUs that it reserves.

        More threads than free cores wait in loops (3 times the CPU time, measured).
        """
        return max(1, int(self.capacity.cpus_per_replica))

    def identity(self) -> str:
        """Fingerprint of everything that a replica depends on: not whether the version is the champion, nor the rules
        by which the router judges it as a canary."""
        rules = CanaryRules().model_dump()
        return self.with_changes({"version.promoted": False, "capacity.canary": rules}).fingerprint()
