"""Servers of S3 that tests share: one that checks signatures, and a proxy that makes faults."""

import contextlib
import http.client
import io
import logging
import secrets
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal

import boto3
import httpx
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import BaseWSGIServer, make_server

KEY, SECRET = "right-key", "right-secret-" + secrets.token_hex(8)
Fault = Literal["error", "slow_down", "conflict", "refused", "hang", "reset", "lost", "partial", "lie"]
"""error, slow_down, conflict, refused: an error of S3. hang, reset: no answer, nothing done. lost: done, but no answer.
partial: half of the answer's body. lie: a body with a flipped bit."""
READ_SECONDS = 0.5
ANSWERS = {
    "error": (500, "InternalError"),
    "slow_down": (503, "SlowDown"),
    "conflict": (409, "ConditionalRequestConflict"),
    "refused": (403, "AccessDenied"),
}
Choose = Callable[[str, str], Fault | None]
"""Chooses the fault of a call from its method and target."""


def moto(host: str, port: int) -> BaseWSGIServer:
    """moto's S3. One request at a time, because its conditional put looks first and writes then."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    made, lock = DomainDispatcherApplication(create_backend_app), threading.Lock()

    def app(environ: Any, start_response: Any) -> list[bytes]:
        body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        with lock:  # not while it waits for a client, which may be stopped
            return list(made({**environ, "wsgi.input": io.BytesIO(body)}, start_response))

    return make_server(host, port, app, threaded=True)


@contextlib.contextmanager
def nanio(folder: Path, port: int) -> Iterator[str]:
    """The endpoint of a server that honours keys and ignores conditions."""
    process = subprocess.Popen(
        [str(Path(sys.executable).parent / "nanio"), "serve", "--port", str(port), "--data-dir", str(folder / "data")],
        env={"NANIO_ACCESS_KEY": KEY, "NANIO_SECRET_KEY": SECRET, "HOME": str(folder)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    endpoint = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 1200
        while True:
            try:
                httpx.get(endpoint, trust_env=False)
                break
            except httpx.TransportError:
                assert time.monotonic() < deadline
                time.sleep(0.1)
        yield endpoint
    finally:
        process.terminate()
        process.wait(60)


class Proxy(ThreadingHTTPServer):
    """Forwards calls to another server. `choose` chooses their faults, and `calls` records them."""

    daemon_threads = True

    def __init__(self, endpoint: str) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.upstream = endpoint.removeprefix("http://")
        self.choose: Choose = lambda _method, _target: None
        self.calls: list[tuple[str, str]] = []
        self.endpoint = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore clients that closed their connection."""


class Handler(BaseHTTPRequestHandler):
    """Handles one call."""

    protocol_version = "HTTP/1.1"
    server: Proxy

    def handle_call(self) -> None:
        """Forward and answer the call, or apply its fault."""
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.calls.append((self.command, self.path))
        match self.server.choose(self.command, self.path):
            case "error" | "slow_down" | "conflict" | "refused" as fault:
                status, code = ANSWERS[fault]
                self.reply(status, {}, f"<Error><Code>{code}</Code><Message>no</Message></Error>".encode())
            case "hang":
                time.sleep(2 * READ_SECONDS)
                self.reset()
            case "reset":
                self.reset()
            case "lost":
                self.forward(body)
                self.reset()
            case "partial":
                status, headers, answer = self.forward(body)
                self.reply(status, headers, answer, cut=len(answer) // 2)
            case "lie":
                status, headers, answer = self.forward(body)
                self.reply(status, headers, bytes([answer[0] ^ 1]) + answer[1:] if answer else answer)
            case None:
                self.reply(*self.forward(body))

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = handle_call

    def forward(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
        """Return the upstream server's answer."""
        upstream = http.client.HTTPConnection(self.server.upstream, timeout=30)
        upstream.request(self.command, self.path, body, dict(self.headers.items()))
        answer = upstream.getresponse()
        read = answer.read()
        upstream.close()
        kept = ("content-length", "connection", "transfer-encoding", "date", "server")
        headers = {name: value for name, value in answer.getheaders() if name.lower() not in kept}
        if self.command == "HEAD":
            headers["Content-Length"] = answer.getheader("Content-Length", "0")
        return answer.status, headers, read

    def reply(self, status: int, headers: dict[str, str], body: bytes, *, cut: int | None = None) -> None:
        """Answer. `cut` ends the connection after that many bytes of the body."""
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers | {"Connection": "close"}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body[:cut])
        self.close_connection = True

    def reset(self) -> None:
        """End the connection with RST."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True

    def log_message(self, *_: Any) -> None:
        """Log nothing."""


if __name__ == "__main__":  # HOST PORT BUCKET: moto's S3 with an empty bucket, for other processes
    server = moto(sys.argv[1], int(sys.argv[2]))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    boto3.client("s3").create_bucket(Bucket=sys.argv[3])
    threading.Event().wait()
