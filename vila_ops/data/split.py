"""Train, validation and test by object name. Pure."""

import hashlib

from vila_ops.config import Split

SPLITS = ("train", "validation", "test")


def split_of(name: str, split: Split) -> str:
    """The split of an object, by a hash of its name: the same in every mixture with the same split config."""
    digest = hashlib.sha256(f"{split.salt}/{name}".encode()).digest()
    position = int.from_bytes(digest[:8]) / 2**64
    if position < split.test:
        return "test"
    return "validation" if position < split.test + split.validation else "train"
