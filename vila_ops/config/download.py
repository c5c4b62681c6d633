"""Limits of the image downloader: requests to a host, times, sizes, and refused addresses."""

from typing import Annotated

from pydantic import Field, IPvAnyNetwork, PositiveFloat, PositiveInt

from vila_ops import __version__
from vila_ops.config.base import Config

Port = Annotated[int, Field(ge=1, le=65535)]


class DownloadSettings(Config):
    """Limits of the downloader. TLS certificates are always verified; no setting turns that off."""

    concurrency: PositiveInt = 64
    """Requests in flight to all hosts together. Bodies are held in memory: at most concurrency x max_bytes."""
    per_host_concurrency: PositiveInt = 4
    """Requests in flight to one host: the host of the URL in the data. A redirect to another host is not counted."""
    per_host_per_second: PositiveFloat = 10.0
    """Requests started to one host per second, evenly spaced."""
    connect_seconds: PositiveFloat = 10.0
    """Time limit for resolving a name and opening a connection; the TLS handshake has the same limit again."""
    read_seconds: PositiveFloat = 20.0
    """Longest time without a byte from the server."""
    deadline_seconds: PositiveFloat = 60.0
    """Time limit of one attempt as a whole, redirects and body included."""
    attempts: PositiveInt = 3
    """Attempts at one URL if the failure may pass: 429, 5xx, timeouts, resets, unreachable hosts."""
    backoff_seconds: PositiveFloat = 1.0
    """Upper bound of the wait after the first attempt, doubled after each; the wait is uniform from 0 (full jitter)."""
    max_wait_seconds: PositiveFloat = 30.0
    """Longest wait between attempts, even if the server's Retry-After asks for more."""
    host_failures: PositiveInt = 20
    """After so many consecutive attempts that ended as unreachable, timeout or rate_limited (429), a host gets no more
    requests. Its other URLs end as host_given_up, so that one dead host cannot delay a file for hours."""
    max_redirects: Annotated[int, Field(ge=0)] = 5
    max_bytes: PositiveInt = 20_000_000
    """Longest body, counted while it is received."""
    max_pixels: PositiveInt = 2**26
    """Largest width x height; the default is that of a mixture."""
    ports: Annotated[tuple[Port, ...], Field(min_length=1)] = (80, 443)
    allow_addresses: tuple[IPvAnyNetwork, ...] = ()
    """Networks that may be connected to although they are not public, such as an intranet."""
    user_agent: Annotated[str, Field(pattern=r"^[\x20-\x7e]+$")] = f"vila-ops/{__version__}"
