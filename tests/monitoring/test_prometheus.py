"""The alerts and dashboards of infra/monitoring, with promtool and a real Prometheus.

`make setup` unpacks both beside Python; without them these tests are skipped.
"""

import itertools
import json
import math
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from tests.monitoring.watched_store import filled
from vila_ops.config.resources import StorageResources
from vila_ops.monitoring.exporter import METRICS, registry_of
from vila_ops.serve.app.metrics import Metrics

INFRA = Path(__file__).parents[2] / "infra/monitoring"
PAGE = (INFRA.parents[1] / "docs/monitoring.md").read_text()
RULES = yaml.safe_load((INFRA / "rules.yaml").read_text())
ALERTS = {rule["alert"]: rule for group in RULES["groups"] for rule in group["rules"]}
DASHBOARDS = sorted((INFRA / "dashboards").glob("*.json"))
NAME = re.compile(r"\b(?:vila|vllm)[_:]\w+")
GROWS = re.compile(r"_(total|bucket|count|sum)$")
END, STEP, COUNT = 1_790_000_000, 15, 80
"""Time of the last sample, seconds between two, and their number: 20 minutes."""


def program(name: str) -> str | None:
    """A program beside this Python, or on the PATH."""
    beside = Path(sys.executable).with_name(name)
    return str(beside) if beside.exists() else shutil.which(name)


with_prometheus = pytest.mark.skipif(
    None in (program("promtool"), program("prometheus")), reason="promtool and prometheus are not here; make setup"
)


def promtool(*words: str | Path) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([str(program("promtool")), *map(str, words)], capture_output=True, text=True)


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    """Everything that an exporter and a replica show, and whether they were scraped."""
    replica = Metrics(model="vila", version=3, replica="replica-1")
    for histogram in (replica.first_token, replica.between_tokens, replica.whole, replica.decode):
        histogram.observe(0.2)
    replica.request_prompt_tokens.observe(20)
    replica.prompt_tokens.inc(20)
    replica.generation_tokens.inc(30)
    replica.finished("stop")
    replica.responded(200)
    place = str(tmp_path_factory.mktemp("watched") / "store")
    with filled(place):
        texts = [generate_latest(registry_of(StorageResources(store=place))).decode(), replica.text().decode()]
    families = itertools.chain.from_iterable(map(text_string_to_metric_families, texts))
    up = [Sample("up", {"job": job, "instance": "a"}, 1.0) for job in ("vila-ops", "vila-endpoint")]
    return [*up, *(sample for family in families for sample in family.samples)]


def test_every_alert_and_panel_asks_for_metrics_that_are_exported(shown: list[Sample]) -> None:
    exported = {*METRICS, *(sample.name for sample in shown)}
    for name, rule in ALERTS.items():
        assert {*NAME.findall(rule["expr"])} <= exported, name
    for path in DASHBOARDS:
        for expression in expressions(json.loads(path.read_text())):
            assert {*NAME.findall(expression)} <= exported, f"{path.name}: {expression}"


def test_every_alert_is_tested_and_on_the_page() -> None:
    tests = yaml.safe_load((INFRA / "rules_test.yaml").read_text())["tests"]
    fired = {case["alertname"] for test in tests for case in test["alert_rule_test"] if case["exp_alerts"]}
    assert fired == ALERTS.keys()
    on_page = dict(re.findall(r"^\| `(Vila\w+)` \| (\w+) \|", PAGE, re.MULTILINE))
    assert on_page == {name: rule["labels"]["severity"] for name, rule in ALERTS.items()}


@with_prometheus
def test_the_alerts_fire_when_they_should_and_only_then(tmp_path: Path) -> None:
    assert (told := promtool("check", "rules", INFRA / "rules.yaml")).returncode == 0, told.stderr
    assert (told := promtool("test", "rules", INFRA / "rules_test.yaml")).returncode == 0, told.stdout + told.stderr
    shutil.copytree(INFRA, tmp_path / "changed")
    rules = tmp_path / "changed/rules.yaml"
    rules.write_text(rules.read_text().replace('{state="lost"}', '{state="running"}'))
    told = promtool("test", "rules", rules.with_name("rules_test.yaml"))
    assert told.returncode != 0
    assert "VilaTaskLost" in told.stdout + told.stderr


