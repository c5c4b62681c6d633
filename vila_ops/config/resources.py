"""Execution: where and how fast a run works, never hashed. One section for each part of the platform."""

import re
from ipaddress import ip_address
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
from vila_ops.config.engine import Engine, ServeEngine, TorchEngine
from vila_ops.config.secrets import Url
from vila_ops.config.serve import Access, Autoscale, CanaryRules, RemoteImages, RequestLimits, Samples
from vila_ops.device import Device

S3_STORE = re.compile(r"s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/[A-Za-z0-9_][A-Za-z0-9_.=-]*)*/?")


Offloaded = Literal["none", "optimizer", "parameters"]
"""State that ZeRO keeps in host memory: none, the optimizer's, or also the parameters (ZeRO-3)."""
LEAST_ZERO: dict[Offloaded, int] = {"none": 0, "optimizer": 1, "parameters": 3}
"""Lowest ZeRO stage for each."""
NETWORK_VARIABLES = ("NCCL_", "TORCH_NCCL_", "GLOO_", "TP_")
"""Prefixes of the variables that `network.env` may set, for NCCL, torch's use of it, gloo and its transport."""


class Accelerator(Config):
    """One GPU, for the planner and MFU."""

    name: str
    memory_gib: PositiveFloat
    peak_tflops: PositiveFloat
    """Peak of dense bf16 by the vendor's data sheet, in TFLOP/s."""
    price_per_hour: NonNegativeFloat = 0.0
    """Price of one GPU per hour, in any currency."""


class Retention(Config):
    """Which resume checkpoints of a stage are kept while it trains. One that any rule keeps is kept."""

    last: PositiveInt = 2
    """Number of the newest that are kept. With 1 there is no older one if it is damaged."""
    every: PositiveInt | None = None
    """Also keep those whose step is a multiple of this."""
    best: NonNegativeInt = 0
    """Also keep this many with the lowest validation loss."""


class Watchdog(Config):
    """When a step counts as hung. Then the stacks of all ranks are logged, and the stage fails and is retried."""

    factor: PositiveFloat = 20.0
    """Limit as a multiple of the median step so far."""
    at_least_seconds: PositiveFloat = 600.0
    """Lower bound of the limit; it is the limit of the first step."""


class Network(Config):
    """How ranks reach each other."""

    interface: str | None = None
    """Network interface of gloo and NCCL, such as `eth0`; None: they choose."""
    timeout_seconds: PositiveFloat = 1800.0
    """Time after which a collective fails."""
    env: dict[str, str] = {}
    """More variables of NCCL and gloo for every worker, such as `NCCL_IB_HCA`. They override `interface`."""

    @field_validator("env")
    @classmethod
    def _only_network_variables(cls, env: dict[str, str]) -> dict[str, str]:
        if other := [name for name in env if not name.startswith(NETWORK_VARIABLES)]:
            raise ValueError(f"network.env sets {other}; names must begin with one of {list(NETWORK_VARIABLES)}")
        return env


class StorageResources(Config):
    """Where files are kept."""

    store: str = "store"
    """Store of sealed artifacts: a folder, or `s3://bucket/prefix`."""
    data: str = "data"
    """Folder of DVC's outputs. A mixture that the store lacks is copied from `data/<mixture>` if it is there."""
    benchmarks: str = "data/benchmarks"
    """Folder of the official files of benchmarks, which lie in KIND/ of it."""
    cache: str = "~/.cache/vila-ops"
    """Folder of fetched packages and converted weights; checkouts may share it."""
    features_leave_free: float = Field(default=0.1, ge=0, le=1)
    """Share of the disk that cached features of frozen towers leave free. Other features are recomputed. 1 caches none,
    which is best if each image is used once."""

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
        """Folder on this machine for files that are not sealed and can be rebuilt: features, plans, logs, the report.

        It is the store itself if that is a folder, else a folder of the cache, which other machines do not see.
        """
        if "://" not in self.store:
            return Path(self.store).resolve()
        return self.cache_folder().resolve() / "scratch" / self.store.partition("://")[2].strip("/")

    def folders(self) -> tuple[Path, ...]:
        """The folders of this machine that a run writes: the cache, and the store if it is a folder."""
        return (self.cache_folder(), *(() if "://" in self.store else (Path(self.store),)))

    def plan_cache(self) -> Path:
        """Folder of cached packing plans."""
        return self.scratch() / "plans"


class TrackingResources(Config):
    """Where MLflow records runs."""

    uri: Url | None = None
    """URI of an MLflow server or sqlite file, without a password; None logs nothing."""


class PrepareResources(Config):
    """Resources of `prepare`."""

    num_workers: PositiveInt = 2
    """Shards that are written at the same time."""


class StageResources(Config):
    """Settings of one stage that differ from the others; None: the same."""

    num_workers: PositiveInt | None = None
    zero_stage: Literal[0, 1, 2, 3] | None = None
    micro_batch_size: PositiveInt | None = None
    gradient_checkpointing: bool | None = None
    offload: Offloaded | None = None


