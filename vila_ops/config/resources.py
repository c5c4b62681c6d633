"""Where and how fast a run works: execution, never hashed. One section for each part of the platform."""

import re
from pathlib import Path
from typing import Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from vila_ops.config.base import Config
from vila_ops.config.engine import Engine, TorchEngine

S3_STORE = re.compile(r"s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/[A-Za-z0-9_][A-Za-z0-9_.=-]*)*/?")


Offloaded = Literal["none", "optimizer", "parameters"]
"""What ZeRO keeps in the host's memory: nothing, the optimizer's state, or that and the parameters (ZeRO-3)."""
LEAST_ZERO: dict[Offloaded, int] = {"none": 0, "optimizer": 1, "parameters": 3}
"""ZeRO stage that each needs."""
NETWORK_VARIABLES = ("NCCL_", "TORCH_NCCL_", "GLOO_", "TP_")
"""Prefixes of the variables that a network may set: NCCL's, torch's for it, and gloo's with its transport."""


class Accelerator(Config):
    """One GPU, as the planner and MFU count with it."""

    name: str
    memory_gib: PositiveFloat
    peak_tflops: PositiveFloat
    """Dense bf16, as its maker says."""
    price_per_hour: NonNegativeFloat = 0.0
    """Price of one GPU, in any currency."""


class Retention(Config):
    """Which resume checkpoints of a stage are kept while it trains; one reason is enough."""

    last: PositiveInt = 2
    """How many of the newest; with 1, a damaged one has none before it."""
    every: PositiveInt | None = None
    """Also those of every so many steps."""
    best: NonNegativeInt = 0
    """Also so many with the lowest validation loss."""


class Watchdog(Config):
    """When a step counts as hung: the stacks of all ranks are logged, the stage fails and is tried again."""

    factor: PositiveFloat = 20.0
    """Times the median step so far."""
    at_least_seconds: PositiveFloat = 600.0
    """Never sooner; the first step has this limit alone."""


class Network(Config):
    """How ranks find each other."""

    interface: str | None = None
    """Network interface of gloo and NCCL, such as `eth0`; None: what they choose."""
    timeout_seconds: PositiveFloat = 1800.0
    """A collective that takes longer fails."""
    env: dict[str, str] = {}
    """More variables of NCCL and gloo for every worker, such as `NCCL_IB_HCA`; they win over `interface`."""

    @field_validator("env")
    @classmethod
    def _only_network_variables(cls, env: dict[str, str]) -> dict[str, str]:
        if other := [name for name in env if not name.startswith(NETWORK_VARIABLES)]:
            raise ValueError(f"network.env sets {other}; names here begin with one of {list(NETWORK_VARIABLES)}")
        return env


class StorageResources(Config):
    """Where files lie."""

    store: str = "store"
    """Where sealed artifacts are: a folder, or `s3://bucket/prefix`."""
    data: str = "data"
    """Folder of DVC's outputs; a prepared mixture is looked for in `data/<mixture>` first."""
    cache: str = "~/.cache/vila-ops"
    """Fetched packages and converted weights; shared between checkouts."""
    features_leave_free: float = Field(default=0.1, ge=0, le=1)
    """Share of the disk that cached features of frozen towers leave free; features beyond it are recomputed. 1 caches
    none: right where each image is seen once."""

    @field_validator("store")
    @classmethod
    def _store_is_a_folder_or_on_s3(cls, store: str) -> str:
        if "://" in store and not S3_STORE.fullmatch(store):
            raise ValueError(f"store {store!r} is neither a folder nor s3://BUCKET/PREFIX")
        return store

    def cache_folder(self) -> Path:
        """The cache on this machine."""
        return Path(self.cache).expanduser()

    def scratch(self) -> Path:
        """Folder on this machine for what is not sealed and can be rebuilt: features, plans, logs and the report.

        The store itself where that is a folder; else a folder of the cache, which other machines do not see.
        """
        if "://" not in self.store:
            return Path(self.store).resolve()
        return self.cache_folder().resolve() / "scratch" / self.store.partition("://")[2].strip("/")

    def folders(self) -> tuple[Path, ...]:
        """The folders of this machine that are worked in: the cache, and the store where it is one."""
        return (self.cache_folder(), *(() if "://" in self.store else (Path(self.store),)))

    def plan_cache(self) -> Path:
        """Folder of cached packing plans."""
        return self.scratch() / "plans"


class TrackingResources(Config):
    """Where runs are recorded."""

    uri: str | None = None
    """MLflow server or sqlite URI; None logs nothing."""


class PrepareResources(Config):
    """What `prepare` may use."""

    num_workers: PositiveInt = 2
    """Shards that are written at once."""


class StageResources(Config):
    """What one stage needs otherwise than the rest; None: as the rest."""

    num_workers: PositiveInt | None = None
    zero_stage: Literal[0, 1, 2, 3] | None = None
    micro_batch_size: PositiveInt | None = None
    gradient_checkpointing: bool | None = None
    offload: Offloaded | None = None


