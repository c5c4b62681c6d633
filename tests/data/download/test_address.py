"""Which URLs are asked and which addresses are connected to: nothing of a matrix of tricks ever is."""

import asyncio
import ipaddress
import socket

import anyio
import httpcore
import httpx
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from vila_ops.data.download import download
from vila_ops.data.download.address import CheckedNetwork, SystemResolver, is_public, parse
from vila_ops.data.download.outcome import Failure

PORTS = (80, 443)
# P stands for the port on which canaries listen, which the settings allow.
FORMS = """
http://127.0.0.1:P/ http://127.0.0.2:P/ http://127.1:P/ http://127.0.1:P/ http://127.255.255.254:P/ http://0:P/
http://0.0.0.0:P/ http://0x7f.1:P/ http://0x7f.0.0.1:P/ http://0x7f000001:P/ http://0X7F000001:P/ http://0x7f.0x0.0x0.0x1:P/
http://2130706433:P/ http://017700000001:P/ http://0177.0.0.1:P/ http://0177.1:P/ http://00000177.0.0.1:P/
http://127.0.0.1.:P/ http://127.1.:P/ http://4294967297:P/ http://0x100000001:P/ http://127.0.0.01:P/ http://1.0x:P/
http://[::1]:P/ http://[::]:P/ http://[0:0:0:0:0:0:0:1]:P/ http://[::ffff:127.0.0.1]:P/ http://[::ffff:7f00:1]:P/
http://[0000:0000:0000:0000:0000:0000:0000:0001]:P/ http://[::ffff:0x7f.1]:P/ http://[::ffff:127.1]:P/ http://[0::1]:P/
http://[::FFFF:7F00:0001]:P/ http://[0:0:0:0:0:ffff:127.0.0.1]:P/ http://[64:ff9b::7f00:1]:P/ http://[2002:c0a8:1::]:P/
http://[::1]:P.test/ http://[::1].:P/ http://[::1]@8.8.8.8:P/ http://[ff01::1]:P/ http://[fe80::a9fe:a9fe]:P/
http://0177.0x0.0.1:P/ http://127.0x1:P/ http://0x7f.1.:P/ http://127.00.00.01:P/ http://192.168.1:P/ http://10.1:P/
http://172.16.1:P/ http://169.254.169.254.:P/ http://0251.0376.0251.0376:P/ http://[::ffff:a9fe:a9fe]:P/ http://0000.0:P/
http://[::127.0.0.1]:P/ http://[::ffff:0:127.0.0.1]:P/ http://[64:ff9b::127.0.0.1]:P/ http://[64:ff9b:1::7f00:1]:P/
http://[2002:7f00:1::]:P/ http://[2001:0:7f00:1::]:P/ http://[fe80::1]:P/ http://[fe80::1%25lo]:P/ http://[fe80::1%lo]:P/
http://[fc00::1]:P/ http://[fd00:ec2::254]:P/ http://[fec0::1]:P/ http://[ff02::1]:P/ http://[2001:db8::1]:P/ http://[100::1]:P/
http://[::ffff:169.254.169.254]:P/ http://[3fff::1]:P/ http://[5f00::1]:P/ http://[::1%251]:P/ http://[v1.x]:P/ http://[::1:P/
http://10.0.0.1:P/ http://10.255.255.255:P/ http://172.16.0.1:P/ http://172.31.255.255:P/ http://192.168.0.1:P/
http://169.254.169.254:P/latest/meta-data/ http://0xa9fea9fe:P/ http://2852039166:P/ http://169.254.43518:P/
http://100.64.0.1:P/ http://100.100.100.200:P/ http://192.0.0.1:P/ http://192.0.0.192:P/ http://192.0.2.1:P/ http://198.18.0.1:P/
http://198.51.100.1:P/ http://203.0.113.1:P/ http://192.88.99.1:P/ http://224.0.0.1:P/ http://239.255.255.250:P/
http://240.0.0.1:P/ http://255.255.255.255:P/ http://0.1.2.3:P/
http://localhost:P/ http://LOCALHOST:P/ http://localhost.:P/ http://loc%61lhost:P/ http://private.test:P/ http://mixed.test:P/
http://mapped.test:P/ http://8.8.8.8@127.0.0.1:P/ http://user:secret@127.0.0.1:P/ http://127.0.0.1:P@8.8.8.8/
http://@127.0.0.1:P/ http://8.8.8.8%40127.0.0.1:P/ http://8.8.8.8\\@127.0.0.1:P/ http://127.0.0.1:P\\@8.8.8.8/
http:\\\\127.0.0.1:P\\ http:/\\127.0.0.1:P/ http://8.8.8.8\\.127.0.0.1:P/ http:///127.0.0.1:P/
http:127.0.0.1:P/ http:/127.0.0.1:P/ //127.0.0.1:P/ 127.0.0.1:P/ /127.0.0.1 http:// http://:P/ https://127.0.0.1:P/
http://127。0。0。1:P/ http://１２７.0.0.1:P/ http://①②⑦.0.0.1:P/ http://127.0.0.1:P:80/ http://127.0.0.1:00P/
http://127.0.0.1:-1/ http://127.0.0.1:65616/ http://127.0.0.1:22/ http://8.8.8.8:22/ http://8.8.8.8:6379/ http://[::1]:25/
ftp://127.0.0.1:P/ file:///etc/passwd file://127.0.0.1/etc/passwd gopher://127.0.0.1:P/_GET ws://127.0.0.1:P/
javascript:alert(1) data:image/png;base64,iVBORw0KGgo= unix:///run/docker.sock jar:http://127.0.0.1:P/
HTTP+UNIX://%2Frun/x ldap://127.0.0.1:P/
http://127.0.0.1:P\t/ http://127.0.0.1\r\n:P/ http://127.0.0.1:P/\r\nHost:x http://127.0.0.1\x00.test:P/ http://a..test:P/
http://example.test%00.127.0.0.1:P/ http://127.0.0.1%2f@8.8.8.8:P/ http://xn--:P/ http://--:P/ http://?@127.0.0.1:P/
"""
ADDRESSES = {
    "localhost": ["127.0.0.1"],
    "private.test": ["10.1.2.3"],
    "mixed.test": ["93.184.215.14", "127.0.0.1"],
    "mapped.test": ["::ffff:127.0.0.1"],
}


