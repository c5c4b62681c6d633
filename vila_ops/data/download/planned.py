"""What a download would ask for, without a request: URLs, what was fetched before, and about how long it takes."""

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from vila_ops.config import Source
from vila_ops.config.download import DownloadSettings
from vila_ops.data.download.address import parse
from vila_ops.data.download.journal import records_of
from vila_ops.data.download.manifest import finished_rows, manifest_path
from vila_ops.data.download.outcome import Failure, Outcome
from vila_ops.data.download.run import checked_files, work_of
from vila_ops.data.download.sources import urls_of


@dataclass(frozen=True)
class PlannedUrls:
    """The distinct URLs of one raw file that the rules of its source leave."""

    name: str
    urls: int
    finished: int
    """They have an outcome of an earlier download, and are not asked for again."""
    refused: int
    """They get no request, such as those of another scheme than http and https."""
    to_fetch: int
    seconds: float
    """About what these take, at the rate for the host that most of them are on, if every host answers."""
    images: int
    """Fetched before, of these raw files."""
    bytes: int
    """Of these images."""


def planned(
    source: Source, out: Path, *, settings: DownloadSettings, cache: Path, retry: Collection[Outcome] = ()
) -> list[PlannedUrls]:
    """What `download_source` would do with each raw file. Raises ValueError as that does."""
    return [
        _planned(file.name, urls_of(source, file), _before(target, work_of(target, cache), retry), settings)
        for file, target in checked_files(source, out)
    ]


def summary(plans: Sequence[PlannedUrls], settings: DownloadSettings) -> list[str]:
    """What all raw files together take, for a person."""
    images, seconds = sum(one.images for one in plans), sum(one.seconds for one in plans)
    to_fetch = sum(one.to_fetch for one in plans)
    limit = f"at most {settings.max_bytes / 1e6:,.3g} MB each"
    size = f"size not known before the first image; {limit}"
    if images:
        mean = sum(one.bytes for one in plans) / images
        size = f"about {to_fetch * mean / 1e9:,.3g} GB, as the {images:,} images fetched before; {limit}"
    rows = (
        ("URLs", sum(one.urls for one in plans), f"of {len(plans)} raw files"),
        ("finished before", sum(one.finished for one in plans), ""),
        ("refused", sum(one.refused for one in plans), "without a request"),
        ("to fetch", to_fetch, size),
    )
    pace = f"{settings.per_host_per_second:g} URLs of a host a second"
    took = f"{seconds / 3600:,.1f} h" if seconds >= 3600 else f"{seconds:,.0f} s"
    return [
        *(f"{name:16}{count:13,}  {about}".rstrip() for name, count, about in rows),
        f"about {took}, if every host answers, by {pace}",
    ]


def _before(out: Path, work: Path | None, retry: Collection[Outcome]) -> dict[str, int | None]:
    """The URLs that have their outcome, with the size of an image."""
    if manifest_path(out).exists():
        return {url: size for url, (outcome, size) in finished_rows(out).items() if outcome not in retry}
    return {url: record.bytes for url, record in records_of(work or out).items()}


def _planned(name: str, urls: Sequence[str], before: dict[str, int | None], settings: DownloadSettings) -> PlannedUrls:
    hosts: Counter[bytes] = Counter()
    refused = 0
    for url in (one for one in urls if one not in before):
        try:
            hosts[parse(url, ports=settings.ports).raw_host] += 1
        except Failure:
            refused += 1
    sizes = [size for size in before.values() if size is not None]
    busiest = max(hosts.values(), default=0)
    return PlannedUrls(
        name=name,
        urls=len(urls),
        finished=len(urls) - refused - hosts.total(),
        refused=refused,
        to_fetch=hosts.total(),
        seconds=max(0, busiest - 1) / settings.per_host_per_second,
        images=len(sizes),
        bytes=sum(sizes),
    )
