"""One registered model of MLflow's registry. Several processes may use it at once.

MLflow numbers the versions and holds their tags. Its aliases are a view of the register in the store.
"""

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from shlex import quote
from typing import Any

from vila_ops.artifacts.kinds import Checkpoint, ModelVersion
from vila_ops.config import Resources
from vila_ops.errors import PromotionRaceLost
from vila_ops.registry import alias_register
from vila_ops.registry.aliases import ALIASES, Alias, AliasRecord
from vila_ops.tracking import translated

SCHEME = "vila-store://"
"""Scheme of a version's source in a store on disk, because an MLflow server refuses a plain path."""
DESCRIPTION = 5000
"""Characters that MLflow's databases keep of a version's description."""
log = logging.getLogger(__name__)


@contextmanager
def open_registry(resources: Resources, name: str, request: str) -> Iterator["MlflowRegistry"]:
    """The registry of a model name, for a request that an error of MLflow is reported with.

    Raises ValueError where the resources name no tracking URI, TrackerRefused and TrackerUnreachable.
    """
    if resources.tracking.uri is None:
        raise ValueError("the registry is MLflow's: set resources.tracking.uri (a server or sqlite:///FILE)")
    from mlflow import MlflowClient  # heavy

    with translated(resources.tracking.uri, request):
        client = MlflowClient(resources.tracking.uri, registry_uri=resources.tracking.uri)
        yield MlflowRegistry(client, name, resources.storage.store)


def registered_digests(resources: Resources) -> set[str]:
    """Digests of the checkpoints of all versions of all models. Raises TrackerRefused and TrackerUnreachable."""
    with open_registry(resources, "", "a list of all registered versions") as registry:
        return registry.all_digests()


class MlflowRegistry:
    """The versions, tags and aliases of a model name, by MLflow's client. The register of the aliases is in a store."""

    def __init__(self, client: Any, name: str, store: str) -> None:
        self.name, self.store = name, store
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

    def model_version(self, version: int, *, promoted: bool = False) -> ModelVersion:
        """A version with the artifact reference of its checkpoint."""
        stored = self._client.get_model_version(self.name, str(version))
        checkpoint = Checkpoint(
            uri=stored.source.removeprefix(SCHEME),
            digest=stored.tags["digest"],
            parents=tuple(json.loads(stored.tags["parents"])),
            stage=stored.tags["stage"],
            step=int(stored.tags["step"]),
        )
        return ModelVersion(name=self.name, version=version, checkpoint=checkpoint, promoted=promoted)

    def tags(self, version: int) -> dict[str, str]:
        """The tags of a version."""
        tags: dict[str, str] = self._client.get_model_version(self.name, str(version)).tags
        return tags

    def set_tags(self, version: int, tags: Mapping[str, str]) -> None:
        """Set tags of a version, one after another in their order."""
        for key, value in tags.items():
            self._set_tag(version, key, value)

    def describe(self, version: int, text: str) -> None:
        """Show a text beside a version, as Markdown, unless a person wrote another one there."""
        shown = self._client.get_model_version(self.name, str(version)).description
        if not shown or shown.startswith(text.partition("\n")[0]):
            self._client.update_model_version(self.name, str(version), description=text)

    def aliases(self) -> dict[str, int]:
        """The version that each alias points to, also those of a user's own; empty without a model."""
        from mlflow.exceptions import MlflowException

        try:
            aliases = self._client.get_registered_model(self.name).aliases
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return {}
            raise
        return {alias: int(version) for alias, version in aliases.items()}

    def followed(self) -> AliasRecord:
        """The register of this model, after MLflow's aliases were set to what it says.

        A model that has none yet takes over the aliases that MLflow has. Raises ValueError where MLflow lacks a version
        that an alias points to.
        """
        while True:
            record, shown = alias_register.read(self.name, store=self.store), self.aliases()
            known = {alias: shown[alias] for alias in ALIASES if alias in shown}
            if known == record.aliases():
                return record
            if record.history:
                self._show(record, known)  # and read again: the register may have moved meanwhile
                continue
            versions = {alias: self.model_version(version) for alias, version in known.items()}
            with suppress(PromotionRaceLost):  # another process took them over
                alias_register.move(self.name, versions, over=None, reason="taken over from MLflow", store=self.store)

    def all_digests(self) -> set[str]:
        """Digests of the checkpoints of all versions, of other models too."""
        digests: set[str] = set()
        page: str | None = None
        while True:
            versions = self._client.search_model_versions(page_token=page)
            digests |= {one.tags["digest"] for one in versions if "digest" in one.tags}
            page = versions.token
            if not page:
                return digests

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

    def _show(self, record: AliasRecord, known: Mapping[Alias, int]) -> None:
        """Point MLflow's aliases to where the register's point."""
        from mlflow.exceptions import MlflowException

        wanted = record.aliases()
        for alias in ALIASES:
            version = wanted.get(alias)
            if version == known.get(alias):
                continue
            log.info("%s: alias %s in MLflow moves from %s to %s", self.name, alias, known.get(alias), version)
            if version is None:
                self._client.delete_registered_model_alias(self.name, alias)
                continue
            self._check_is(version, record.checkpoints[version], alias)
            try:
                self._client.set_registered_model_alias(self.name, alias, str(version))
            except MlflowException:  # as for tags
                if self.aliases().get(alias) is None:
                    raise

    def _check_is(self, version: int, checkpoint: Checkpoint, alias: Alias) -> None:
        """Raise ValueError unless MLflow's version of this number is of this checkpoint."""
        if version not in self._with_digest(checkpoint.digest):
            raise ValueError(
                f"the {alias} of {self.name!r} is version {version}, model {checkpoint.digest[:12]}, but this MLflow "
                f"has no such version: it is not the one where that was registered; set tracking.uri to that one, or "
                f"begin without a champion (`vila-ops champion {quote(self.name)} --remove`)"
            )
