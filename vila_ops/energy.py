"""The energy that counters of the hardware tell: RAPL of CPUs and their memory, NVML of an NVIDIA GPU.

RAPL counts whole processors, whatever runs on them. Its counters begin again at zero after minutes or hours.
"""

from pathlib import Path

POWERCAP = Path("/sys/class/powercap")
"""Where Linux shows RAPL. Since 2020 the counters are for root alone, unless an administrator makes them readable."""


class EnergyMeter:
    """Counts joules from its making on."""

    def __init__(self, gpu: str | None, *, powercap: Path = POWERCAP) -> None:
        """`gpu` is the UUID of the GPU by which NVML knows it."""
        self._gpu, self._gpu_start = gpu, None if gpu is None else _gpu_joules(gpu)
        self._counters = _counters(powercap)

    def note(self) -> None:
        """Add up what the CPUs took since the last call. Has to be called at least once in each round of a counter."""
        try:
            for counter in self._counters:
                counter.note()
        except OSError:  # such as rights that were taken away
            self._counters = []

    def joules(self) -> dict[str, float]:
        """What was counted so far, as `cpu_joules` and `gpu_joules`. One that cannot be read is missing."""
        self.note()
        read = {"cpu_joules": sum(one.joules for one in self._counters)} if self._counters else {}
        now = None if self._gpu is None else _gpu_joules(self._gpu)
        if now is not None and self._gpu_start is not None:
            read["gpu_joules"] = now - self._gpu_start
        return {name: round(joules, 3) for name, joules in read.items()}


class _Counter:
    """One counter of RAPL."""

    def __init__(self, zone: Path) -> None:
        self.joules = 0.0
        self._file = zone / "energy_uj"
        self._range = int((zone / "max_energy_range_uj").read_text())
        self._last = int(self._file.read_text())

    def note(self) -> None:
        now = int(self._file.read_text())
        self.joules += (now - self._last) % self._range / 1e6
        self._last = now


def _counters(powercap: Path) -> list[_Counter]:
    """Those of all processors and of memory; none where one of them cannot be read. Cores are part of a processor."""
    try:
        zones = [zone for zone in sorted(powercap.glob("intel-rapl:*")) if _counts((zone / "name").read_text())]
        return [_Counter(zone) for zone in zones]
    except (OSError, ValueError):
        return []


def _counts(name: str) -> bool:
    return name.startswith("package") or name.strip() == "dram"


def _gpu_joules(uuid: str) -> float | None:
    """Joules since the driver was loaded; None without NVML's Python package, the driver or such a counter."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        return float(pynvml.nvmlDeviceGetTotalEnergyConsumption(pynvml.nvmlDeviceGetHandleByUUID(uuid))) / 1e3
    except pynvml.NVMLError:
        return None
