"""What /metrics shows: Prometheus counters of one replica, with vLLM's names where the meaning is the same."""

import time

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
TOKEN_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5)
TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16384)


class Metrics:
    """The counters; every sample has the labels `model_name`, `model_version` and `replica`."""

    def __init__(self, *, model: str, version: int, replica: str) -> None:
        self._registry = CollectorRegistry()
        self._labels = {"model_name": model, "model_version": str(version), "replica": replica}
        self.first_token = self._histogram("vllm:time_to_first_token_seconds", "From request to first token", SECONDS)
        self.between_tokens = self._histogram("vllm:inter_token_latency_seconds", "Between tokens", TOKEN_SECONDS)
        self.whole = self._histogram("vllm:e2e_request_latency_seconds", "From request to end of answer", SECONDS)
        self.request_prompt_tokens = self._histogram("vllm:request_prompt_tokens", "Tokens of a prompt", TOKENS)
        self.prompt_tokens = self._counter("vllm:prompt_tokens", "Tokens of all prompts")
        self.generation_tokens = self._counter("vllm:generation_tokens", "Tokens of all answers")
        self.decode = self._histogram("vila:image_decode_seconds", "Waiting for an image and decoding it", SECONDS)
        self.answers = self._gauge("vila:answers_under_way", "Answers that were admitted and have not ended")
        self.uploads = self._gauge("vila:uploads_under_way", "Bodies that are being received")
        self._success = self._labelled("vllm:request_success", "Answers that ended", "finished_reason")
        self._responses = self._labelled("vila:responses", "Responses by status; 499: the client left", "status")

    def finished(self, reason: str) -> None:
        """Count an answer that ended."""
        self._success.labels(**self._labels, finished_reason=reason).inc()

    def responded(self, status: int) -> None:
        """Count a response."""
        self._responses.labels(**self._labels, status=str(status)).inc()

    def text(self) -> bytes:
        """Prometheus's text format."""
        return generate_latest(self._registry)

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(name, text, [*self._labels], registry=self._registry).labels(**self._labels)

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(name, text, [*self._labels], registry=self._registry).labels(**self._labels)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        made = Histogram(name, text, [*self._labels], buckets=buckets, registry=self._registry)
        return made.labels(**self._labels)

    def _labelled(self, name: str, text: str, label: str) -> Counter:
        return Counter(name, text, [*self._labels, label], registry=self._registry)


class TokenClock:
    """Times of one request's tokens."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics, self._started = metrics, time.monotonic()
        self._last: dict[int, float] = {}

    def token(self, choice: int) -> None:
        """A choice got tokens."""
        now = time.monotonic()
        if choice in self._last:
            self._metrics.between_tokens.observe(now - self._last[choice])
        elif not self._last:
            self._metrics.first_token.observe(now - self._started)
        self._last[choice] = now

    def ended(self) -> None:
        """The whole answer is there."""
        self._metrics.whole.observe(time.monotonic() - self._started)
