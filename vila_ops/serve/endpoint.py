"""The HTTP client by which commands of this package ask a served endpoint. Light."""

import functools

import httpx


def client(url: str) -> httpx.Client:
    """The client for all questions of this process to such a URL: making one takes more CPU than asking.

    No connection is kept, so each question reaches what listens then.
    """
    return _client(secure=not url.startswith("http://"))


@functools.cache
def _client(*, secure: bool) -> httpx.Client:
    """Without TLS, no certificates of authorities are read, which takes most of the time."""
    limits = httpx.Limits(max_keepalive_connections=0)
    return httpx.Client(timeout=5, trust_env=False, verify=secure, limits=limits)
