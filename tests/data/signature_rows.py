"""Tables of signatures that tests write by field."""

from typing import Any

import pyarrow as pa

from vila_ops.data.dedup.hashing import THUMBNAIL_BYTES, minhash, ngram_hashes, word_hashes
from vila_ops.data.dedup.signatures import Signature, table

PLAIN = bytes(THUMBNAIL_BYTES)
A, B, C = 0xFFFF_0000_FFFF_0000, 0x1234_5678_9ABC_DEF0, 0x0F0F_3C3C_5A5A_6996
"""Hashes that are far from each other."""


def rows(*signatures: dict[str, Any]) -> pa.Table:
    """Records numbered as given; a hash alone has a black thumbnail."""
    made = []
    for number, fields in enumerate(signatures):
        thumbnails = tuple(PLAIN for _ in fields.get("hashes", ()))
        made.append(Signature(**{"record": number, "file": 0, "thumbnails": thumbnails, **fields}))
    return table(made)


def minima(text: str) -> bytes:
    return minhash(ngram_hashes(word_hashes(text), size=5)).tobytes()


def pairs(drops: pa.Table) -> list[tuple[int, str, int | None]]:
    return sorted((row["record"], row["reason"], row["twin"]) for row in drops.to_pylist())
