"""What Prometheus gets from a store: values by hand, and every metric on the page."""

import re
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families
from typer.testing import CliRunner

from tests.monitoring.watched_store import LABELS, filled
from vila_ops.artifacts.attempts import attempt
from vila_ops.artifacts.kinds import Decision
from vila_ops.artifacts.store import address, manifest_of, seal
from vila_ops.cli import app
from vila_ops.config.resources import StorageResources
from vila_ops.errors import CorruptArtifact
from vila_ops.monitoring import exporter
from vila_ops.monitoring.exporter import METRICS, Snapshot, registry_of, server_of
from vila_ops.registry import alias_register
from vila_ops.retrain import decisions

PAGE = Path(__file__).parents[2] / "docs/monitoring.md"
Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[str]:
    place = str(tmp_path / "store")
    with filled(place):
        yield place


def read(text: str) -> Samples:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def samples_of(store: str) -> Samples:
    return read(generate_latest(registry_of(StorageResources(store=store))).decode())


def only(samples: Samples, name: str, /, **labels: str) -> float:
    return samples[name, frozenset(labels.items())]


def test_a_running_stage_has_its_progress_and_its_newest_metrics(store: str) -> None:
    samples = samples_of(store)
    expected: dict[str, tuple[dict[str, str], float]] = {
        "vila_task_state": ({"state": "running"}, 1),
        "vila_task_done": ({"unit": "steps"}, 12),
        "vila_task_total": ({"unit": "steps"}, 48),
        "vila_task_began_timestamp_seconds": ({}, 1000),
        "vila_task_advanced_timestamp_seconds": ({}, 2000),
        "vila_task_workers": ({}, 2),
        "vila_train_loss": ({}, 2.5),
        "vila_train_source_loss": ({"source": "pairs"}, 2.25),
        "vila_train_validation_loss": ({}, 2.75),
        "vila_train_source_validation_loss": ({"source": "pairs"}, 2.625),
        "vila_train_grad_norm": ({}, 0.5),
        "vila_train_learning_rate": ({"part": "projector"}, 0.001),
        "vila_train_step_seconds": ({}, 2),
        "vila_train_tokens_per_second": ({}, 1000),
        "vila_train_target_tokens_per_second": ({}, 400),
        "vila_train_padding_ratio": ({}, 0.125),
        "vila_train_mfu_ratio": ({}, 0.375),
        "vila_train_data_wait_ratio": ({}, 0.0625),
        "vila_train_checkpoint_stall_seconds": ({}, 0.25),
        "vila_train_checkpoint_timestamp_seconds": ({}, 1900),
        "vila_train_peak_memory_bytes": ({}, 1.5 * 2**30),
    }
    for name, (labels, value) in expected.items():
        assert only(samples, name, **LABELS, **labels) == value, name
    assert only(samples, "vila_task_cost", **LABELS) > 8.0 * 1000 / 3600, "until now"
    of_it = {name for name, labels in samples if LABELS.items() <= dict(labels).items()}
    assert of_it == {*expected, "vila_task_cost"}


def test_a_stage_that_ended_keeps_its_state_and_not_its_loss(store: str) -> None:
    ended = {**LABELS, "name": "earlier", "address": "1" * 12}
    samples = samples_of(store)
    assert only(samples, "vila_task_state", **ended, state="done") == 1
    assert only(samples, "vila_task_cost", **ended) == pytest.approx(8.0 * (time.time() - 1000) / 3600), "to its end"
    assert not [name for name, labels in samples if ended.items() <= dict(labels).items() and "train" in name]


