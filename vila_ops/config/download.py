"""How images are fetched by URL: how hard a host is asked, how long and how much, and what is never asked."""

from typing import Annotated

from pydantic import Field, IPvAnyNetwork, PositiveFloat, PositiveInt

from vila_ops import __version__
from vila_ops.config.base import Config

Port = Annotated[int, Field(ge=1, le=65535)]


class DownloadSettings(Config):
    """Limits of the downloader. TLS is always verified; there is no setting for it."""

    concurrency: PositiveInt = 64
    """URLs in flight, all hosts together. Bodies are held in memory: at most concurrency x max_bytes."""
    per_host_concurrency: PositiveInt = 4
    """URLs of one host in flight. The host is that of the URL in the data; a redirect to another one is not counted."""
    per_host_per_second: PositiveFloat = 10.0
    """URLs of one host begun in a second; they are begun evenly, 1 / per_host_per_second apart."""
    connect_seconds: PositiveFloat = 10.0
    """For resolving a name and opening a connection; the TLS handshake has as long again."""
    read_seconds: PositiveFloat = 20.0
    """Longest silence of a server."""
    deadline_seconds: PositiveFloat = 60.0
    """Of one attempt as a whole, redirects and body included, however busily the server trickles."""
    attempts: PositiveInt = 3
    """Of one URL, when what failed may pass: 429, 5xx, timeouts, resets, hosts that cannot be reached."""
    backoff_seconds: PositiveFloat = 1.0
    """Upper end of the wait after the first attempt, doubled after each; the wait is uniform from 0 (full jitter)."""
    max_wait_seconds: PositiveFloat = 30.0
    """Longest wait between attempts, also when the server's Retry-After asks for more."""
    host_failures: PositiveInt = 20
    """A host that in so many attempts in a row was not reached, gave no answer in time or said 429 is asked no more.
    Its other URLs end as host_given_up, so that one dead host cannot hold up a file for hours."""
    max_redirects: Annotated[int, Field(ge=0)] = 5
    max_bytes: PositiveInt = 20_000_000
    """Longest body, counted while it comes."""
    max_pixels: PositiveInt = 40_000_000
    """Largest width x height."""
    ports: Annotated[tuple[Port, ...], Field(min_length=1)] = (80, 443)
    allow_addresses: tuple[IPvAnyNetwork, ...] = ()
    """Networks that may be connected to although they are not public, such as an intranet's."""
    user_agent: Annotated[str, Field(pattern=r"^[\x20-\x7e]+$")] = f"vila-ops/{__version__}"
