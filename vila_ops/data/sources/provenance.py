"""Say where a record came from. Pure."""

from vila_ops.config.package import Package


def provenance(package: Package, path: str) -> str:
    """Registry, package, version and the path inside it, as one line."""
    return f"{package.registry}:{package.name}@{package.version}/{path}"
