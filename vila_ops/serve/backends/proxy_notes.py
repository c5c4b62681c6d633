"""What commands and the router in Ray Serve's proxy tell each other: two values in the cluster's key-value store.

Light at import. Each function needs a process that is connected to the cluster.
"""

from vila_ops import __version__
from vila_ops.config import Config

NAMESPACE = "vila_ops"
SERVICE, RELEASE = "service", "release"


class Routed(Config):
    """The service whose router runs in the proxy."""

    name: str
    register_uri: str
    """Address of its register."""


def routed() -> Routed | None:
    """The service that was opened last and was not closed."""
    from ray.experimental import internal_kv

    value: bytes | None = internal_kv._internal_kv_get(SERVICE, namespace=NAMESPACE)
    return None if value is None else Routed.model_validate_json(value)


def route(service: Routed | None) -> None:
    """Replace the service."""
    from ray.experimental import internal_kv

    if service is None:
        internal_kv._internal_kv_del(SERVICE, namespace=NAMESPACE)
    else:
        internal_kv._internal_kv_put(SERVICE, service.model_dump_json(), namespace=NAMESPACE)


def announce_release() -> None:
    """Say that the proxy, which this process is, has the router of this release of the package."""
    from ray.experimental import internal_kv

    internal_kv._internal_kv_put(RELEASE, __version__, namespace=NAMESPACE)


def is_of_this_release() -> bool:
    """Whether the proxy that was started last has the router of this release."""
    from ray.experimental import internal_kv

    value = internal_kv._internal_kv_get(RELEASE, namespace=NAMESPACE)
    return bool(value == __version__.encode())