async def resolve(host: str, port: int) -> list[str]:
    """The names of the matrix, and by the machine's own rules what is a number in whatever form."""
    known = ADDRESSES.get(host.lower().rstrip("."))
    if known:
        return known
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
    return [place[4][0] for place in found]


def forms(port: int) -> list[str]:
    """The matrix: blank-separated, so that a form may hold other control characters."""
    return [form.replace("P", str(port)) for form in FORMS.replace("\n", " ").split(" ") if form]


@pytest.fixture
def connections(monkeypatch):
    """Where the network below was asked to connect to; nobody answers."""
    asked = []

    async def connect_tcp(remote_host, remote_port, **more):
        asked.append((remote_host, remote_port))
        raise OSError("nobody is there")

    monkeypatch.setattr(anyio, "connect_tcp", connect_tcp)
    return asked


def test_no_form_of_a_forbidden_address_is_connected_to(make_settings, tmp_path, connections):
    urls = forms(8181)
    assert len(set(urls)) >= 150
    settings = make_settings(ports=[80, 443, 8181], allow_addresses=[])
    outcomes = asyncio.run(download(urls, tmp_path / "a", settings=settings, resolve=resolve))
    assert connections == []
    allowed = {"bad_url", "address_refused", "dns"}
    assert outcomes.counts.keys() <= allowed, outcomes.counts
    assert outcomes.counts["address_refused"] >= 40


def test_no_form_reaches_a_server_that_listens_on_the_loopback(make_settings, tmp_path):
    reached = []

    async def everything() -> None:
        async def caught(reader, writer):
            reached.append(writer.get_extra_info("sockname"))
            writer.close()

        canary = await asyncio.start_server(caught, "127.0.0.1", 0)
        port = canary.sockets[0].getsockname()[1]
        settings = make_settings(ports=[80, 443, port], allow_addresses=[])
        await download(forms(port), tmp_path / "a", settings=settings, resolve=resolve)
        canary.close()

    asyncio.run(everything())
    assert reached == []


@pytest.mark.parametrize("host", ["127.1", "0x7f.1", "2130706433", "0177.0.0.1", "::ffff:127.0.0.1", "localhost"])
def test_an_address_is_refused_also_when_only_the_resolver_understands_it(host, connections):
    network = CheckedNetwork(resolve=SystemResolver(), allow=())
    with pytest.raises(Failure, match="address_refused"):
        asyncio.run(network.connect_tcp(host, 80))
    assert connections == []


def test_the_connection_goes_to_the_address_that_was_checked(connections):
    answers = iter([["93.184.215.14"], ["127.0.0.1"]])
    asked = []

    async def rebinds(host, port):
        asked.append(host)
        return next(answers)

    network = CheckedNetwork(resolve=rebinds, allow=())
    with pytest.raises(httpcore.ConnectError):
        asyncio.run(network.connect_tcp("rebinding.test", 80))
    assert (asked, connections) == (["rebinding.test"], [("93.184.215.14", 80)])
    with pytest.raises(Failure, match="address_refused"):
        asyncio.run(network.connect_tcp("rebinding.test", 80))
    assert connections == [("93.184.215.14", 80)]


def test_a_name_that_also_has_a_forbidden_address_is_refused(connections):
    async def both(host, port):
        return ["93.184.215.14", "169.254.169.254"]

    with pytest.raises(Failure, match=r"169\.254\.169\.254 is not a public address"):
        asyncio.run(CheckedNetwork(resolve=both, allow=()).connect_tcp("both.test", 80))
    assert connections == []


def test_each_address_of_a_name_is_tried_in_turn(connections):
    async def two(host, port):
        return ["2606:2800:21f::1", "93.184.215.14"]

    with pytest.raises(httpcore.ConnectError):
        asyncio.run(CheckedNetwork(resolve=two, allow=()).connect_tcp("two.test", 443))
    assert connections == [("2606:2800:21f::1", 443), ("93.184.215.14", 443)]


@pytest.mark.parametrize(
    ("error", "outcome"),
    [(socket.EAI_NONAME, "dns"), (socket.EAI_AGAIN, "unreachable")],
)
def test_a_name_that_does_not_exist_is_told_from_a_name_server_that_is_silent(error, outcome):
    async def fails(host, port):
        raise socket.gaierror(error, "said by the resolver")

    with pytest.raises(Failure, match=outcome):
        asyncio.run(CheckedNetwork(resolve=fails, allow=()).connect_tcp("lost.test", 80))


def test_a_resolver_that_hangs_is_a_timeout():
    async def hangs(host, port):
        await asyncio.sleep(60)
        return []

    with pytest.raises(httpcore.ConnectTimeout):
        asyncio.run(CheckedNetwork(resolve=hangs, allow=()).connect_tcp("hangs.test", 80, timeout=0.05))


@pytest.mark.parametrize(
    "address",
    [
        "8.8.8.8",
        "1.1.1.1",
        "93.184.215.14",
        "172.15.255.255",
        "172.32.0.0",
        "100.63.255.255",
        "2606:4700::1111",
        "2a00::1",
    ],
)
def test_public_addresses_are_allowed(address):
    assert is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize(
    ("text", "asked"),
    [
        ("http://ex.test/b.jpg", "http://ex.test/b.jpg"),
        ("HTTP://EX.test/b c.jpg?x=ä#part", "http://ex.test/b%20c.jpg?x=%C3%A4#part"),
        ("https://münchen.test/", "https://xn--mnchen-3ya.test/"),
        ("http://ex.test/a/../b%2Fc", "http://ex.test/b%2Fc"),
        ("http://8.8.8.8/x", "http://8.8.8.8/x"),
        ("http://8.8.8.8/#@127.0.0.1/", "http://8.8.8.8/#@127.0.0.1/"),
        ("https://3.cdn.ex1.test/", "https://3.cdn.ex1.test/"),
        ("http://ex.test?a=http://u@h/", "http://ex.test/?a=http://u@h/"),
    ],
)
def test_ordinary_urls_are_read_as_browsers_do(text, asked):
    assert str(parse(text, ports=PORTS)).replace("test?", "test/?") == asked


def test_a_redirect_is_read_relative_to_where_it_came_from():
    base = parse("https://ex.test/a/b?c", ports=PORTS)
    assert str(parse("../d.png", ports=PORTS, base=base)) == "https://ex.test/d.png"
    assert str(parse("//other.test/e", ports=PORTS, base=base)) == "https://other.test/e"
    for bad in ("file:///etc/passwd", "\\\\other.test/", "http://a@b.test/", "//127.1/"):
        with pytest.raises(Failure, match="bad_url"):
            parse(bad, ports=PORTS, base=base)


@pytest.mark.slow
@example("HTTP://<")  # a host that httpx writes back otherwise than it reads it
@given(st.text() | st.builds(lambda a, b, c: f"http://{a}:{b}/{c}", st.text(), st.text(max_size=6), st.text()))
def test_any_text_is_a_url_that_may_be_asked_or_a_failure_with_a_word(text):
    try:
        url = parse(text, ports=PORTS)
    except Failure:
        return
    assert url.scheme in ("http", "https")
    assert url.raw_host
    assert not url.userinfo
    assert httpx.URL(str(url)) == url
