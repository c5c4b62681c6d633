"""Azure's blobs as far as raw data needs them: blobs whole or in blocks, ranges of a version, listings.

Signatures are not checked.
"""

import hashlib
import re
import threading
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

DATE = formatdate(0, usegmt=True)


class AzureServer(ThreadingHTTPServer):
    """Blobs by ACCOUNT/CONTAINER/NAME."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.blobs: dict[str, bytes] = {}
        self.blocks: dict[str, bytes] = {}
        """Of uploads in parts, by BLOB ID."""
        self.status = 200
        """Another one answers every call."""
        self.cuts = 0
        """Bodies that break off, from now on."""
        self.endpoint = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()


class Handler(BaseHTTPRequestHandler):
    """Handles one call."""

    protocol_version = "HTTP/1.1"
    server: AzureServer

    def handle_call(self) -> None:
        """Answer a call."""
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        url = urlsplit(self.path)
        name, query = unquote(url.path).strip("/"), {key: one[0] for key, one in parse_qs(url.query).items()}
        if self.server.status != 200:
            self.reply(self.server.status, {}, b"")
        elif self.command == "PUT" and query.get("comp") == "block":
            self.server.blocks[f"{name} {query['blockid']}"] = body
            self.reply(201, {}, b"")
        elif self.command == "PUT":
            if query.get("comp") == "blocklist":
                blocks = re.findall("<(?:Uncommitted|Latest)>(.*?)</", body.decode())
                body = b"".join(self.server.blocks.pop(f"{name} {block}") for block in blocks)
            self.server.blobs[name] = body
            self.reply(201, {"ETag": f'"{tag_of(body)}"', "Last-Modified": DATE}, b"")
        elif query.get("comp") == "list":
            listed = listing(self.server.blobs, f"{name}/", query.get("prefix", ""), query.get("delimiter"))
            self.reply(200, {"Content-Type": "application/xml"}, listed.encode())
        elif (content := self.server.blobs.get(name)) is None:
            self.reply(404, {}, b"")
        else:
            self.reply_blob(content)

    do_GET = do_HEAD = do_PUT = do_POST = handle_call

    def reply_blob(self, content: bytes) -> None:
        """A blob, or a range of it."""
        tag = f'"{tag_of(content)}"'
        facts = {"ETag": tag, "Last-Modified": DATE, "Content-Type": "application/octet-stream"}
        if self.headers.get("If-Match", tag) != tag:
            self.reply(412, {}, b"")
        elif wanted := self.headers.get("Range"):
            start, end = map(int, wanted.removeprefix("bytes=").split("-"))
            part = content[start : end + 1]
            whole = f"bytes {start}-{start + len(part) - 1}/{len(content)}"
            self.reply(206, {**facts, "Content-Range": whole}, part)
        else:
            self.reply(200, facts, content)

    def reply(self, status: int, headers: dict[str, str], body: bytes) -> None:
        """Answer."""
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET" and self.server.cuts:
            self.server.cuts -= 1
            body = body[: len(body) // 2]
            self.close_connection = True
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Log nothing."""


def tag_of(content: bytes) -> str:
    """An ETag as Azure writes it in listings: without quotes."""
    return f"0x{hashlib.md5(content, usedforsecurity=False).hexdigest()[:15].upper()}"


def listing(blobs: dict[str, bytes], container: str, prefix: str, delimiter: str | None) -> str:
    """The blobs of a container whose names begin with a prefix; with a delimiter, folders in place of their blobs."""
    names = sorted(one.removeprefix(container) for one in blobs if one.startswith(f"{container}{prefix}"))
    folders, parts = set(), []
    for name in names:
        head, slash, _ = name.removeprefix(prefix).partition(delimiter or "\0")
        if slash:
            folders.add(f"{prefix}{head}{slash}")
            continue
        content = blobs[f"{container}{name}"]
        facts = {
            "Last-Modified": DATE,
            "Content-Length": str(len(content)),
            "Content-Type": "application/octet-stream",
            "Etag": tag_of(content),
        }
        told = "".join(f"<{key}>{value}</{key}>" for key, value in facts.items())
        parts.append(f"<Blob><Name>{escape(name)}</Name><Properties>{told}</Properties></Blob>")
    parts += [f"<BlobPrefix><Name>{escape(one)}</Name></BlobPrefix>" for one in sorted(folders)]
    return f"<EnumerationResults><Blobs>{''.join(parts)}</Blobs><NextMarker /></EnumerationResults>"
