"""Files of `configs/` by name: those of the working directory, then those that come with the package."""

import os
from pathlib import Path

from vila_ops.errors import did_you_mean

OWN = Path("configs")


def shipped(name: str) -> Path:
    """A file or folder that comes with the package: in an installed package, and beside it in a checkout."""
    package = Path(__file__).parents[1]
    installed = package / name
    return installed if installed.exists() else package.parent / name


def config_file(given: Path, folder: str) -> Path:
    """The file of a name in a folder of `configs/`, or of a path: what exists, has a separator or ends with .yaml.

    Raises ValueError for an unknown name; the error lists the known ones.
    """
    if given.is_file() or given.suffix in (".yaml", ".yml") or os.sep in str(given):
        return given
    for place in _places(folder):
        file = place / f"{given}.yaml"
        if file.is_file():
            return file
    own, ours = _places(folder)
    known = names(folder)
    raise ValueError(
        f"no file {given}, and no config of that name in {own} or {ours}, which have {', '.join(known)}"
        f"{did_you_mean(str(given), known)}"
    )


def names(folder: str) -> list[str]:
    """The names of the configs in a folder of `configs/`, sorted."""
    return sorted({path.stem for place in _places(folder) for path in place.glob("*.yaml")})


def _places(folder: str) -> tuple[Path, Path]:
    """Where a name is looked for, in this order."""
    return OWN / folder, shipped("configs") / folder
