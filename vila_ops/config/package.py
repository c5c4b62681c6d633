"""One pinned file of a package registry."""

from typing import Annotated, Literal

from pydantic import Field

from vila_ops.config.base import Config

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Package(Config):
    """One file of a package registry, pinned by version and sha256; fetched by that registry's ordinary client."""

    registry: Literal["pypi", "debian", "npm"]
    name: str
    version: str
    sha256: Sha256
    """sha256 of the file that the client downloads: wheel, .deb or .tgz."""
    licence: str
    """As the package states it, as an SPDX identifier if there is one; copied to the data card."""