def test_models_and_decisions(store: str) -> None:
    samples = samples_of(store)
    assert only(samples, "vila_model_version", model="vila", alias="champion") == 3
    assert only(samples, "vila_model_moves_total", model="vila") == 1
    moved = datetime.fromisoformat(alias_register.read("vila", store=store).history[0].when).timestamp()
    assert only(samples, "vila_model_moved_timestamp_seconds", model="vila") == moved
    for day, verdict in ((5, "not now"), (12, "retrain")):
        labels = {"recipe": "demo", "subject": "retrain", "verdict": verdict}
        assert only(samples, "vila_retrain_decisions_total", **labels) == 1
        when = datetime(2026, 1, day, tzinfo=UTC).timestamp()
        assert only(samples, "vila_retrain_decision_timestamp_seconds", **labels) == when
    assert only(samples, "vila_retrain_new_samples", recipe="demo") == 0
    assert only(samples, "vila_retrain_drift_effect", recipe="demo", stream="images") == 0.25
    assert only(samples, "vila_retrain_drifted", recipe="demo", stream="images") == 1


def test_services_have_their_versions_and_the_last_canary_that_was_taken_back(store: str) -> None:
    samples = samples_of(store)
    for service, stable in (("vila", 3), ("other@head-6379", 3)):
        assert only(samples, "vila_service_version", service=service, role="stable") == stable
    assert only(samples, "vila_service_version", service="vila", role="canary") == 4
    assert only(samples, "vila_service_canary_ratio", service="vila") == 0.25
    taken_back = datetime(2026, 1, 12, tzinfo=UTC).timestamp()
    assert only(samples, "vila_service_rolled_back_timestamp_seconds", service="other@head-6379") == taken_back
    assert len([name for name, _ in samples if name.startswith("vila_service_")]) == 5


def test_what_cannot_be_read_is_said_and_hides_nothing_else(store: str) -> None:
    for version in (Path(store) / "registry/vila").iterdir():
        version.write_text("{")
    samples = samples_of(store)
    parts = {dict(labels)["part"]: value for (name, labels), value in samples.items() if name.endswith("readable")}
    assert parts == {"tasks": 1, "models": 0, "services": 1, "decisions": 1}
    assert only(samples, "vila_train_loss", **LABELS) == 2.5


def test_a_decision_of_another_version_hides_all_decisions_and_nothing_else(store: str) -> None:
    at = address(Decision, revision=9, recipe={"name": "demo", "later": True}, parents=())
    with attempt(at, store=store) as folder:
        (folder / "decision.md").write_text("later")
    facts = {"name": "demo", "subject": "retrain", "verdict": "retrain", "rule": "r"}
    sealed = seal(Decision, at, folder, facts=facts, execution={})
    with pytest.raises(CorruptArtifact, match=f"decision/{at.key} is not a decision that vila-ops .* reads"):
        decisions.record_of(manifest_of(sealed))
    samples = samples_of(store)
    assert only(samples, "vila_exporter_readable", part="decisions") == 0
    assert only(samples, "vila_exporter_readable", part="models") == 1
    assert not [name for name, _ in samples if name.startswith("vila_retrain_")]
    assert only(samples, "vila_train_loss", **LABELS) == 2.5


def test_the_page_has_every_metric_with_its_labels() -> None:
    rows = re.findall(r"^\| `(vila_\w+)` \| ([^|]*) \|", PAGE.read_text(), re.MULTILINE)
    shown = {name: tuple(re.findall(r"`(\w+)`", labels)) for name, labels in rows}
    own = {name: tuple(one for one in labels if one not in exporter.TASK) for name, (labels, _) in METRICS.items()}
    assert shown == own


@pytest.fixture
def scrape(store: str) -> Iterator[Any]:
    """Asks a server with a token; `look` reads the store."""
    snapshot = Snapshot(registry_of(StorageResources(store=store)))
    with server_of(snapshot, "127.0.0.1", 0, token="secret") as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        url = f"http://127.0.0.1:{server.server_port}"
        ask = lambda path, **headers: httpx.get(f"{url}{path}", headers=headers, trust_env=False)  # noqa: E731
        yield SimpleNamespace(ask=ask, look=snapshot.read)
        server.shutdown()
        thread.join()


