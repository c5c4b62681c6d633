"""What sources of pinned packages share: their records have keys in a fixed order, and count as one raw file."""

from collections.abc import Callable, Iterator, Sequence

from vila_ops.config import fingerprint
from vila_ops.config.package import Package
from vila_ops.config.sources import SourceBase
from vila_ops.data.raw.files import RawFile, Span
from vila_ops.data.records import Dropped, Record


def packages_digest(packages: Sequence[Package]) -> str:
    """Digest of the contents of some packages."""
    return fingerprint([package.sha256 for package in packages])


def packages_as_file(source: SourceBase, keys: Sequence[str]) -> list[RawFile]:
    """The one raw file of a packaged source, with a record and about an image for each key."""
    digest = packages_digest(source.packages())
    return [RawFile(name="package", path="", digest=digest, count=len(keys), images=len(keys), marks=())]


def read_keys(
    keys: Sequence[str], span: Span, read_key: Callable[[str], Record | Dropped]
) -> Iterator[list[Record | Dropped]]:
    """The record of each key of a span; an empty list for a key that the span does not take."""
    for number, key in enumerate(keys[span.start : span.stop], start=span.start):
        yield [read_key(key)] if span.takes(number) else []


def provenance(package: Package, path: str) -> str:
    """Registry, package, version and the path inside it, as one line."""
    return f"{package.registry}:{package.name}@{package.version}/{path}"
