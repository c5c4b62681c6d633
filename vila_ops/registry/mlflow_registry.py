"""One registered model of MLflow's registry. Several processes may use it at once."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vila_ops.artifacts.kinds import Checkpoint, ModelVersion
from vila_ops.config import Resources
from vila_ops.registry.aliases import CHAMPION, race_lost
from vila_ops.tracking import translated

SCHEME = "vila-store://"
"""Scheme of a version's source in a store on disk, because an MLflow server refuses a plain path."""


@contextmanager
def open_registry(resources: Resources, name: str, request: str) -> Iterator["MlflowRegistry"]:
    """The registry of a model name, for a request that an error of MLflow is reported with.

    Raises ValueError where the resources name no tracking URI, TrackerRefused and TrackerUnreachable.
    """
    if resources.tracking.uri is None:
        raise ValueError("the registry is MLflow's: set resources.tracking.uri (a server or sqlite:///FILE)")
    from mlflow import MlflowClient  # heavy

    with translated(resources.tracking.uri, request):
        yield MlflowRegistry(MlflowClient(resources.tracking.uri, registry_uri=resources.tracking.uri), name)


class MlflowRegistry:
    """The versions, tags and aliases of a model name, by MLflow's client."""

    def __init__(self, client: Any, name: str) -> None:
        self.name = name
        self._client = client

    def version_of(self, checkpoint: Checkpoint) -> int:
        """The one version of a checkpoint, created where there is none.

        Where several processes created one, the lowest number stays and the others are deleted.
        """
        versions = self._with_digest(checkpoint.digest)
        if not versions:
            self._create(checkpoint)
            versions = self._with_digest(checkpoint.digest)
        first, *others = versions
        for other in others:
            self._delete(other)
        return first

    def model_version(self, version: int) -> ModelVersion:
        """A version with the artifact reference of its checkpoint."""
        stored = self._client.get_model_version(self.name, str(version))
        checkpoint = Checkpoint(
            uri=stored.source.removeprefix(SCHEME),
            digest=stored.tags["digest"],
            parents=tuple(json.loads(stored.tags["parents"])),
            stage=stored.tags["stage"],
            step=int(stored.tags["step"]),
        )
        return ModelVersion(name=self.name, version=version, checkpoint=checkpoint, promoted=self.champion() == version)

    def tags(self, version: int) -> dict[str, str]:
        """The tags of a version."""
        tags: dict[str, str] = self._client.get_model_version(self.name, str(version)).tags
        return tags

    def set_tags(self, version: int, tags: Mapping[str, str]) -> None:
        """Set tags of a version, one after another in their order."""
        for key, value in tags.items():
            self._set_tag(version, key, value)

    def champion(self) -> int | None:
        """The version that the alias `champion` points to; None without a model or an alias."""
        return self.version_at(CHAMPION)

    def version_at(self, alias: str) -> int | None:
        """The version that an alias points to; None without a model or an alias."""
        from mlflow.exceptions import MlflowException

        try:
            version = self._client.get_registered_model(self.name).aliases.get(alias)
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return None
            raise
        return None if version is None else int(version)

    def promote(self, version: int, *, champion: int | None) -> None:
        """Move the alias `champion` from the version that was compared with.

        Raises PromotionRaceLost where another process moved it meanwhile.
        """
        now = self.champion()
        if now == champion:
            if champion is not None:
                self._set_tag(version, "champion.previous", str(champion))
            now = self._set_champion(version)
        if now != version:
            raise race_lost(self.name, version=version, champion=champion, now=now)

    def _with_digest(self, digest: str) -> list[int]:
        versions = self._client.search_model_versions(f"tag.digest = '{digest}'")
        return sorted(int(one.version) for one in versions if one.name == self.name)

    def _create(self, checkpoint: Checkpoint) -> None:
        from mlflow.exceptions import MlflowException

        try:
            self._client.create_registered_model(self.name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        tags: dict[str, Any] = {
            "digest": checkpoint.digest,
            "stage": checkpoint.stage,
            "step": str(checkpoint.step),
            "parents": json.dumps(checkpoint.parents),
        }
        source = checkpoint.uri if "://" in checkpoint.uri else f"{SCHEME}{Path(checkpoint.uri).resolve()}"
        self._client.create_model_version(self.name, source=source, tags=tags)

    def _delete(self, version: int) -> None:
        from mlflow.exceptions import MlflowException

        try:
            self._client.delete_model_version(self.name, str(version))
        except MlflowException as error:  # another process deleted it first
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise

    def _set_tag(self, version: int, key: str, value: str) -> None:
        from mlflow.exceptions import MlflowException

        try:
            self._client.set_model_version_tag(self.name, str(version), key, value)
        except MlflowException:  # of two processes that insert the same new tag, MLflow refuses one
            if self.tags(version).get(key) != value:
                raise

    def _set_champion(self, version: int) -> int | None:
        """Point the alias to a version; returns the version that it points to afterwards."""
        from mlflow.exceptions import MlflowException

        try:
            self._client.set_registered_model_alias(self.name, CHAMPION, str(version))
        except MlflowException:  # as for tags
            if self.champion() is None:
                raise
        return self.champion()