def test_a_scrape_brings_the_token_and_gets_the_last_look(scrape: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert scrape.ask("/metrics", Authorization="Bearer secret").status_code == 503, "nothing is read yet"
    scrape.look()
    assert scrape.ask("/metrics").status_code == 401
    assert scrape.ask("/metrics", Authorization="Bearer other").status_code == 401
    assert scrape.ask("/", Authorization="Bearer secret").status_code == 404
    monkeypatch.setattr(exporter, "generate_latest", None)
    answer = scrape.ask("/metrics", Authorization="Bearer secret")
    assert answer.status_code == 200
    assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
    assert only(read(answer.text), "vila_train_loss", **LABELS) == 2.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--listen", "0.0.0.0:9464"], "0.0.0.0 is reached from other machines; set VILA_METRICS_TOKEN"),
        (["--listen", "9464"], "--listen '9464' is not HOST:PORT, such as 127.0.0.1:9464"),
        (["--listen", "127.0.0.1:9464", "--out", "a.prom"], "give one of them"),
    ],
)
def test_a_wrong_option_is_told_before_anything_is_read(
    options: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(exporter.TOKEN, raising=False)
    told = CliRunner().invoke(app, ["metrics", *options])
    assert isinstance(told.exception, ValueError)
    assert message in str(told.exception)


def test_the_command_prints_them_or_writes_a_file(store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    resources, out = tmp_path / "resources.yaml", tmp_path / "vila.prom"
    resources.write_text(f"launch: inline\nstorage: {{store: {store}}}\n")
    told = CliRunner().invoke(app, ["metrics", "-r", str(resources)], catch_exceptions=False)
    assert only(read(told.stdout), "vila_train_loss", **LABELS) == 2.5

    def interrupt(seconds: float) -> None:
        assert seconds == 15
        raise KeyboardInterrupt

    monkeypatch.setattr(time, "sleep", interrupt)
    told = CliRunner().invoke(app, ["metrics", "-r", str(resources), "--out", str(out)])
    assert told.exit_code == 130
    assert only(read(out.read_text()), "vila_train_loss", **LABELS) == 2.5


def test_a_file_that_cannot_be_written_once_is_written_later(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resources, out = tmp_path / "resources.yaml", tmp_path / "out/vila.prom"
    resources.write_text(f"launch: inline\nstorage: {{store: {store}}}\n")
    command = ["metrics", "-r", str(resources), "--out", str(out)]
    with pytest.raises(ValueError, match=r"vila\.prom: no folder .*/out; create it"):
        CliRunner().invoke(app, command, catch_exceptions=False)
    out.parent.mkdir()
    out.write_text("mine")
    with pytest.raises(ValueError, match=r"vila\.prom exists and vila-ops did not write it"):
        CliRunner().invoke(app, command, catch_exceptions=False)
    out.unlink()

    def pauses() -> Iterator[None]:
        out.unlink()
        out.mkdir()
        yield
        out.rmdir()
        yield
        raise KeyboardInterrupt

    steps = pauses()
    monkeypatch.setattr(time, "sleep", lambda _: next(steps))
    assert CliRunner().invoke(app, command).exit_code == 130
    assert only(read(out.read_text()), "vila_train_loss", **LABELS) == 2.5


def test_the_command_looks_at_the_store_while_it_serves(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resources, looks = tmp_path / "resources.yaml", list[bytes]()
    resources.write_text(f"launch: inline\nstorage: {{store: {store}}}\n")

    def look(registry: Any) -> bytes:
        looks.append(generate_latest(registry))
        if len(looks) == 2:
            raise KeyboardInterrupt
        return looks[-1]

    monkeypatch.setattr(exporter, "generate_latest", look)
    monkeypatch.setattr(time, "sleep", lambda _: None)
    told = CliRunner().invoke(app, ["metrics", "-r", str(resources), "--listen", "127.0.0.1:0"])
    assert told.exit_code == 130
    assert re.search(r"http://127\.0\.0\.1:\d+/metrics", told.stderr)
    assert only(read(looks[1].decode()), "vila_train_loss", **LABELS) == 2.5
