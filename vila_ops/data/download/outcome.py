"""What can become of a URL, in fixed words."""

from dataclasses import dataclass
from typing import Literal

Outcome = Literal[
    "ok",
    "bad_url",  # not http(s), not a URL, or one that two readers may understand differently; never asked
    "address_refused",  # its port, or an address of its name, is one that must not be connected to; never asked
    "redirect_refused",  # redirected too often, to nowhere, or to what is refused as above
    "host_given_up",  # not asked (again), because its host failed too often in a row
    "dns",  # the name does not exist
    "unreachable",  # no connection, or no answer from the name server
    "tls",  # no handshake, or a certificate that does not hold for the name
    "timeout",
    "reset",  # the connection ended too early, or what came is not HTTP
    "not_found",  # 404, 410
    "rate_limited",  # 429
    "client_error",  # the other 4xx
    "server_error",  # 5xx
    "unexpected_status",  # neither 200 nor one of the above
    "too_large",
    "not_an_image",  # of none of the formats, by its bytes
    "broken_image",  # begins as an image and cannot be decoded to its end
    "too_many_pixels",
]
MAY_PASS: frozenset[Outcome] = frozenset({"unreachable", "timeout", "reset", "rate_limited", "server_error"})
"""Worth another attempt."""
HOST_FAILS: frozenset[Outcome] = frozenset({"unreachable", "timeout", "rate_limited"})
"""Speaks against the whole host."""
REFUSED: frozenset[Outcome] = frozenset({"bad_url", "address_refused"})
"""Decided before anything is sent."""


class Failure(Exception):
    """A URL gave no image."""

    def __init__(self, outcome: Outcome, detail: str) -> None:
        super().__init__(f"{outcome}: {detail}")
        self.outcome = outcome
        self.detail = detail


@dataclass(frozen=True, slots=True)
class DownloadRecord:
    """What became of one URL."""

    url: str
    outcome: Outcome
    detail: str
    http_status: int | None
    """Of the last answer."""
    attempts: int
    final_url: str
    """The last URL that was asked, after redirects."""
    extension: str | None = None
    """By content; this and what follows only where there is an image."""
    bytes: int | None = None
    sha256: str | None = None
