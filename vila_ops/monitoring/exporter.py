"""What the store says about tasks, models and retraining, as metrics of Prometheus.

One process exports for a whole cluster, since every task says in the store how far it is. So no task opens a port.
"""

import hmac
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from typing import TYPE_CHECKING
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, ThreadingWSGIServer
from prometheus_client.registry import Collector

from vila_ops.artifacts.kinds import Decision
from vila_ops.artifacts.listing import folders
from vila_ops.artifacts.store import find_manifest
from vila_ops.config.resources import StorageResources
from vila_ops.errors import VilaError
from vila_ops.monitoring.tasks import WatchedTask, watched
from vila_ops.registry import alias_register
from vila_ops.retrain.decisions import DecisionRecord, record_of
from vila_ops.serve.router.state import registers

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

TASK = ("task", "name", "address", "host")
METRICS: dict[str, tuple[tuple[str, ...], str]] = {
    "vila_task_state": ((*TASK, "state"), "1 for the state that a task is in, for a day after it ended"),
    "vila_task_began_timestamp_seconds": (TASK, "Start of the attempt"),
    "vila_task_advanced_timestamp_seconds": (TASK, "Last progress of the attempt, or its end"),
    "vila_task_done": ((*TASK, "unit"), "Steps, shards or requests that are done"),
    "vila_task_total": ((*TASK, "unit"), "Steps, shards or requests of the whole task"),
    "vila_task_workers": (TASK, "Workers of the task"),
    "vila_task_cost": (TASK, "Price of the task's accelerators since the attempt began"),
    "vila_train_loss": (TASK, "Nats per target token of the last step"),
    "vila_train_source_loss": ((*TASK, "source"), "Nats per target token of the last step, of one source"),
    "vila_train_validation_loss": (TASK, "Nats per target token of the last validation"),
    "vila_train_source_validation_loss": ((*TASK, "source"), "The same of one source"),
    "vila_train_grad_norm": (TASK, "Gradient norm before clipping"),
    "vila_train_learning_rate": ((*TASK, "part"), "Learning rate of a part of the model that trains"),
    "vila_train_step_seconds": (TASK, "Time of the last step, with waits and saves"),
    "vila_train_tokens_per_second": (TASK, "Tokens of all ranks, without padding"),
    "vila_train_target_tokens_per_second": (TASK, "Target tokens of all ranks"),
    "vila_train_padding_ratio": (TASK, "Share of the computed positions that is padding"),
    "vila_train_mfu_ratio": (TASK, "Model FLOPs per second / peak of all accelerators"),
    "vila_train_data_wait_ratio": (TASK, "Share of the step that the loop waited for batches"),
    "vila_train_checkpoint_stall_seconds": (TASK, "Time of the step that the loop waited for checkpoints"),
    "vila_train_checkpoint_timestamp_seconds": (TASK, "Last resume checkpoint of this attempt"),
    "vila_train_peak_gpu_memory_bytes": (TASK, "Peak of the allocator on rank 0"),
    "vila_train_peak_memory_bytes": (TASK, "Peak of resident memory on rank 0, without a GPU"),
    "vila_model_version": (("model", "alias"), "Version that an alias of a registered model points to"),
    "vila_model_moved_timestamp_seconds": (("model",), "Last move of a model's aliases"),
    "vila_model_moves_total": (("model",), "Moves of a model's aliases so far"),
    "vila_service_version": (("service", "role"), "Version that a service has as its stable one, or as a canary"),
    "vila_service_canary_ratio": (("service",), "Share of the conversations that a canary answers"),
    "vila_service_rolled_back_timestamp_seconds": (("service",), "When a canary was last taken back"),
    "vila_retrain_decisions_total": (("recipe", "subject", "verdict"), "Sealed decisions"),
    "vila_retrain_decision_timestamp_seconds": (("recipe", "subject", "verdict"), "Last decision with this verdict"),
    "vila_retrain_new_samples": (("recipe",), "Usable new training samples at the last look"),
    "vila_retrain_drift_effect": (("recipe", "stream"), "Effect of the drift of a stream at the last look, 0 to 1"),
    "vila_retrain_drifted": (("recipe", "stream"), "Whether the stream had drifted"),
    "vila_exporter_readable": (
        ("part",),
        "Whether a part of the store could be read: tasks, models, services, decisions",
    ),
    "vila_exporter_read_timestamp_seconds": ((), "When the store was read"),
}
"""Labels and meaning of every metric by its name."""
TRAINING = {
    "loss": ("vila_train_loss", 1),
    "validation_loss": ("vila_train_validation_loss", 1),
    "grad_norm": ("vila_train_grad_norm", 1),
    "seconds_per_step": ("vila_train_step_seconds", 1),
    "train/tokens_per_s": ("vila_train_tokens_per_second", 1),
    "train/target_tokens_per_s": ("vila_train_target_tokens_per_second", 1),
    "train/padding_fraction": ("vila_train_padding_ratio", 1),
    "train/mfu": ("vila_train_mfu_ratio", 1),
    "data/wait_fraction": ("vila_train_data_wait_ratio", 1),
    "ckpt/stall_s": ("vila_train_checkpoint_stall_seconds", 1),
    "ckpt/saved_at": ("vila_train_checkpoint_timestamp_seconds", 1),
    "memory/peak_gpu_gib": ("vila_train_peak_gpu_memory_bytes", 2**30),
    "memory/peak_rss_gib": ("vila_train_peak_memory_bytes", 2**30),
}
"""Metrics of a running stage by their names in MLflow, and what a value is multiplied by."""
BY_PART = {
    "loss": "vila_train_source_loss",
    "validation_loss": "vila_train_source_validation_loss",
    "learning_rate": "vila_train_learning_rate",
}
"""Those of a source or a part of the model, by what stands before its name."""
Sample = tuple[str, tuple[str, ...], float]
"""Name, values of the labels, value."""
TOKEN = "VILA_METRICS_TOKEN"
"""Environment variable with the token that a scrape has to bring."""
log = logging.getLogger(__name__)


