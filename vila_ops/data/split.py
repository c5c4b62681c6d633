"""Train, validation and test by object name. Pure."""

import hashlib

from vila_ops.config import Split

SPLITS = ("train", "validation", "test")


def split_of(name: str, split: Split) -> str:
    """The side on which an object stands: the same in every mixture with the same split config."""
    digest = hashlib.sha256(f"{split.salt}/{name}".encode()).digest()
    place = int.from_bytes(digest[:8]) / 2**64
    if place < split.test:
        return "test"
    return "validation" if place < split.test + split.validation else "train"
