"""Joules by the counters of a machine: a folder as Linux has it, and an NVML that counts by hand."""

import sys
from pathlib import Path
from types import ModuleType

import pytest

from vila_ops.energy import EnergyMeter

RANGE = 262143328850
"""Microjoules after which the counters of a processor of 2019 begin again."""


def zone(folder: Path, number: str, name: str, microjoules: int) -> Path:
    """A zone of RAPL; returns its counter."""
    place = folder / f"intel-rapl:{number}"
    place.mkdir(parents=True)
    (place / "name").write_text(f"{name}\n")
    (place / "max_energy_range_uj").write_text(f"{RANGE}\n")
    (place / "energy_uj").write_text(f"{microjoules}\n")
    return place / "energy_uj"


def test_processors_and_memory_are_added_up_and_what_they_contain_is_not_added_again(tmp_path: Path) -> None:
    """7 J and 2 J of two processors, and 1 J of memory; psys is the whole machine, and cores are of a processor."""
    counters = {
        zone(tmp_path, "0", "package-0", 5_000_000): 12_000_000,
        zone(tmp_path, "0:0", "core", 0): 6_000_000,
        zone(tmp_path, "0:1", "dram", 250_000): 1_250_000,
        zone(tmp_path, "1", "package-1", 0): 2_000_000,
        zone(tmp_path, "2", "psys", 0): 30_000_000,
    }
    meter = EnergyMeter(None, powercap=tmp_path)
    for counter, now in counters.items():
        counter.write_text(f"{now}\n")
    assert meter.joules() == {"cpu_joules": 10.0}


def test_a_counter_that_begins_again_goes_on(tmp_path: Path) -> None:
    """0.5 J to the end of each of two rounds, 1 J into the next, and 3 J more."""
    counter = zone(tmp_path, "0", "package-0", RANGE - 500_000)
    meter = EnergyMeter(None, powercap=tmp_path)
    for now in (1_000_000, RANGE - 500_000, 1_000_000, 4_000_000):
        counter.write_text(f"{now}\n")
        meter.note()
    assert meter.joules() == {"cpu_joules": round((2 * 1.5e6 + (RANGE - 1.5e6) + 3e6) / 1e6, 3)}


def test_what_cannot_be_read_is_missing(tmp_path: Path) -> None:
    """No such folder; one zone of two without its counter; and one that goes away meanwhile."""
    assert EnergyMeter(None, powercap=tmp_path / "none").joules() == {}
    first, second = (zone(tmp_path, str(number), f"package-{number}", 0) for number in (0, 1))
    meter = EnergyMeter(None, powercap=tmp_path)
    second.unlink()
    assert meter.joules() == {}
    assert EnergyMeter(None, powercap=tmp_path).joules() == {}
    assert first.exists()


class FakeNvml(ModuleType):
    """NVML with one GPU; `millijoules` is None for one without the counter, as before Volta."""

    millijoules: int | None = 7_000

    class NVMLError(Exception):
        """An error of NVML."""

    def nvmlInit(self) -> None:
        """Begin."""

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        if uuid != "GPU-1":
            raise self.NVMLError("not found")
        return uuid

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:
        if self.millijoules is None:
            raise self.NVMLError("not supported")
        return self.millijoules


def test_a_gpu_is_counted_from_the_start_of_the_meter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = FakeNvml("pynvml")
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    meter, other = (EnergyMeter(uuid, powercap=tmp_path) for uuid in ("GPU-1", "GPU-2"))
    nvml.millijoules = 12_500
    assert meter.joules() == {"gpu_joules": 5.5}
    assert other.joules() == {}
    nvml.millijoules = None
    assert meter.joules() == {}


def test_a_gpu_without_nvml_s_package_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert EnergyMeter("GPU-1", powercap=tmp_path).joules() == {}
