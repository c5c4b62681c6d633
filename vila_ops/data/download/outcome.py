"""The possible outcomes of a URL."""

from dataclasses import dataclass
from typing import Literal

Outcome = Literal[
    "ok",
    "bad_url",  # not http(s), not a URL, or one that parsers interpret differently; never requested
    "address_refused",  # its port, or an address of its name, must not be connected to; never requested
    "redirect_refused",  # too many redirects, or a redirect without a target or to a refused URL
    "host_given_up",  # not requested (again), because its host failed too often in a row
    "dns",  # the name does not exist
    "unreachable",  # no connection, or no answer from the name server
    "tls",  # no handshake, or a certificate that is not valid for the name
    "timeout",
    "reset",  # the connection ended too early, or the response is not HTTP
    "not_found",  # 404, 410
    "rate_limited",  # 429
    "client_error",  # the other 4xx
    "server_error",  # 5xx
    "unexpected_status",  # neither 200 nor one of the above
    "too_large",
    "not_an_image",  # of no supported format, by its bytes
    "broken_image",  # starts as an image but cannot be decoded completely
    "too_many_pixels",
]
MAY_PASS: frozenset[Outcome] = frozenset({"unreachable", "timeout", "reset", "rate_limited", "server_error"})
"""Outcomes after which another attempt may succeed."""
HOST_FAILS: frozenset[Outcome] = frozenset({"unreachable", "timeout", "rate_limited"})
"""Outcomes that count as a failure of the host."""
REFUSED: frozenset[Outcome] = frozenset({"bad_url", "address_refused"})
"""Outcomes that are decided before a request."""


class Failure(Exception):
    """An attempt that gave no image."""

    def __init__(self, outcome: Outcome, detail: str) -> None:
        super().__init__(f"{outcome}: {detail}")
        self.outcome = outcome
        self.detail = detail


@dataclass(frozen=True, slots=True)
class DownloadRecord:
    """The final result of one URL."""

    url: str
    outcome: Outcome
    detail: str
    http_status: int | None
    """Status of the last response."""
    attempts: int
    final_url: str
    """The last URL that was requested, after redirects."""
    extension: str | None = None
    """By content; this and the next fields are None without an image."""
    bytes: int | None = None
    sha256: str | None = None
