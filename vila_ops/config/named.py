"""Files of `configs/` by name: those of the working directory, then those that come with the package."""

import os
from pathlib import Path

from vila_ops.errors import did_you_mean

OWN = Path("configs")


def shipped() -> Path:
    """The configs that come with the package: `configs` in an installed package, and beside it in a checkout."""
    package = Path(__file__).parents[1]
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def config_file(given: Path, folder: str) -> Path:
    """The file of a name in a folder of `configs/`, or of a path: what exists, has a separator or ends with .yaml.

    Raises ValueError for an unknown name; the error lists the known ones.
    """
    if given.is_file() or given.suffix in (".yaml", ".yml") or os.sep in str(given):
        return given
    places = [place / folder for place in (OWN, shipped())]
    for place in places:
        file = place / f"{given}.yaml"
        if file.is_file():
            return file
    known = sorted({path.stem for place in places for path in place.glob("*.yaml")})
    raise ValueError(
        f"no file {given}, and no config of that name in {places[0]} or {places[1]}, which have {', '.join(known)}"
        f"{did_you_mean(str(given), known)}"
    )