class StoreCollector(Collector):
    """Reads a store when it is collected. A part of it that cannot be read is left out, and the metrics say so."""

    def __init__(self, storage: StorageResources) -> None:
        self._storage, self._store = storage, storage.store
        self._known: dict[str, DecisionRecord] = {}
        """Decisions by their folders; they never change."""

    def collect(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
        """All metrics."""
        samples: list[Sample] = []
        parts: dict[str, Callable[[], Iterable[Sample]]] = {
            "tasks": lambda: _of_tasks(watched(self._store)),
            "models": lambda: _of_models(self._store),
            "services": lambda: _of_services(self._storage),
            "decisions": lambda: _of_decisions(self._decisions()),
        }
        for part, read in parts.items():
            try:
                samples += list(read())  # all of it or nothing
                readable = 1.0
            except (VilaError, OSError) as error:
                log.warning("the %s of %s cannot be read: %s", part, self._store, error)
                readable = 0.0
            samples.append(("vila_exporter_readable", (part,), readable))
        samples.append(("vila_exporter_read_timestamp_seconds", (), time.time()))
        families: dict[str, GaugeMetricFamily | CounterMetricFamily] = {}
        for name, labels, value in samples:
            if name not in families:
                families[name] = _family(name)
            families[name].add_metric(labels, value)
        yield from families.values()

    def _decisions(self) -> list[DecisionRecord]:
        """Every decision, by time."""
        for place in folders(Decision, store=self._store):
            if place not in self._known and (manifest := find_manifest(place)) is not None:
                self._known[place] = record_of(manifest)
        return sorted(self._known.values(), key=lambda one: one.when)


def registry_of(storage: StorageResources) -> CollectorRegistry:
    """The metrics of a store, and of the inline services of this machine."""
    registry = CollectorRegistry()
    registry.register(StoreCollector(storage))
    return registry


class Snapshot:
    """The metrics of a registry as they were last read: no scrape waits for a store."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry
        self.text: bytes | None = None
        """None before they were read."""

    def read(self) -> None:
        """Read them again."""
        self.text = generate_latest(self._registry)


def server_of(snapshot: Snapshot, host: str, port: int, *, token: str | None) -> WSGIServer:
    """A server that shows the metrics at /metrics, with a token to those who bring it as `Authorization: Bearer`."""
    app = _app(snapshot, token)
    return make_server(host, port, app, server_class=ThreadingWSGIServer, handler_class=_Quiet)


class _Quiet(WSGIRequestHandler):
    def log_message(self, *_: object) -> None:
        """A scrape is not worth a line."""


def _app(snapshot: Snapshot, token: str | None) -> "WSGIApplication":
    def answer(environ: "WSGIEnvironment", start_response: "StartResponse") -> list[bytes]:
        status, text = "200 OK", snapshot.text
        if token is not None and not hmac.compare_digest(
            environ.get("HTTP_AUTHORIZATION", "").encode(), f"Bearer {token}".encode()
        ):
            status, text = "401 Unauthorized", b"send the token as Authorization: Bearer TOKEN\n"
        elif environ["PATH_INFO"] != "/metrics":
            status, text = "404 Not Found", b"only /metrics is here\n"
        elif text is None:
            status, text = "503 Service Unavailable", b"the store is read for the first time; ask again\n"
        start_response(status, [("Content-Type", CONTENT_TYPE_PLAIN_0_0_4)])
        return [text]

    return answer


def _family(name: str) -> GaugeMetricFamily | CounterMetricFamily:
    labels, text = METRICS[name]
    kind = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
    return kind(name, text, labels=labels)


def _of_tasks(tasks: Iterable[WatchedTask]) -> Iterator[Sample]:
    for one in tasks:
        labels = (one.task, one.name, one.address[:12], one.host)
        yield "vila_task_state", (*labels, one.state), 1
        yield "vila_task_began_timestamp_seconds", labels, one.began
        yield "vila_task_advanced_timestamp_seconds", labels, one.advanced
        yield "vila_task_workers", labels, one.workers
        if one.total is not None:
            yield "vila_task_done", (*labels, one.unit), one.done
            yield "vila_task_total", (*labels, one.unit), one.total
        if one.cost is not None:
            yield "vila_task_cost", labels, one.cost
        if one.state == "running":
            yield from _of_training(labels, one)


def _of_training(labels: tuple[str, ...], one: WatchedTask) -> Iterator[Sample]:
    for name, value in one.metrics.items():
        kind, _, part = name.partition("/")
        if name in TRAINING:
            metric, factor = TRAINING[name]
            yield metric, labels, value * factor
        elif part and kind in BY_PART:
            yield BY_PART[kind], (*labels, part), value


def _of_models(store: str) -> Iterator[Sample]:
    for name in alias_register.names(store=store):
        record = alias_register.read(name, store=store)
        for alias, version in record.aliases().items():
            yield "vila_model_version", (name, alias), version
        if record.history:
            yield "vila_model_moved_timestamp_seconds", (name,), record.history[-1].time().timestamp()
            yield "vila_model_moves_total", (name,), len(record.history)


def _of_services(storage: StorageResources) -> Iterator[Sample]:
    for service, register in registers(storage).items():
        state = register.load()
        if state.stable is not None:
            yield "vila_service_version", (service, "stable"), state.stable.spec.version.version
        if state.canary is not None:
            yield "vila_service_version", (service, "canary"), state.canary.track.spec.version.version
            yield "vila_service_canary_ratio", (service,), state.canary.rules.share
        if state.rolled_back is not None:
            when = datetime.fromisoformat(state.rolled_back.at)
            yield "vila_service_rolled_back_timestamp_seconds", (service,), when.timestamp()


def _of_decisions(records: list[DecisionRecord]) -> Iterator[Sample]:
    alike = [(one.name, one.subject, one.decided.verdict) for one in records]
    for labels, number in Counter(alike).items():
        yield "vila_retrain_decisions_total", labels, number
    for labels, last in dict(zip(alike, records, strict=True)).items():
        yield "vila_retrain_decision_timestamp_seconds", labels, last.when.timestamp()
    looks = {one.name: one.evidence for one in records if one.evidence is not None}
    for recipe, evidence in looks.items():
        yield "vila_retrain_new_samples", (recipe,), evidence.new_samples()
        for drift in evidence.drift:
            yield "vila_retrain_drift_effect", (recipe, drift.stream), drift.effect
            yield "vila_retrain_drifted", (recipe, drift.stream), float(drift.drifted)
