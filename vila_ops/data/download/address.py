"""Checks of URLs and addresses: one URL parser, and one place where a name becomes a connection.

They prevent server-side request forgery: a URL in the data, or a redirect, must not make this machine connect to its
own services or those of its network. The checked address is the one that is connected to; the name is not resolved a
second time, so DNS rebinding has no effect.
"""

import asyncio
import ipaddress
import re
import socket
from collections.abc import Awaitable, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import httpcore
import httpx

from vila_ops.data.download.outcome import Failure

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Resolve = Callable[[str, int], Awaitable[Sequence[str]]]
"""The addresses of a name (or of an address, which is its own) for a TCP port; raises socket.gaierror."""

DEFAULT_PORTS = {"http": 80, "https": 443}
MAX_ADDRESSES = 4
"""Addresses of one name that are tried in turn."""
RESOLVER_THREADS = 16
_NAME = re.compile(r"[A-Za-z0-9._:-]+")
"""A host name in punycode, or an IPv6 address. Browsers do not accept `<` or `%` either (https://url.spec.whatwg.org)."""
_NUMBER = re.compile(r"(?:^|\.)(?:[0-9]+|0x[0-9a-f]*)\.?$")
"""A host that ends in a number is an IPv4 address, https://url.spec.whatwg.org/#ends-in-a-number-checker."""
# Python 3.11's is_global is true for these, although IANA's registries say otherwise or they embed an IPv4 address
# that a gateway would connect to.
_GLOBAL_IPV6 = ipaddress.IPv6Network("2000::/3")
_NOT_GLOBAL_IPV4 = ("192.0.0.0/24", "192.88.99.0/24")
_NOT_GLOBAL_IPV6 = ("2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20")
_NOT_GLOBAL = tuple(map(ipaddress.ip_network, _NOT_GLOBAL_IPV4 + _NOT_GLOBAL_IPV6))


def parse(text: str, *, ports: Iterable[int], base: httpx.URL | None = None) -> httpx.URL:
    """The URL to request; that of a redirect is relative to `base`. Raises Failure (bad_url, address_refused)."""
    if "\\" in text:
        raise Failure("bad_url", "has a backslash, which URL parsers interpret differently")
    try:
        url = httpx.URL(text) if base is None else base.join(text)
    except (httpx.InvalidURL, ValueError) as error:
        raise Failure("bad_url", str(error)) from error
    if url.scheme not in DEFAULT_PORTS:
        raise Failure("bad_url", f"scheme {url.scheme[:20]!r} is not http or https")
    if url.userinfo:
        raise Failure("bad_url", "has a user name before an @")
    host = url.raw_host.decode("ascii")
    if not host:
        raise Failure("bad_url", "has no host")
    if not _NAME.fullmatch(host):
        raise Failure("bad_url", f"host {host[:40]!r} has characters that no host name has")
    if _NUMBER.search(host) and not _is_address(host):
        raise Failure("bad_url", f"host {host[:40]!r} is an address in a form other than a.b.c.d")
    port = url.port or DEFAULT_PORTS[url.scheme]
    if port not in ports:
        raise Failure("address_refused", f"port {port} is not among {', '.join(map(str, ports))}")
    return url


def is_public(address: Address) -> bool:
    """Whether an address is global unicast (IANA's special-purpose registries, RFC 6890)."""
    if isinstance(address, ipaddress.IPv6Address) and address not in _GLOBAL_IPV6:
        return False
    return address.is_global and not address.is_multicast and not any(address in network for network in _NOT_GLOBAL)


class SystemResolver:
    """The system resolver, in separate threads, so that dead name servers block nothing else."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(RESOLVER_THREADS, thread_name_prefix="resolve")

    async def __call__(self, host: str, port: int) -> list[str]:
        """The addresses in the system's order of preference; raises socket.gaierror."""
        loop = asyncio.get_running_loop()
        infos = await loop.run_in_executor(
            self._threads, lambda: socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        )
        return list(dict.fromkeys(str(place[0]) for *_, place in infos))


class CheckedNetwork(httpcore.AsyncNetworkBackend):
    """Opens all connections of the client, only to addresses that are public or allowed."""

    def __init__(self, *, resolve: Resolve, allow: Sequence[Network]) -> None:
        self._resolve = resolve
        self._allow = allow
        self._tcp = httpcore.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        """Resolve once, check, connect to the checked address. Raises Failure, and httpcore's errors."""
        try:
            async with asyncio.timeout(timeout):
                *first, last = await self._checked(host, port)
                for address in first:
                    try:
                        return await self._tcp.connect_tcp(address, port, None, local_address, socket_options)
                    except httpcore.ConnectError:
                        continue  # try the next address; the error of the last one is raised
                return await self._tcp.connect_tcp(last, port, None, local_address, socket_options)
        except TimeoutError as error:
            raise httpcore.ConnectTimeout(f"no connection in {timeout} s") from error

    async def _checked(self, host: str, port: int) -> list[str]:
        """The addresses of a name. One refused address refuses the name: public hosts have no private addresses."""
        try:
            addresses = [ipaddress.ip_address(address) for address in await self._resolve(host, port)]
        except socket.gaierror as error:
            if error.errno == socket.EAI_AGAIN:
                raise Failure("unreachable", "the name server did not answer") from error
            raise Failure("dns", "the name has no address") from error
        except UnicodeError as error:  # a label that is empty or longer than 63 characters
            raise Failure("bad_url", f"host {host[:40]!r} cannot be a name") from error
        if not addresses:
            raise Failure("dns", "the name has no address")
        for address in addresses:
            if not is_public(address) and not any(address in network for network in self._allow):
                raise Failure("address_refused", f"{address} is not a public address")
        return [str(address) for address in addresses[:MAX_ADDRESSES]]


def _is_address(host: str) -> bool:
    try:
        ipaddress.IPv4Address(host)
    except ValueError:
        return False
    return True
