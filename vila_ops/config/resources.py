"""Where and how fast: execution, never hashed."""

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

S3_STORE = re.compile(r"s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/[A-Za-z0-9_][A-Za-z0-9_.=-]*)*/?")


Offloaded = Literal["none", "optimizer", "parameters"]
"""What ZeRO keeps in the host's memory: nothing, the optimizer's state, or that and the parameters (ZeRO-3)."""
LEAST_ZERO: dict[Offloaded, int] = {"none": 0, "optimizer": 1, "parameters": 3}
"""ZeRO stage that each needs."""
NETWORK_VARIABLES = ("NCCL_", "TORCH_NCCL_", "GLOO_", "TP_")
"""Prefixes of the variables that a network may set: NCCL's, torch's for it, and gloo's with its transport."""


class Accelerator(Config):
    """One GPU, as the planner counts with it and as MFU is told of."""

    name: str
    memory_gib: PositiveFloat
    peak_tflops: PositiveFloat
    """Dense bf16, as its maker says."""
    price_per_hour: NonNegativeFloat = 0.0
    """Of one GPU, in whatever currency."""


class Retention(Config):
    """Which resume checkpoints of a stage stay while it trains; one that is kept for any reason stays."""

    last: PositiveInt = 2
    """The newest ones: with 1 a damaged one has none before it."""
    every: PositiveInt | None = None
    """And those of every so many steps."""
    best: NonNegativeInt = 0
    """And so many with the least validation loss."""


class Watchdog(Config):
    """When a step counts as hung: every rank's stacks are written to the log and the stage fails, to be tried again."""

    factor: PositiveFloat = 20.0
    """Times the median step so far."""
    at_least_seconds: PositiveFloat = 600.0
    """Never sooner; the first step has this alone."""


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
    def _only_of_the_network(cls, env: dict[str, str]) -> dict[str, str]:
        if other := [name for name in env if not name.startswith(NETWORK_VARIABLES)]:
            raise ValueError(f"network.env sets {other}; names here begin with one of {list(NETWORK_VARIABLES)}")
        return env


class StageResources(Config):
    """What one stage needs otherwise than the rest; None: as the rest."""

    num_workers: PositiveInt | None = None
    zero_stage: Literal[0, 1, 2, 3] | None = None
    micro_batch_size: PositiveInt | None = None
    gradient_checkpointing: bool | None = None
    offload: Offloaded | None = None


