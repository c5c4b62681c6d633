"""How the demo talks to a Prefect server that is busy, and what it prints at its end."""

import json
import socket
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest

from vila_ops import demo
from vila_ops.config import load
from vila_ops.local import Endpoints

ROOT = Path(__file__).parents[1]
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


def said_at_the_end(folder: Path, answer: dict[str, Any] | None) -> list[str]:
    """What a demo prints after a run that left this answer in the summary of the recipe."""
    resources = ROOT / "configs/resources/inline.yaml"
    run = load(
        ROOT / "configs/recipes/tiny.yaml", resources=resources, overrides=(f"resources.storage.store={folder}",)
    )
    (folder / "tiny").mkdir()
    (folder / "tiny/summary.json").write_text(
        json.dumps(
            {"recipe": "tiny", "answer": answer, "mlflow": {"runs": "http://m:5000/#/experiments/1/runs"}}, indent=1
        )
    )
    endpoints = Endpoints(mlflow="http://m:5000", prefect="http://p:4200", ray="", ray_dashboard="", serve="")
    lines: list[str] = []
    demo._say_results(run, endpoints, lines.append, seconds=90)
    assert json.loads((folder / "tiny/summary.json").read_text())["seconds_with_servers"] == 90
    return lines


def test_the_demo_ends_with_a_streamed_answer_and_the_address_of_the_chat_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("VILA_API_KEY", raising=False)
    answer = {"question": "What?", "truth": "a bus", "reply": "a tram", "tokens": 3, "url": "http://h:8000"}
    assert said_at_the_end(tmp_path, answer) == [
        "\ndone in 1.5 minutes",
        "asked 'What?' about a held-out image of 'a bus'; answer: 'a tram', streamed in 3 tokens",
        f"  report    {tmp_path}/tiny/report.html",
        f"  summary   {tmp_path}/tiny/summary.json",
        "  MLflow    http://m:5000/#/experiments/1/runs",
        "  Prefect   http://p:4200",
        "  chat      http://h:8000/",
        "  endpoint  http://h:8000/v1/chat/completions",
        "  try       curl -sN http://h:8000/v1/chat/completions -H 'Content-Type: application/json' "
        f"-d @{tmp_path}/tiny/ask.json",
        "the servers stay up; `vila-ops down` ends them",
    ]


def test_a_demo_without_a_model_to_serve_says_so(tmp_path: Path) -> None:
    assert said_at_the_end(tmp_path, None)[1:] == [
        "the gate refused the model and there is no champion to serve; see http://m:5000"
    ]
