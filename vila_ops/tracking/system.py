"""The machine's load by MLflow's own monitors, under the names that MLflow's page of system metrics shows.

MLflow's SystemMetricsMonitor is not used: it ends for good the first time that the server does not answer.
"""

import logging
from typing import Any

log = logging.getLogger(__name__)


class SystemMetrics:
    """Load of CPU, memory, disk, network and NVIDIA GPUs. The first reading imports MLflow."""

    def __init__(self) -> None:
        self._monitors: list[Any] | None = None

    def read(self) -> dict[str, float]:
        """The current values by name; utilisations are since the last reading. After a failure: nothing."""
        try:
            return self._read()
        except Exception:  # psutil, NVML and MLflow raise many kinds; other metrics do not depend on this
            log.exception("the machine's load is no longer logged")
            self._monitors = []
            return {}

    def _read(self) -> dict[str, float]:
        if self._monitors is None:
            self._monitors = _monitors()
        values: dict[str, float] = {}
        for monitor in self._monitors:
            monitor.collect_metrics()
            values |= monitor.aggregate_metrics()
            monitor.clear_metrics()
        return {f"system/{name}": value for name, value in values.items()}


def _monitors() -> list[Any]:
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
    from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
    from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
    from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

    kinds: list[Any] = [CPUMonitor, DiskMonitor, NetworkMonitor]
    monitors = [kind() for kind in kinds]
    gpu: Any = GPUMonitor
    try:
        return [*monitors, gpu()]
    except (ImportError, RuntimeError):  # NVML's Python package or its driver is missing
        return monitors