class Resources(Config):
    """What a run may use. Nothing here changes what is computed, only where and how fast."""

    launch: Literal["inline", "ray", "ray_job"]
    """inline: this process, one worker, plain torch. ray: a cluster that is already up, driven from this process.
    ray_job: the same, but each stage is trained by a job of the cluster, which goes on when this process ends and is
    found again by the next that asks for the stage."""
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
    asked_for: str | None = None
    """Recipe and options of the command that was given, for commands that messages tell; `load` fills it in."""
    parent_run: str | None = None
    """MLflow run that the runs of the tasks are children of."""
    ray_address: str | None = None
    """Address of the cluster's head, host:port."""
    job_address: str | None = None
    """Address of the cluster's job server, http://host:8265, for launch ray_job."""
    num_workers: PositiveInt = 1
    gpus_per_worker: int = Field(default=0, ge=0, le=1)
    """1: each worker has a GPU of its own."""
    cpus_per_worker: PositiveFloat = 1
    """Logical CPUs that Ray reserves per worker."""
    threads_per_worker: PositiveInt = 1
    """torch's threads in each worker."""
    zero_stage: Literal[0, 1, 2, 3] = 0
    micro_batch_size: PositiveInt = 1
    """Rows per forward pass."""
    gradient_checkpointing: bool = False
    """Keep only the inputs of the layers and compute the rest anew in the backward pass."""
    offload: Offloaded = "none"
    optimizer: Literal["fused", "torch"] = "fused"
    """AdamW in one kernel, or torch's own operations one after another: slower, for comparison."""
    attention: Literal["auto", "sdpa", "flash", "flex"] = "auto"
    """Kernel for packed rows; auto: FlashAttention where it is installed and a GPU is there, else FlexAttention on a
    GPU, else SDPA with an explicit mask."""
    record_samples: bool = False
    """Each rank writes down which samples each step read, in `samples` beside the resume checkpoints."""
    features_leave_free: float = Field(default=0.1, ge=0, le=1)
    """Share of the disk that the kept features of frozen towers leave free; those of more images are computed each
    time. 1 keeps none: right where each image is seen once."""
    keep: Retention = Retention()
    watchdog: Watchdog = Watchdog()
    placement: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = "PACK"
    """How Ray lays the workers over nodes."""
    network: Network = Network()
    accelerator: Accelerator | None = None
    """The GPU of each worker, for plan, MFU and cost; None: a CPU, of which neither is told."""
    mfu: float = Field(default=0.4, gt=0, le=1)
    """Share of the peak that the planner counts with, of all that is computed: padding and recomputation too."""
    stages: dict[str, StageResources] = {}
    """By stage of the recipe."""
    prepare_workers: PositiveInt = 2
    """Shards that `prepare` makes at once."""
    max_failures: NonNegativeInt = 2
    """How often Ray Train restarts the workers before the stage fails."""
    start_timeout_seconds: PositiveFloat = 1800.0
    """How long a stage waits, in whole minutes, for nodes with room for all its workers; a lost node may come back."""
    host: str = "127.0.0.1"
    """Where servers listen."""
    serve_port: int = Field(default=8000, ge=0, lt=65536)

    def for_stage(self, name: str) -> "Resources":
        """What a stage may use: what `stages` says of it, the rest as here."""
        own = self.stages[name].model_dump(exclude_none=True) if name in self.stages else {}
        return Resources.model_validate({**self.model_dump(), "stages": {}, **own})

    def scratch(self) -> Path:
        """Folder on this machine for what is not sealed but can be rebuilt: features, plans, logs and the report.

        The store itself where that is a folder; else a folder of the cache, which other machines do not see.
        """
        if "://" not in self.store:
            return Path(self.store).resolve()
        return Path(self.cache).expanduser().resolve() / "scratch" / self.store.partition("://")[2].strip("/")

    def folders(self) -> tuple[Path, ...]:
        """The folders of this machine that are worked in: the cache, and the store where it is one."""
        return (Path(self.cache).expanduser(), *(() if "://" in self.store else (Path(self.store),)))

    def plan_cache(self) -> Path:
        """Where the order of samples is kept."""
        return self.scratch() / "plans"

    @field_validator("store")
    @classmethod
    def _store_is_a_folder_or_on_s3(cls, store: str) -> str:
        if "://" in store and not S3_STORE.fullmatch(store):
            raise ValueError(f"store {store!r} is neither a folder nor s3://BUCKET/PREFIX")
        return store

    @model_validator(mode="after")
    def _every_setting_has_an_effect(self) -> "Resources":
        if self.launch == "inline":
            self._needs_no_cluster()
        elif self.ray_address is None:
            raise ValueError(f"launch {self.launch} drives a cluster that is already up: set ray_address (host:port)")
        if (self.launch == "ray_job") != (self.job_address is not None):
            wanted = "needs job_address (http://host:8265)" if self.job_address is None else "does not use job_address"
            raise ValueError(f"launch {self.launch} {wanted}")
        for place, own in self._asked().items():
            offload = self.offload if own.offload is None else own.offload
            zero = self.zero_stage if own.zero_stage is None else own.zero_stage
            if zero < LEAST_ZERO[offload]:
                wanted = " or ".join(map(str, range(LEAST_ZERO[offload], 4)))
                raise ValueError(f"offload {offload}{place} needs zero_stage {wanted}, not {zero}")
        return self

    def _asked(self) -> "dict[str, Resources | StageResources]":
        """Everything that says what a stage may use, by how it is named in an error."""
        return {"": self, **{f" of stage {name!r}": own for name, own in self.stages.items()}}

    def _needs_no_cluster(self) -> None:
        for place, own in self._asked().items():
            if own.num_workers not in (None, 1):
                raise ValueError(f"launch inline is one worker, not {own.num_workers}{place}; use launch ray")
            for key, asked in (("zero_stage", own.zero_stage), ("offload", own.offload)):
                if asked not in (None, 0, "none"):
                    raise ValueError(
                        f"{key} {asked}{place} needs DeepSpeed, which launch inline does not use; remove it or use "
                        f"launch ray"
                    )
        if self.placement != "PACK" or self.network != Network():
            raise ValueError("placement and network have no effect with launch inline; remove them or use launch ray")
        if self.ray_address is not None:
            raise ValueError("ray_address has no effect with launch inline; remove it or use launch ray")
