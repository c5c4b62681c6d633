"""Spans of OpenTelemetry: flow runs, tasks, training steps, requests. They go where OTEL_EXPORTER_OTLP_ENDPOINT says.

Without that variable nothing is imported and nothing is measured. OpenTelemetry's other variables hold too, such as
OTEL_TRACES_SAMPLER. Spans are sent by a thread; nothing waits for it but the end of a process.
"""

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING

from vila_ops import __version__, logs

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import TracerProvider

ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
"""Variables of which one has to name the collector."""
PASSED_ON = "OTEL_"
"""Prefix of the variables that processes elsewhere get."""
LOGIN = "HEADERS"
"""In the names of those that may hold a login."""
FLUSH_SECONDS = 10.0
"""How long `flush` waits for the collector."""
Attributes = Mapping[str, str | int | float]
Note = Callable[[Attributes], None]
"""Adds attributes to a span."""


def enabled() -> bool:
    """Whether spans are sent."""
    return any(os.environ.get(name) for name in ENDPOINTS) and os.environ.get("OTEL_SDK_DISABLED", "") != "true"


@contextmanager
def span(
    name: str, attributes: Attributes | None = None, *, parent: str | None = None, server: bool = False
) -> Iterator[Note]:
    """A span around the body, below that of the body around it, or below `parent`, a `traceparent` of another process.

    `server`: the body answers a request. Of its error the span has the class alone, since the text may quote data.
    """
    if not enabled():
        yield lambda _: None
        return
    from opentelemetry.trace import SpanKind, StatusCode

    kind = SpanKind.SERVER if server else SpanKind.INTERNAL
    tracer = _provider().get_tracer("vila_ops", __version__)
    with tracer.start_as_current_span(
        name, _context(parent), kind=kind, attributes=attributes, record_exception=False, set_status_on_exception=False
    ) as current:
        try:
            yield lambda more: current.set_attributes(dict(more))
        except Exception as error:
            current.set_status(StatusCode.ERROR, type(error).__name__)
            raise


@contextmanager
def work(task: str, name: str, *, parent: str | None = None, **ids: str | int | None) -> Iterator[None]:
    """Work on a task, or a part of one: log lines of this process have these ids, and a span has them as attributes."""
    known = {f"vila.{key}": value for key, value in {"task": task, **ids}.items() if value is not None}
    with logs.working_on(task=task, **ids), span(f"{task} {name}".strip(), known, parent=parent):
        yield


def past(name: str, seconds: float, attributes: Attributes) -> None:
    """A span of the last seconds, below the current one."""
    if enabled():
        now = time.time_ns()
        tracer = _provider().get_tracer("vila_ops", __version__)
        tracer.start_span(name, attributes=attributes, start_time=now - int(seconds * 1e9)).end(now)


def carried() -> str | None:
    """The current span as a `traceparent`, for a process that works for it; None without one."""
    if not enabled():
        return None
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    carrier: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(carrier)
    return carrier.get("traceparent")


def environment() -> dict[str, str]:
    """The variables by which a process elsewhere sends spans as this one does, without logins: Ray shows variables."""
    if not enabled():
        return {}
    return {key: value for key, value in os.environ.items() if key.startswith(PASSED_ON) and LOGIN not in key}


def flush() -> None:
    """Send what has ended; a worker may be killed without a word."""
    if enabled():
        sender = threading.Thread(target=_provider().force_flush, daemon=True)  # which knows no limit of time
        sender.start()
        sender.join(FLUSH_SECONDS)


def _context(parent: str | None) -> "Context | None":
    if parent is None:
        return None
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    return TraceContextTextMapPropagator().extract({"traceparent": parent})


@lru_cache(maxsize=1)
def _provider() -> "TracerProvider":
    """Of this process; not the global one, to which other packages would send their spans."""
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    service = os.environ.get("OTEL_SERVICE_NAME", "vila-ops")
    about: Attributes = {"service.name": service, "host.name": socket.gethostname(), "process.pid": os.getpid()}
    provider = TracerProvider(resource=Resource.create(about))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider
