"""TLS is verified for the name that was asked, and headers of any kind do no harm."""

import asyncio
import datetime
import ssl

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given
from hypothesis import strategies as st

from vila_ops.data.download.fetch import Fetcher, _location, _retry_after

NAME = "images.test"


@pytest.fixture
def certificate(tmp_path):
    """A self-signed certificate for images.test, and its key, in one file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, NAME)])
    now = datetime.datetime.now(datetime.UTC)
    signed = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(NAME)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    path = tmp_path / "certificate.pem"
    form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    path.write_bytes(signed.public_bytes(serialization.Encoding.PEM) + key.private_bytes(*form))
    return path


@pytest.fixture
def ask(certificate, case, make_settings, names):
    """Ask a server with that certificate for an image under a name; the attempt, and the names that TLS was told."""

    def one(host: str, scheme: str = "https"):
        told = []

        async def serve(reader, writer):
            body = case("ok_png").body
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
            writer.close()

        async def everything():
            context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
            context.load_cert_chain(certificate)
            context.sni_callback = lambda connection, name, its_context: told.append(name)
            server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
            port = server.sockets[0].getsockname()[1]
            settings = make_settings(ports=[port])
            async with Fetcher(settings, resolve=names) as fetcher:
                attempt = await fetcher.attempt(f"{scheme}://{host}:{port}/x.png")
            server.close()
            return attempt

        return asyncio.run(everything()), told

    return one


def test_a_self_signed_certificate_is_refused(ask):
    attempt, _ = ask(NAME)
    assert (attempt.outcome, attempt.http_status, attempt.body) == ("tls", None, b"")
    assert "self-signed" in attempt.detail


def test_a_trusted_certificate_is_taken_for_its_own_name_only(ask, certificate, monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    attempt, told = ask(NAME)
    assert (attempt.outcome, attempt.http_status, told) == ("ok", 200, [NAME])
    attempt, told = ask("others.test")
    assert (attempt.outcome, told) == ("tls", ["others.test"])
    attempt, _ = ask("127.0.0.1")
    assert attempt.outcome == "tls"


def test_a_server_that_does_not_speak_tls_ends_as_tls(make_settings, names):
    async def refuses(reader, writer):
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        writer.close()

    async def everything():
        server = await asyncio.start_server(refuses, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        async with Fetcher(make_settings(ports=[port]), resolve=names) as fetcher:
            attempt = await fetcher.attempt(f"https://{NAME}:{port}/")
        server.close()
        return attempt

    assert asyncio.run(everything()).outcome == "tls"


@given(st.binary())
def test_any_header_is_read_or_ignored(value):
    after = _retry_after([(b"Retry-After", value)])
    assert after is None or after >= 0
    if value:
        assert isinstance(_location([(b"LOCATION", value)]), str)


def test_retry_after_is_seconds_or_a_date():
    in_an_hour = datetime.datetime.now(datetime.UTC) + datetime.timedelta(hours=1)
    assert _retry_after([(b"retry-after", b"120")]) == 120
    date = in_an_hour.strftime("%a, %d %b %Y %H:%M:%S GMT").encode()
    assert 3500 < _retry_after([(b"retry-after", date)]) <= 3600
    assert _retry_after([(b"retry-after", b"Wed, 21 Oct 2015 07:28:00 GMT")]) == 0
    assert _retry_after([(b"retry-after", b"soon")]) is None
    assert _retry_after([]) is None
