"""Spans, as a collector receives them."""

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from vila_ops import logs, tracing
from vila_ops.config.resources import ServeResources
from vila_ops.serve.app.guard import Guard
from vila_ops.serve.app.metrics import Metrics

ROOT = Path(__file__).parents[1]
Spans = Callable[[], dict[str, Any]]
PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
"""A traceparent of W3C's specification."""


@contextmanager
def collecting(receive: Callable[[str, bytes], None], monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A collector, to which spans are sent, that answers when `receive` has returned from a path and a body."""

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            receive(self.path, self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Collector)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    tracing._provider.cache_clear()
    try:
        yield
    finally:
        tracing._provider().shutdown()
        tracing._provider.cache_clear()
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> Iterator[Spans]:
    """What a collector has received, by name; of spans of one name the last."""
    received: list[Any] = []

    def receive(path: str, body: bytes) -> None:
        if path == "/v1/traces":
            received.append(ExportTraceServiceRequest.FromString(body))

    def by_name() -> dict[str, Any]:
        tracing.flush()
        return {
            span.name: span for one in received for of in one.resource_spans for scope in of.scope_spans
            for span in scope.spans
        }  # fmt: skip

    with collecting(receive, monkeypatch):
        yield by_name


def attributes(span: Any) -> dict[str, Any]:
    return {one.key: getattr(one.value, one.value.WhichOneof("value")) for one in span.attributes}


def test_spans_lie_in_each_other_also_across_processes(spans: Spans) -> None:
    with tracing.work("flow", "vila demo", flow_run="f-1"):
        with tracing.work("train_stage", "align", stage="align", mlflow_run=None):
            handed_on = tracing.carried()
            tracing.past("training step", 0.5, {"vila.step": 3})
        assert tracing.carried() != handed_on
    assert tracing.carried() is None
    with tracing.work("train_stage", "align, rank 1", parent=handed_on, rank=1):
        pass
    with pytest.raises(ValueError, match="what a user said"), tracing.span("failing"):
        raise ValueError("what a user said")
    seen = spans()
    flow, stage, step, rank = (
        seen[name] for name in ("flow vila demo", "train_stage align", "training step", "train_stage align, rank 1")
    )
    assert (flow.parent_span_id, stage.parent_span_id) == (b"", flow.span_id)
    assert step.parent_span_id == rank.parent_span_id == stage.span_id
    assert {one.trace_id for one in (flow, stage, step, rank)} == {flow.trace_id}
    assert attributes(stage) == {"vila.task": "train_stage", "vila.stage": "align"}
    assert attributes(step) == {"vila.step": 3}
    assert step.end_time_unix_nano - step.start_time_unix_nano == 500_000_000
    assert (seen["failing"].status.code, seen["failing"].status.message) == (2, "ValueError")
    assert "what a user said" not in str(seen["failing"]), "errors quote data"


def test_a_request_belongs_to_the_trace_of_its_client_and_says_its_tokens(spans: Spans) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        facts = {"completion": "chatcmpl-1", "prompt_tokens": 7, "completion_tokens": 3, "images": 1}
        scope["state"]["caller"].facts |= facts
        assert logs.REQUEST.get() == "r-1"
        await Response("{}", media_type="application/json")(scope, receive, send)

    metrics = Metrics(model="vila", version=1, replica="r")
    guard = Guard(app, capacity=ServeResources(), audit=None, metrics=metrics)

    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(guard)  # type: ignore[arg-type]
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000") as client:
            headers = {"traceparent": PARENT, "x-request-id": "r-1", "Content-Type": "application/json"}
            return await client.post("/v1/chat/completions", content="{}", headers=headers)

    assert anyio.run(ask).status_code == 200
    (span,) = spans().values()
    assert span.name == "POST /v1/chat/completions"
    assert (span.trace_id.hex(), span.parent_span_id.hex()) == (PARENT[3:35], PARENT[36:52])
    assert attributes(span) == {
        "gen_ai.operation.name": "chat", "gen_ai.response.id": "chatcmpl-1", "gen_ai.usage.input_tokens": 7,
        "gen_ai.usage.output_tokens": 3, "http.response.status_code": 200, "vila.request": "r-1",
    }  # fmt: skip


def test_nobody_waits_for_a_collector_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its exporter would wait for 600 seconds."""
    asked, answer = threading.Event(), threading.Event()

    def receive(*_: object) -> None:
        asked.set()
        answer.wait()

    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "600")
    monkeypatch.setattr(tracing, "FLUSH_SECONDS", 0.05)
    with collecting(receive, monkeypatch):
        with tracing.span("one"):
            pass
        tracing.flush()
        assert not answer.is_set()
        answer.set()
        asked.wait()


def test_a_login_is_not_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://collector:4318")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "authorization=secret")
    monkeypatch.setenv("OTEL_SERVICE_NAME", "mine")
    passed_on = tracing.environment()
    assert passed_on.items() >= {
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://collector:4318"),
        ("OTEL_SERVICE_NAME", "mine"),
    }
    assert "secret" not in str(passed_on)


def test_without_a_collector_nothing_is_imported() -> None:
    code = (
        "import sys; from vila_ops import tracing\n"
        "with tracing.work('flow', 'vila', flow_run='f'): tracing.past('training step', 1.0, {}); tracing.flush()\n"
        "assert tracing.carried() is None and tracing.environment() == {}\n"
        "assert not [name for name in sys.modules if name.startswith('opentelemetry')]"
    )
    env = {"PYTHONPATH": str(ROOT), "OTEL_SERVICE_NAME": "vila"}
    subprocess.run([sys.executable, "-c", code], check=True, env=env)
