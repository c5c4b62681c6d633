"""The machine's load by MLflow's own monitors, under the names that its page of system metrics shows.

Not by its SystemMetricsMonitor, which ends for good the first time that the server does not answer.
"""

import logging
from typing import Any

log = logging.getLogger(__name__)


class SystemMetrics:
    """CPU, memory, disk, network, and the GPUs where there are NVIDIA's; MLflow is imported at the first reading."""

    def __init__(self) -> None:
        self._monitors: list[Any] | None = None

    def read(self) -> dict[str, float]:
        """What each says now; utilisations are those since the last reading. From the first failure on, nothing."""
        try:
            return self._read()
        except Exception:  # whatever psutil, NVML and MLflow raise: what else the run is told does not depend on it
            log.exception("the machine's load is not told any more")
            self._monitors = []
            return {}

    def _read(self) -> dict[str, float]:
        if self._monitors is None:
            self._monitors = _monitors()
        found: dict[str, float] = {}
        for monitor in self._monitors:
            monitor.collect_metrics()
            found |= monitor.aggregate_metrics()
            monitor.clear_metrics()
        return {f"system/{name}": value for name, value in found.items()}


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
    except (ImportError, RuntimeError):  # no NVML for Python, or none on this machine
        return monitors
