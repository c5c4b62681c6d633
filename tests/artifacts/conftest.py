"""Stores of both kinds."""

from pathlib import Path

import pytest


@pytest.fixture(params=["disk", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty store of each kind."""
    made: str = str(tmp_path / "store") if request.param == "disk" else request.getfixturevalue("s3_store")
    return made