class TrainResources(Config):
    """Resources of `train_stage`."""

    num_workers: PositiveInt = 1
    """Each worker has a device of its own."""
    cpus_per_worker: PositiveFloat = 1
    """Logical CPUs that Ray reserves per worker."""
    threads_per_worker: PositiveInt = 1
    """Threads of torch in each worker."""
    loading_threads: PositiveInt = 2
    """Threads of each worker that read and decode rows ahead of the step; each has two micro-batches in memory."""
    zero_stage: Literal[0, 1, 2, 3] = 0
    micro_batch_size: PositiveInt = 1
    """Packed sequences per forward pass."""
    gradient_checkpointing: bool = False
    """Keep only the inputs of the layers and recompute the rest in the backward pass."""
    offload: Offloaded = "none"
    reductions: Literal["bf16", "fp32"] = "bf16"
    """Dtype in which gradients are added up over workers, where the stage's precision is bf16. Each worker sums its
    micro-batches in fp32."""
    compile: bool = False
    """Compile each layer of the language model with torch.compile, which takes a minute at the start of a stage."""
    optimizer: Literal["fused", "torch"] = "fused"
    """AdamW in one kernel, or in torch's separate operations: slower, for comparison."""
    attention: Literal["auto", "sdpa", "varlen", "flash", "flex"] = "auto"
    """Kernel for packed sequences. auto: on a GPU FlashAttention if it is installed, else FlexAttention; on a CPU
    varlen, which is SDPA on one document after the other; elsewhere, or with `compile` on a CPU, SDPA with an explicit
    mask."""
    profile_steps: NonNegativeInt = 0
    """Optimizer steps that `vila-ops train --profile` profiles at the start of a stage; 0: none."""
    record_samples: bool = False
    """Each rank records the samples that each step read, in `sample_log` of the store, or of the cache for S3."""
    keep: Retention = Retention()
    watchdog: Watchdog = Watchdog()
    placement: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = "PACK"
    """How Ray distributes the workers over nodes."""
    network: Network = Network()
    accelerator: Accelerator | None = None
    """The GPU of each worker, for plan, MFU and cost; None: a CPU, for which MFU and cost are not reported."""
    mfu: float = Field(default=0.4, gt=0, le=1)
    """Share of the peak that the planner assumes, over all computation, padding and recomputation included."""
    max_failures: NonNegativeInt = 2
    """How often Ray Train restarts the workers before the stage fails."""
    start_timeout_seconds: PositiveFloat = 1800.0
    """How long a stage waits, in whole minutes, for enough free nodes for all workers. A lost node may come back."""
    stages: dict[str, StageResources] = {}
    """Settings of single stages, by their name in the recipe."""

    def for_stage(self, name: str) -> "TrainResources":
        """The resources of a stage: its own settings in `stages`, else those here."""
        own = self.stages[name].model_dump(exclude_none=True) if name in self.stages else {}
        return self.with_changes({"stages": {}, **own})

    def price_per_hour(self) -> float | None:
        """Price of all workers' accelerators; None where none is named or its price is not known."""
        price = self.accelerator.price_per_hour if self.accelerator else 0.0
        return price * self.num_workers or None

    def by_stage(self) -> "dict[str, TrainResources | StageResources]":
        """These resources and those of each stage, by the words that name them in an error."""
        return {"": self, **{f" of stage {name!r}": own for name, own in self.stages.items()}}

    @model_validator(mode="after")
    def _settings_have_their_zero_stages(self) -> "TrainResources":
        for place, own in self.by_stage().items():
            offload = self.offload if own.offload is None else own.offload
            zero = self.zero_stage if own.zero_stage is None else own.zero_stage
            if zero < LEAST_ZERO[offload]:
                wanted = " or ".join(map(str, range(LEAST_ZERO[offload], 4)))
                raise ValueError(f"offload {offload}{place} needs zero_stage {wanted}, not {zero}")
            if self.compile and zero == 3:
                raise ValueError(
                    f"compile has no effect with zero_stage 3{place}, which gathers weights within a layer; remove it, "
                    f"or use zero_stage 2"
                )
        return self


class EndpointResources(Config):
    """How an endpoint is asked."""

    key_variable: str = "OPENAI_API_KEY"
    """Environment variable with the key; no key is sent if it is not set."""
    max_concurrency: PositiveInt = 64
    """Most requests at a time. The number grows while the endpoint answers, and halves when it is overloaded."""
    timeout_seconds: PositiveFloat = 120.0
    """Time after which a request is given up and tried again."""
    max_retries: NonNegativeInt = 5
    """How often a request is tried again after an overload, a fault of the server or a time-out."""
    ask_again: bool = False
    """Whether an evaluation asks once more what timed out in an earlier one, a judge's replies too. These answers then
    count."""


