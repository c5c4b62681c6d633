"""The execution part of a manifest: machine and versions, recorded outside the digest."""

import functools
import platform
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

PACKAGES = (
    "numpy",
    "torch",
    "transformers",
    "deepspeed",
    "ray",
    "mlflow",
    "prefect",
    "dvc",
    "pyarrow",
    "pillow",
    "pydantic",
)


def execution(*, launch: str, seconds: float, ran: list[dict[str, Any]]) -> dict[str, Any]:
    """The execution part of a manifest. `ran` holds the facts that each worker reported about itself."""
    return {
        "launch": launch,
        "sealed": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(seconds, 3),
        "workers": ran,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Installed versions of the packages that results depend on, by name."""
    return dict(_installed())


@functools.cache
def _installed() -> dict[str, str]:
    """Read once in a process, because it takes 16 ms."""
    installed: dict[str, str] = {}
    for name in PACKAGES:
        try:
            installed[name] = version(name)
        except PackageNotFoundError:
            continue
    return installed