@with_prometheus
def test_the_config_of_prometheus_is_valid() -> None:
    told = promtool("check", "config", INFRA / "prometheus.yaml")
    assert told.returncode == 0, told.stdout + told.stderr


def expressions(dashboard: dict[str, Any]) -> Iterator[str]:
    """The queries of all panels, with a dashboard's variables replaced as Grafana does for All."""
    variables = {one["name"]: one["allValue"] for one in dashboard["templating"]["list"] if one["type"] == "query"}
    for target in (target for panel in dashboard["panels"] for target in panel["targets"]):
        expression = target["expr"].replace("$__rate_interval", f"{4 * STEP}s")
        for name, value in variables.items():
            expression = expression.replace(f"${name}", value)
        assert "$" not in expression, expression
        yield expression


@pytest.fixture(scope="module")
def ask(
    shown: list[Sample], tmp_path_factory: pytest.TempPathFactory, free_ports: Callable[[int], list[int]]
) -> Iterator[Callable[[str], list[Any]]]:
    """What a Prometheus with the samples of 20 minutes answers to a query at their end. Counters grow."""
    folder = tmp_path_factory.mktemp("prometheus")
    times = range(END - STEP * (COUNT - 1), END + 1, STEP)
    lines = [line for sample in shown for line in lines_of(sample, times)]
    (folder / "samples").write_text("\n".join([*lines, "# EOF\n"]))
    (folder / "config.yaml").write_text("{}\n")
    made = promtool("tsdb", "create-blocks-from", "openmetrics", folder / "samples", folder / "data")
    assert made.returncode == 0, made.stderr
    (port,) = free_ports(1)
    url, log = f"http://127.0.0.1:{port}", folder / "log"
    command = [
        str(program("prometheus")), f"--config.file={folder}/config.yaml", f"--storage.tsdb.path={folder}/data",
        "--storage.tsdb.retention.time=100y", f"--web.listen-address=127.0.0.1:{port}",
    ]  # fmt: skip
    with httpx.Client(base_url=url, trust_env=False) as http, log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
        try:
            until_ready(http, process, log)

            def answer(query: str) -> list[Any]:
                told = http.get("/api/v1/query", params={"query": query, "time": END}).json()
                assert told["status"] == "success", f"{query}: {told}"
                result: list[Any] = told["data"]["result"]
                return result

            yield answer
        finally:
            process.terminate()
            process.wait(30)


def lines_of(sample: Sample, times: range) -> Iterator[str]:
    labels = ",".join(f"{name}={json.dumps(value)}" for name, value in sample.labels.items())
    for number, when in enumerate(times, 1):
        value = sample.value * number if GROWS.search(sample.name) else sample.value
        yield f"{sample.name}{{{labels}}} {value} {when}"


def until_ready(http: httpx.Client, process: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline = time.monotonic() + 600
    while True:
        assert process.poll() is None, log.read_text()
        try:
            if http.get("/-/ready").is_success:
                return
        except httpx.TransportError:
            pass
        assert time.monotonic() < deadline
        time.sleep(0.05)


@with_prometheus
@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_every_query_of_a_dashboard_is_answered(path: Path, ask: Callable[[str], list[Any]]) -> None:
    dashboard = json.loads(path.read_text())
    asked = list(expressions(dashboard))
    assert len(asked) >= len(dashboard["panels"]) > 5
    for expression in asked:
        values = [float(series["value"][1]) for series in ask(expression)]
        assert values, expression
        assert not any(map(math.isnan, values)), expression
    for variable in dashboard["templating"]["list"]:
        if variable["type"] == "query":
            parts = re.fullmatch(r"label_values\((.+), (\w+)\)", variable["query"])
            assert parts
            assert all(parts[2] in series["metric"] for series in ask(parts[1]))


def test_a_dashboard_has_names_of_its_own_and_is_on_the_page() -> None:
    boards = [json.loads(path.read_text()) for path in DASHBOARDS]
    assert len({board["uid"] for board in boards}) == len({board["title"] for board in boards}) == len(boards)
    for path, board in zip(DASHBOARDS, boards, strict=True):
        assert f"`{path.name}`" in PAGE
        assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
        for panel in board["panels"]:
            assert panel["datasource"]["uid"] == "${datasource}", "of whoever imports it"
            place = panel["gridPos"]
            assert place["x"] + place["w"] <= 24
