"""How the demo talks to a Prefect server that is busy."""

import socket
import threading

import httpx
import pytest

from vila_ops import demo

ANSWER = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 7\r\nConnection: close\r\n\r\n[1,2,3]"


@pytest.fixture
def late_server() -> httpx.URL:
    """The address of a server that leaves its first request unanswered."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        with listener:
            silent, _ = listener.accept()
            answered, _ = listener.accept()
            with silent, answered:
                answered.recv(65536)
                answered.sendall(ANSWER)

    threading.Thread(target=serve, daemon=True).start()
    host, port = listener.getsockname()
    return httpx.URL(f"http://{host}:{port}")


def test_a_question_that_is_answered_too_late_is_asked_again(late_server: httpx.URL) -> None:
    with httpx.Client(base_url=late_server, timeout=httpx.Timeout(60, read=0.5), trust_env=False) as api:
        assert demo._request(api, "GET", "/flow_runs/1") == [1, 2, 3]


def test_a_request_that_creates_something_is_not_repeated(late_server: httpx.URL) -> None:
    with httpx.Client(base_url=late_server, timeout=httpx.Timeout(60, read=0.5), trust_env=False) as api:
        with pytest.raises(httpx.ReadTimeout):
            demo._request(api, "POST", "/flow_runs/")
        assert demo._request(api, "GET", "/flow_runs/1") == [1, 2, 3]
