"""Images of requests: from a URL to the encoded square that the engine reads. Processes that can be killed decode."""

import asyncio
import base64
import binascii
import os
import re
import subprocess
import sys
import threading
from collections.abc import Awaitable
from contextlib import suppress
from pathlib import Path
from urllib.parse import unquote_to_bytes

import vila_ops
from vila_ops.config.download import DownloadSettings
from vila_ops.config.serve import RemoteImages, RequestLimits
from vila_ops.data.download.address import Resolve, SystemResolver, parse
from vila_ops.data.download.fetch import Fetcher
from vila_ops.data.download.outcome import Failure
from vila_ops.serve.app.decoder import ANSWER, LENGTH, READY, REFUSED, SQUARE, DecoderSettings
from vila_ops.serve.app.errors import ApiError

DATA_URL = re.compile(r"data:([\w.+-]+/[\w.+-]+)?(;[\w.+-]+=[^;,]*)*;base64,", re.ASCII | re.IGNORECASE)
"""RFC 2397: the media type and its parameters may be left out."""
START_SECONDS = 60.0
"""How long a decoder may take to start; it imports NumPy and Pillow."""
REMOTE = re.compile(r"https?:", re.IGNORECASE)


class DecodeFailed(Exception):
    """An image was not decoded; the text says why, and is fit for the client."""


class Decoder:
    """One process of `decoder.py`. Its methods block."""

    def __init__(self, settings: DecoderSettings) -> None:
        command = [sys.executable, "-m", "vila_ops.serve.app.decoder", settings.model_dump_json()]
        paths = [str(Path(vila_ops.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OPENBLAS_NUM_THREADS": "1"}
        self._process = subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        if self._answer(b"", timeout_seconds=START_SECONDS)[0] != READY:
            raise RuntimeError("the image decoder did not start")

    def square(self, data: bytes, *, timeout_seconds: float) -> bytes:
        """The encoded square. Raises DecodeFailed; the process has then ended if it did not answer."""
        status, answer = self._answer(LENGTH.pack(len(data)) + data, timeout_seconds=timeout_seconds)
        if status == SQUARE:
            return answer
        if status == REFUSED:
            raise DecodeFailed(answer.decode())
        raise DecodeFailed(f"could not be decoded within {timeout_seconds:g} seconds and the memory of one image")

    def _answer(self, message: bytes, *, timeout_seconds: float) -> tuple[bytes, bytes]:
        """Status and content of the answer to a message; both are empty if the process ended or was killed."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        timer = threading.Timer(timeout_seconds, self._process.kill)
        timer.start()
        try:
            self._process.stdin.write(message)
            self._process.stdin.flush()
            head = self._process.stdout.read(ANSWER.size)
            status, length = ANSWER.unpack(head) if len(head) == ANSWER.size else (b"", 0)
            answer = self._process.stdout.read(length)
            if status and len(answer) == length:
                return status, answer
        except BrokenPipeError:
            pass  # it ended before it had read the message
        finally:
            timer.cancel()
        self.kill()
        return b"", b""

    def alive(self) -> bool:
        """Whether the process can take another image."""
        return self._process.poll() is None

    def kill(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        """Kill it and close its pipes."""
        self.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with suppress(BrokenPipeError):
                pipe.close()


class Media:
    """Reads the images of requests. For one event loop."""

    def __init__(
        self, settings: DecoderSettings, limits: RequestLimits, remote: RemoteImages, *, resolve: Resolve | None = None
    ) -> None:
        self._settings, self._limits, self._remote = settings, limits, remote
        self._places = asyncio.Semaphore(limits.decoders)
        self._idle: list[Decoder] = []
        self._resolve = resolve
        self._fetcher: Fetcher | None = None

    async def square(self, url: str, *, param: str) -> bytes:
        """The encoded square of the image at a URL. Raises ApiError 400 that names the parameter."""
        data = await self._fetch(url, param) if REMOTE.match(url) else await asyncio.to_thread(_bytes, url, param)
        async with self._places:
            decoder = self._idle.pop() if self._idle else await asyncio.to_thread(Decoder, self._settings)
            try:
                job: Awaitable[bytes] = asyncio.to_thread(
                    decoder.square, data, timeout_seconds=self._limits.decode_seconds
                )
                return await job
            except DecodeFailed as error:
                raise ApiError(400, f"{param}: {error}", param=param, code="invalid_image") from None
            except asyncio.CancelledError:  # the client left: its image is decoded no further
                decoder.kill()
                raise
            finally:
                if decoder.alive():
                    self._idle.append(decoder)
                else:
                    decoder.close()

    async def close(self) -> None:
        """End the processes and the connections."""
        while self._idle:
            self._idle.pop().close()
        if self._fetcher is not None:
            await self._fetcher.close()

    async def _fetch(self, url: str, param: str) -> bytes:
        remote = self._remote
        if not remote.hosts:
            text = (
                f"{param}: images are read from base64 data: URLs (data:image/png;base64,...) only; nothing is fetched"
            )
            raise ApiError(400, text, param=param, code="unsupported_image_url")
        if self._fetcher is None:
            settings = DownloadSettings(
                connect_seconds=remote.timeout_seconds,
                read_seconds=remote.timeout_seconds,
                deadline_seconds=remote.timeout_seconds,
                max_redirects=0,
                max_bytes=remote.max_bytes,
                ports=remote.ports,
                allow_addresses=remote.networks,
            )
            self._fetcher = Fetcher(settings, resolve=self._resolve or SystemResolver())
        try:
            host = parse(url, ports=remote.ports).raw_host.decode()
            if host not in remote.hosts:
                text = f"{param}: images are fetched from {', '.join(remote.hosts)} only"
                raise ApiError(400, text, param=param, code="unsupported_image_url")
            return await self._fetcher.body(url)
        except Failure as failure:
            text = f"{param}: the image could not be fetched ({failure.outcome})"
            raise ApiError(400, text, param=param, code="image_not_fetched") from None


def _bytes(url: str, param: str) -> bytes:
    """The bytes of a base64 data URL, which may be wrapped and percent-encoded, and go without padding as in browsers
    (the forgiving decode of WHATWG's Infra Standard)."""
    start = DATA_URL.match(url[:1000])
    if start is None:
        text = f"{param}: images are read from base64 data: URLs (data:image/png;base64,...); this is none"
        raise ApiError(400, text, param=param, code="unsupported_image_url")
    try:
        encoded = unquote_to_bytes(url[start.end() :]).translate(None, b" \t\r\n")
        return base64.b64decode(encoded + b"=" * (-len(encoded) % 4), validate=True)
    except (binascii.Error, ValueError):
        raise ApiError(400, f"{param}: not valid base64", param=param, code="invalid_image") from None
