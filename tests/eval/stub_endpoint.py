"""A stub of an OpenAI-compatible endpoint: a real HTTP server that does what each test says."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = tuple[int, dict[str, Any], dict[str, str]]
"""HTTP status, body and headers."""


@dataclass
class Server:
    """A server whose answers are a function of the question's text and of how often it was asked."""

    url: str
    answer: Callable[[str, int], Answer]
    bodies: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    running: int = 0
    most: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


def completion(text: str | None, reason: str = "stop", **message: Any) -> Answer:
    choice = {"index": 0, "message": {"role": "assistant", "content": text, **message}, "finish_reason": reason}
    return 200, {"choices": [choice], "usage": {"prompt_tokens": 7, "completion_tokens": 2}}, {}


@contextmanager
def serving() -> Iterator[Server]:
    """A server that answers in capitals until it is told otherwise."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            text = body["messages"][-1]["content"][-1]["text"]
            with state.lock:
                state.bodies.append(body)
                state.keys.append(self.headers.get("Authorization"))
                tries = sum(one["messages"][-1]["content"][-1]["text"] == text for one in state.bodies)
                state.running += 1
                state.most = max(state.most, state.running)
            status, content, headers = state.answer(text, tries)
            with state.lock:
                state.running -= 1
            data = json.dumps(content).encode()
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(data))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            """Nothing."""

    class Http(ThreadingHTTPServer):
        request_queue_size = 128  # by default 5: of more connections at once, some are reset

    http = Http(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    state = Server(f"http://127.0.0.1:{http.server_port}/v1", lambda text, tries: completion(text.upper()))
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield state
    http.shutdown()
    thread.join()
    http.server_close()
