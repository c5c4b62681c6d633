"""The HTTP client by which commands of this package ask a served endpoint. Light."""

import functools

import httpx


@functools.cache
def client() -> httpx.Client:
    """One client for all questions of this process: making one takes more CPU than asking.

    No connection is kept, so each question reaches what listens then.
    """
    return httpx.Client(timeout=5, trust_env=False, limits=httpx.Limits(max_keepalive_connections=0))
