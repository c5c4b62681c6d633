"""One scrape for all replicas of a service: what each of them counts, in one text of Prometheus's format."""

import asyncio
import logging
from collections.abc import Callable, Sequence

from vila_ops.serve.router.state import Track

Headers = Sequence[tuple[bytes, bytes]]
MetricsOf = Callable[[Track, Headers], list[bytes]]
"""What /metrics of each replica of a track says to a request with these headers. Raises OSError, also for none."""
log = logging.getLogger(__name__)


async def scrape(tracks: Sequence[Track], headers: Headers, metrics: MetricsOf) -> bytes:
    """The samples of all replicas, told apart by their label `replica`. A track that does not answer has none."""
    asked = [asyncio.to_thread(metrics, track, headers) for track in tracks]
    texts: list[bytes] = []
    for track, answer in zip(tracks, await asyncio.gather(*asked, return_exceptions=True), strict=True):
        if isinstance(answer, OSError):
            log.warning("version %d at %s shows no metrics: %s", track.spec.version.version, track.url, answer)
        elif isinstance(answer, BaseException):
            raise answer
        else:
            texts += answer
    return merged(texts)


def merged(texts: Sequence[bytes]) -> bytes:
    """Texts of Prometheus's format as one, in which the samples of each metric stand together, as it demands."""
    heads: dict[bytes, list[bytes]] = {}
    samples: dict[bytes, list[bytes]] = {}
    for text in texts:
        name = b""
        for line in text.splitlines(keepends=True):
            if line.startswith(b"# HELP "):
                name = line.split(maxsplit=3)[2]
                heads[name], samples[name] = [line], samples.get(name, [])
            elif line.startswith(b"#"):
                heads[name].append(line)
            else:
                samples[name].append(line)
    return b"".join(line for name, head in heads.items() for line in (*head, *samples[name]))
