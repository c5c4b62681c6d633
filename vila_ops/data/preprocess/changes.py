"""Which raw files of a source changed since a dataset was prepared, from the shards that the dataset is made of."""

from collections.abc import Iterator
from typing import Any

from vila_ops.artifacts.kinds import Shard
from vila_ops.artifacts.store import KINDS, Address, backend, read_manifest, store_of
from vila_ops.config import Mixture, Resources
from vila_ops.data import sources

MOST = 5
"""Files that are named."""


def changed_files(
    at: Address, mixture: Mixture, uri: str, manifest: dict[str, Any], resources: Resources
) -> Iterator[str]:
    """What changed in the raw files of the sources since the dataset in folder `uri` was prepared, a line each.

    A file counts with the files that its records refer to, such as images. `at` is the address of the new dataset.
    """
    for name, digest in at.recipe["sources"].items():
        if digest != manifest["recipe"]["sources"].get(name):
            yield from _of_source(name, mixture, uri, manifest, resources)


def _of_source(name: str, mixture: Mixture, uri: str, manifest: dict[str, Any], resources: Resources) -> Iterator[str]:
    if name not in manifest["recipe"]["sources"]:
        yield f"source {name!r} is new"
        return
    source = mixture.sources.get(name)
    if source is None or source.packages():
        yield f"source {name!r} reads other {'files' if source is None else 'packages'}"
        return
    before = _recorded(name, uri, manifest)
    now = {file.name: file.digest for file in sources.raw_files(source, {}, cache=resources.storage.cache_folder())}
    changes = [
        *(f"{one} changed, or a file that it names" for one in now if one in before and before[one] != now[one]),
        *(f"{one} is new" for one in now if one not in before),
        *(f"{one} is gone" for one in before if one not in now),
    ]
    for change in changes[:MOST]:
        yield f"source {name!r}: {change}"
    if len(changes) > MOST:
        yield f"source {name!r}: {len(changes) - MOST} more files"
    if not changes:
        yield f"source {name!r}: its raw files are others"


def _recorded(name: str, uri: str, manifest: dict[str, Any]) -> dict[str, str]:
    """Digests of the raw files of a source by name, as the shards of a dataset record them."""
    shards = f"{store_of(uri)}/{KINDS[Shard]}"
    keys = {entry.name.partition("/")[0] for entry in backend(shards).entries(shards)}
    starts = {file.removesuffix(".tar").rpartition("-")[2] for file in manifest["files"] if file.endswith(".tar")}
    recorded: dict[str, str] = {}
    for key in sorted(key for key in keys if key[:12] in starts):
        recipe = read_manifest(f"{shards}/{key}")["recipe"]
        if recipe["source"]["name"] == name:
            recorded |= {span["name"]: span["digest"] for span in recipe["spans"]}
    return recorded