class EvaluateResources(Config):
    """Resources of `evaluate`."""

    num_workers: PositiveInt = 1
    """Processes that answer shards at the same time, on any nodes; each loads the model."""
    cpus_per_worker: PositiveFloat = 1
    """Logical CPUs that Ray reserves."""
    threads_per_worker: PositiveInt = 1
    """Threads of torch."""
    engine: Engine = TorchEngine()
    endpoint: EndpointResources = EndpointResources()


class ServeResources(Config):
    """Capacity of a service: its address and what it may use."""

    started_by: Literal["deploy", "operator"] = "deploy"
    """What starts replicas: the task `deploy`; or an operator of a cluster, such as KubeRay's for a RayService, and a
    run then ends with the registration."""
    host: str = "127.0.0.1"
    """Address where the service listens."""
    port: int = Field(default=8000, ge=0, lt=65536)
    """Port; 0 takes a free one, but launch ray needs a fixed one."""
    replicas: PositiveInt = 1
    """Number of processes with the weights; more than one needs launch ray."""
    autoscale: Autoscale | None = None
    """More replicas under load, with launch ray; None: always `replicas`."""
    max_memory_bytes: PositiveInt | None = None
    """Resident memory at which a replica is not ready any more: a canary is rolled back for it. None: no limit."""
    canary: CanaryRules = CanaryRules()
    cpus_per_replica: PositiveFloat = 1
    """Logical CPUs that each replica reserves, and the number of torch's threads."""
    max_batch: PositiveInt = 8
    """Number of requests that a replica decodes together."""
    device: Device | None = None
    """Device of each replica; None: that of the resources. A replica on a GPU keeps it for as long as it serves."""
    engine: ServeEngine = TorchEngine()
    access: Access = Access()
    remote_images: RemoteImages = RemoteImages()
    limits: RequestLimits = RequestLimits()
    samples: Samples | None = None
    """None: no request is kept, and the endpoint takes no feedback."""

    @model_validator(mode="after")
    def _autoscale_has_an_effect(self) -> "ServeResources":
        if self.autoscale is not None and self.autoscale.max_replicas <= self.replicas:
            raise ValueError(
                f"autoscale.max_replicas {self.autoscale.max_replicas} has no effect with {self.replicas} replicas; "
                f"raise it, or remove autoscale"
            )
        return self

    @model_validator(mode="after")
    def _others_need_a_key(self) -> "ServeResources":
        if self.access.key_file is None and not is_loopback(self.host):
            raise ValueError(
                f"host {self.host} is reached from other machines, but no key is needed there; set access.key_file to "
                f"a file of `vila-ops keys create`, or host to 127.0.0.1"
            )
        return self


def is_loopback(host: str) -> bool:
    """Whether only processes of this machine reach a listening address."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class Resources(Config):
    """Resources of a run. They change where and how fast it computes, not what."""

    launch: Literal["inline", "ray", "ray_job"]
    """inline: this process, one worker, plain torch. ray: a cluster that is already up, driven from this process.
    ray_job: the same, but a job of the cluster trains each stage. The job continues when this process ends, and the
    next process that needs the stage attaches to it."""
    ray_address: str | None = None
    """Address of the cluster's head, host:port."""
    job_address: str | None = None
    """Address of the cluster's job server, http://host:8265, for launch ray_job."""
    device: Device = "auto"
    """What train, evaluate and serve compute on: `cpu`; `cuda`, `rocm` or `xpu`, a GPU of NVIDIA, AMD or Intel; `gpu`,
    a GPU of any of them; `auto`, a GPU if there is one, else the CPU. Inline, it is that of this process. On a cluster,
    each worker reserves one GPU unless the device is `cpu`, or is `auto` and no node has a GPU."""
    accelerator_type: str | None = None
    """Nodes to use of a cluster with several kinds of GPUs, by Ray's label `ray.io/accelerator-type`: `H100`, ..."""
    storage: StorageResources = StorageResources()
    tracking: TrackingResources = TrackingResources()
    prepare: PrepareResources = PrepareResources()
    train: TrainResources = TrainResources()
    evaluate: EvaluateResources = EvaluateResources()
    serve: ServeResources = ServeResources()

    def plans_gpu(self) -> bool:
        """Whether workers have GPUs, as far as the settings say it: `auto` means one if an accelerator is named."""
        return self.device not in ("auto", "cpu") or (self.device == "auto" and self.train.accelerator is not None)

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
        if self.evaluate.num_workers != 1:
            raise ValueError(f"launch inline evaluates in one process, not {self.evaluate.num_workers}; use launch ray")
        if self.serve.replicas != 1:
            raise ValueError(f"launch inline serves one replica, not {self.serve.replicas}; use launch ray")
        if self.serve.autoscale is not None:
            raise ValueError("serve.autoscale has no effect with launch inline; remove it or use launch ray")
        for key in ("ray_address", "accelerator_type"):
            if getattr(self, key) is not None:
                raise ValueError(f"{key} has no effect with launch inline; remove it or use launch ray")