class TrainResources(Config):
    """What `train_stage` may use."""

    num_workers: PositiveInt = 1
    gpus_per_worker: int = Field(default=0, ge=0, le=1)
    """1: each worker has a GPU of its own."""
    cpus_per_worker: PositiveFloat = 1
    """Logical CPUs that Ray reserves per worker."""
    threads_per_worker: PositiveInt = 1
    """torch's threads in each worker."""
    zero_stage: Literal[0, 1, 2, 3] = 0
    micro_batch_size: PositiveInt = 1
    """Packed sequences per forward pass."""
    gradient_checkpointing: bool = False
    """Keep only the inputs of the layers and recompute the rest in the backward pass."""
    offload: Offloaded = "none"
    optimizer: Literal["fused", "torch"] = "fused"
    """AdamW in one kernel, or torch's own operations one after another: slower, for comparison."""
    attention: Literal["auto", "sdpa", "flash", "flex"] = "auto"
    """Kernel for packed sequences; auto: FlashAttention where it is installed and a GPU is there, else FlexAttention
    on a GPU, else SDPA with an explicit mask."""
    record_samples: bool = False
    """Each rank records the samples that each step read, in `sample_log` of the store, or of the cache for S3."""
    keep: Retention = Retention()
    watchdog: Watchdog = Watchdog()
    placement: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = "PACK"
    """How Ray lays the workers over nodes."""
    network: Network = Network()
    accelerator: Accelerator | None = None
    """The GPU of each worker, for plan, MFU and cost; None: a CPU, for which neither is reported."""
    mfu: float = Field(default=0.4, gt=0, le=1)
    """Share of the peak that the planner counts with, over all that is computed: padding and recomputation too."""
    max_failures: NonNegativeInt = 2
    """How often Ray Train restarts the workers before the stage fails."""
    start_timeout_seconds: PositiveFloat = 1800.0
    """How long a stage waits, in whole minutes, for nodes with room for all its workers; a lost node may come back."""
    stages: dict[str, StageResources] = {}
    """Differences of single stages, by their name in the recipe."""

    def for_stage(self, name: str) -> "TrainResources":
        """What a stage may use: its own settings in `stages`, else those here."""
        own = self.stages[name].model_dump(exclude_none=True) if name in self.stages else {}
        return self.with_changes({"stages": {}, **own})

    def by_stage(self) -> "dict[str, TrainResources | StageResources]":
        """Everything that says what a stage may use, by how it is named in an error."""
        return {"": self, **{f" of stage {name!r}": own for name, own in self.stages.items()}}

    @model_validator(mode="after")
    def _offload_has_its_zero_stage(self) -> "TrainResources":
        for place, own in self.by_stage().items():
            offload = self.offload if own.offload is None else own.offload
            zero = self.zero_stage if own.zero_stage is None else own.zero_stage
            if zero < LEAST_ZERO[offload]:
                wanted = " or ".join(map(str, range(LEAST_ZERO[offload], 4)))
                raise ValueError(f"offload {offload}{place} needs zero_stage {wanted}, not {zero}")
        return self


class EvaluateResources(Config):
    """What `evaluate` may use."""

    gpus_per_worker: int = Field(default=0, ge=0, le=1)
    """1: the evaluating process has a GPU of its own."""
    cpus_per_worker: PositiveFloat = 1
    """Logical CPUs that Ray reserves."""
    threads_per_worker: PositiveInt = 1
    """torch's threads."""
    engine: Engine = TorchEngine()


class ServeResources(Config):
    """Capacity of a service: where it listens and how much it may use."""

    host: str = "127.0.0.1"
    """Address where the service listens."""
    port: int = Field(default=8000, ge=0, lt=65536)
    """0 takes a free port; launch ray needs a fixed one."""
    replicas: PositiveInt = 1
    """Processes with the weights; more than one needs launch ray."""
    cpus_per_replica: PositiveFloat = 1
    """Logical CPUs that each replica reserves; torch uses as many threads."""
    max_batch: PositiveInt = 8
    """Requests that a replica decodes together."""
    engine: Engine = TorchEngine()


class Resources(Config):
    """What a run may use. Nothing here changes what is computed, only where and how fast."""

    launch: Literal["inline", "ray", "ray_job"]
    """inline: this process, one worker, plain torch. ray: a cluster that is already up, driven from this process.
    ray_job: the same, but each stage is trained by a job of the cluster, which goes on when this process ends and is
    found again by the next that asks for the stage."""
    ray_address: str | None = None
    """Address of the cluster's head, host:port."""
    job_address: str | None = None
    """Address of the cluster's job server, http://host:8265, for launch ray_job."""
    storage: StorageResources = StorageResources()
    tracking: TrackingResources = TrackingResources()
    prepare: PrepareResources = PrepareResources()
    train: TrainResources = TrainResources()
    evaluate: EvaluateResources = EvaluateResources()
    serve: ServeResources = ServeResources()

    def for_stage(self, name: str) -> "Resources":
        """These resources with the stage's own settings in `train`."""
        return self.with_changes({"train": self.train.for_stage(name)})

    @model_validator(mode="after")
    def _every_setting_has_an_effect(self) -> "Resources":
        if self.launch == "inline":
            self._needs_no_cluster()
        elif self.ray_address is None:
            raise ValueError(f"launch {self.launch} drives a cluster that is already up: set ray_address (host:port)")
        if (self.launch == "ray_job") != (self.job_address is not None):
            wanted = "needs job_address (http://host:8265)" if self.job_address is None else "does not use job_address"
            raise ValueError(f"launch {self.launch} {wanted}")
        return self

    def _needs_no_cluster(self) -> None:
        for place, own in self.train.by_stage().items():
            if own.num_workers not in (None, 1):
                raise ValueError(f"launch inline is one worker, not {own.num_workers}{place}; use launch ray")
            for key, asked in (("zero_stage", own.zero_stage), ("offload", own.offload)):
                if asked not in (None, 0, "none"):
                    raise ValueError(
                        f"{key} {asked}{place} needs DeepSpeed, which launch inline does not use; remove it or use "
                        f"launch ray"
                    )
        if self.train.placement != "PACK" or self.train.network != Network():
            raise ValueError("placement and network have no effect with launch inline; remove them or use launch ray")
        if self.serve.replicas != 1:
            raise ValueError(f"launch inline serves one replica, not {self.serve.replicas}; use launch ray")
        if self.ray_address is not None:
            raise ValueError("ray_address has no effect with launch inline; remove it or use launch ray")
