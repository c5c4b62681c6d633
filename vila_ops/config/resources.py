"""Where and how fast: execution, never hashed."""

import re
from pathlib import Path
from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, field_validator, model_validator

from vila_ops.config.base import Config

S3_STORE = re.compile(r"s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/[A-Za-z0-9_][A-Za-z0-9_.=-]*)*/?")


class StageResources(Config):
    """What one stage needs otherwise than the rest; None: as the rest."""

    num_workers: PositiveInt | None = None
    zero_stage: Literal[0, 1, 2, 3] | None = None
    micro_batch_size: PositiveInt | None = None


class Resources(Config):
    """What a run may use. Nothing here changes what is computed, only where and how fast."""

    launch: Literal["inline", "ray"]
    """inline: this process, one worker, plain torch. ray: a cluster that is already up."""
    store: str = "store"
    """Where sealed artifacts are: a folder, or `s3://bucket/prefix`."""
    data: str = "data"
    """Folder of DVC's outputs; a prepared mixture is looked for in `data/<mixture>` first."""
    cache: str = "~/.cache/vila-ops"
    """Fetched packages and converted weights; shared between checkouts."""
    tracking_uri: str | None = None
    """MLflow server or sqlite URI; None logs nothing."""
    prefect_page: str | None = None
    """Address of Prefect's page, for links."""
    parent_run: str | None = None
    """MLflow run that the runs of the rooms are children of."""
    ray_address: str | None = None
    """Address of the cluster's head, host:port."""
    num_workers: PositiveInt = 1
    gpus_per_worker: NonNegativeInt = 0
    cpus_per_worker: PositiveFloat = 1
    """Logical CPUs that Ray reserves per worker."""
    threads_per_worker: PositiveInt = 1
    """torch's threads in each worker."""
    zero_stage: Literal[0, 1, 2, 3] = 0
    micro_batch_size: PositiveInt = 1
    """Rows per forward pass."""
    stages: dict[str, StageResources] = {}
    """By stage of the recipe."""
    prepare_workers: PositiveInt = 2
    """Shards that `prepare` makes at once."""
    max_failures: NonNegativeInt = 2
    """How often Ray Train restarts the workers before the stage fails."""
    host: str = "127.0.0.1"
    """Where servers listen."""
    serve_port: int = Field(default=8000, ge=0, lt=65536)

    def for_stage(self, name: str) -> "Resources":
        """What a stage may use: what `stages` says of it, the rest as here."""
        own = self.stages[name].model_dump(exclude_none=True) if name in self.stages else {}
        return Resources.model_validate({**self.model_dump(), "stages": {}, **own})

    def scratch(self) -> Path:
        """Folder on this machine for what is not sealed: resume checkpoints, features, logs and the report.

        The store itself where that is a folder; else a folder of the cache, which other machines do not see.
        """
        if "://" not in self.store:
            return Path(self.store).resolve()
        return Path(self.cache).expanduser().resolve() / "scratch" / self.store.partition("://")[2].strip("/")

    @field_validator("store")
    @classmethod
    def _store_is_a_folder_or_on_s3(cls, store: str) -> str:
        if "://" in store and not S3_STORE.fullmatch(store):
            raise ValueError(f"store {store!r} is neither a folder nor s3://BUCKET/PREFIX")
        return store

    @model_validator(mode="after")
    def _every_setting_has_an_effect(self) -> "Resources":
        if self.launch == "inline":
            asked: dict[str, Resources | StageResources] = {"": self}
            asked |= {f" of stage {name!r}": own for name, own in self.stages.items()}
            for place, own in asked.items():
                if own.num_workers not in (None, 1):
                    raise ValueError(f"launch inline is one worker, not {own.num_workers}{place}; use launch ray")
                if own.zero_stage:
                    raise ValueError(
                        f"zero_stage {own.zero_stage}{place} needs DeepSpeed, which launch inline does not use"
                    )
            if self.ray_address is not None:
                raise ValueError("ray_address has no effect with launch inline; remove it or use launch ray")
        elif self.ray_address is None:
            raise ValueError("launch ray drives a cluster that is already up: set ray_address (host:port)")
        return self
