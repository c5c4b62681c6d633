"""One set of servers, the demo on them, and what people are told; `ORDER` has the servers end last."""

import json
import os
import subprocess
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.flows.demo_command import CANARY, SECRETS, command
from tests.flows.flow_runs import ROOT, Json, automations, until, written
from vila_ops import local
from vila_ops.config.local import LocalServers

ORDER = ("test_run", "test_deployments", "test_outages", "test_servers")
"""Of the files: what a run left is read first, then servers are killed, and in the end they are taken down."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put these files behind all others, in their order; tests/conftest.py then says when they run."""
    here = Path(__file__).parent
    items.sort(key=lambda item: ORDER.index(item.path.stem) if item.path.parent == here else -1)


@pytest.fixture(scope="package")
def servers(tmp_path_factory: pytest.TempPathFactory, free_servers: Callable[[Path], LocalServers]) -> Iterator[Json]:
    """Servers of these tests' own, and the files that name them. Prefect looks at its schedules every few seconds."""
    folder = tmp_path_factory.mktemp("box")
    settings = free_servers(folder / "local").with_changes({"max_flow_runs": 3})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFECT_SERVER_SERVICES_SCHEDULER_LOOP_SECONDS", "5")
        yield written(folder, settings)
        local.down(settings)


@pytest.fixture(scope="package")
def demo(servers: Json) -> Callable[..., Json]:
    def run(*overrides: str) -> Json:
        folder = servers["folder"]
        done = subprocess.run(
            command(servers, *overrides), cwd=ROOT, env={**os.environ, **SECRETS}, capture_output=True, text=True,
            timeout=1200, check=False,
        )  # fmt: skip
        assert CANARY not in done.stdout + done.stderr
        log = folder / "local/logs/worker.log"
        assert done.returncode == 0, done.stdout + done.stderr + (log.read_text()[-4000:] if log.exists() else "")
        summary: Json = json.loads((folder / "store/tiny/summary.json").read_text())
        return summary

    return run


@pytest.fixture(scope="package")
def first(demo: Callable[..., Json]) -> Json:
    return demo()


@pytest.fixture(scope="package")
def told(first: Json, servers: Json) -> Iterator[list[str]]:
    """What people are told, by a block of Prefect that calls a server of these tests."""
    texts: list[str] = []

    class Inbox(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            texts.append(self.rfile.read(int(self.headers["Content-Length"])).decode())
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            """Say nothing."""

    from prefect.blocks.notifications import CustomWebhookNotificationBlock
    from prefect.settings import temporary_settings

    with ThreadingHTTPServer(("127.0.0.1", 0), Inbox) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with temporary_settings({"PREFECT_API_URL": f"{servers['at'].prefect}/api"}):
            url = f"http://127.0.0.1:{server.server_port}"
            data = {"subject": "{{subject}}", "body": "{{body}}"}
            CustomWebhookNotificationBlock(name="test", url=url, json_data=data).save("vila-ops")
        until(lambda: len(automations(servers)) == 4)
        yield texts
        server.shutdown()
