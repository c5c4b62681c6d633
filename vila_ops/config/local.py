"""Settings of the servers of one machine: ports and limits. Execution, never hashed."""

import ipaddress
from pathlib import Path

from pydantic import Field, PositiveFloat, PositiveInt, field_validator, model_validator

from vila_ops.config.base import Config
from vila_ops.config.load import read_as
from vila_ops.config.secrets import Secret

Port = int
RAY_WORKER_PORTS = range(10002, 20000)
"""Ports that Ray gives to its workers."""


class LocalServers(Config):
    """MLflow, Prefect with one worker, and a Ray head, for `vila-ops up`, `down` and `status`."""

    host: str = "127.0.0.1"
    """Address of this machine where they listen; another one than loopback needs a `password`. Ray listens on every
    interface, and asks for a token."""
    password: Secret | None = None
    """Password of the user admin for MLflow and Prefect, as env:NAME or file:PATH; None: they ask for none."""
    mlflow_database: Secret | None = None
    """URL of MLflow's database of PostgreSQL, as env:NAME or file:PATH; None: an sqlite file below `root`."""
    prefect_database: Secret | None = None
    """The same for Prefect; the URL begins with postgresql+asyncpg://."""
    root: str = "store/local"
    """Folder of records, logs, databases, MLflow's artifacts and Ray's token, relative to the working directory."""
    mlflow_port: Port = Field(default=5000, ge=1024, lt=65536)
    prefect_port: Port = Field(default=4200, ge=1024, lt=65536)
    ray_port: Port = Field(default=6379, ge=1024, lt=65536)
    """Port of Ray's head (GCS), which `ray_address` names."""
    ray_dashboard_port: Port = Field(default=8265, ge=1024, lt=65536)
    """Port of the dashboard, the job server and Serve's REST API."""
    ray_agent_port: Port = Field(default=52365, ge=1024, lt=65536)
    ray_client_port: Port = Field(default=10001, ge=1024, lt=65536)
    serve_port: Port = Field(default=8000, ge=1024, lt=65536)
    """Port of `deploy`; `up` only checks that no other process holds it."""
    ray_cpus: PositiveInt = 8
    """Logical CPUs. There have to be more than actors: Ray Data waits for ever when its actors hold every CPU."""
    ray_object_store_bytes: int = Field(default=2**30, ge=80 * 2**20)
    prefect_file: str | None = None
    """File of the deployments that the worker serves; None: infra/prefect.yaml, which comes with the package."""
    work_pool: str = "local"
    worker_poll_seconds: PositiveFloat = 1.0
    """Time between two questions of the worker for new flow runs."""
    max_flow_runs: PositiveInt = 2
    """Flow runs that run at the same time."""
    start_timeout_seconds: PositiveFloat = 180.0
    """How long a server may take from its start to its first answer."""
    stop_grace_seconds: PositiveFloat = 10.0
    """Time between SIGTERM and SIGKILL."""
    log_bytes: int = Field(default=10 * 2**20, ge=2**16)
    """Size of a server's log at which the next file begins. Four earlier files are kept beside it."""

    @field_validator("host")
    @classmethod
    def _host_is_one_address(cls, value: str) -> str:
        address = ipaddress.ip_address(value)
        if address.version != 4:
            raise ValueError(
                f"host {value} is an IPv6 address, which the servers are not started with; use 127.0.0.1 or another "
                f"IPv4 address of this machine"
            )
        if address.is_unspecified:
            raise ValueError(f"host {value} stands for every address; name the one by which clients reach this machine")
        return value

    @model_validator(mode="after")
    def _who_is_reached_from_outside_asks_for_a_password(self) -> "LocalServers":
        if self.password is None and not ipaddress.ip_address(self.host).is_loopback:
            raise ValueError(
                f"host {self.host} can be reached from outside; set password to env:NAME or file:PATH, or use 127.0.0.1"
            )
        return self

    @model_validator(mode="after")
    def _ports_differ(self) -> "LocalServers":
        ports = {name: value for name, value in self.model_dump().items() if name.endswith("_port")}
        for name, port in ports.items():
            if twins := [other for other, value in ports.items() if value == port and other != name]:
                raise ValueError(f"{name} and {twins[0]} are both {port}; change one")
            if port in RAY_WORKER_PORTS:
                raise ValueError(f"{name} {port} is one of Ray's worker ports, 10002 to 19999; choose another")
        return self


def load_local(path: Path) -> LocalServers:
    """The servers of this machine, from a YAML file."""
    return LocalServers.model_validate(read_as(LocalServers, path, "", what="servers"))
