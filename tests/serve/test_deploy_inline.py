"""Deploy inline keeps a process that serves the spec, replaces one that differs, and names who holds the port."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import openai
import psutil
import pytest
import torch

from tests.serve.app.live import wait_until
from tests.serve.commands import tiny_run
from vila_ops.artifacts.kinds import Checkpoint, ModelVersion
from vila_ops.artifacts.store import content
from vila_ops.config import Resources, Service
from vila_ops.device import describe, device_of
from vila_ops.errors import CorruptArtifact, NotReady
from vila_ops.pipeline.promotion import deploy_champion
from vila_ops.serve import tracks
from vila_ops.serve.backends.local_process import LocalProcess
from vila_ops.serve.deploy import deploy, undeploy

SERVICE = Service(name="tiny-inline", max_new_tokens=8)

Versions = tuple[ModelVersion, ModelVersion]


@pytest.fixture
def resources(tmp_path: Path) -> Iterator[Resources]:
    """A store of this test; the service ends with the test."""
    resources = Resources(launch="inline").with_changes({"storage.store": str(tmp_path / "store"), "serve.port": 0})
    yield resources
    undeploy(SERVICE, resources)


def ended(pid: int) -> bool:
    """Whether the process has ended; a zombie, which only this process can reap, has."""
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def pid_of(url: str) -> int:
    """The process that answers."""
    return int(httpx.get(f"{url}/health").json()["replica"]["pid"])


@pytest.mark.skipif(torch.accelerator.is_available(), reason="is about machines without a GPU")
def test_a_device_that_is_not_there_is_refused_before_anything_changes(
    resources: Resources, versions: Versions
) -> None:
    for settings in ({"device": "cuda"}, {"device": "cpu", "serve.device": "cuda"}):
        with pytest.raises(ValueError, match=r"device is cuda, but torch .* of this process .*; or set device to cpu"):
            deploy(SERVICE, versions[0], resources.with_changes(settings))
    assert not list(Path(resources.storage.store).glob("serve/*.json"))


def test_an_engine_that_is_not_installed_is_refused_before_a_process_starts(
    resources: Resources, versions: Versions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vila_ops.generate.load.find_spec", lambda _: None)
    asking = resources.with_changes({"serve.engine": {"kind": "vllm"}})
    refused = r"the engine vllm needs vLLM, which is not installed in .*docs/serving\.md"
    with pytest.raises(ValueError, match=refused):
        deploy_champion(tiny_run(SERVICE, asking))  # before it trains
    assert not Path(resources.storage.store).exists()
    with pytest.raises(ValueError, match=refused):
        deploy(SERVICE, versions[0], asking)
    assert not list(Path(resources.storage.store).rglob("*.log"))
    assert not LocalProcess(SERVICE.name, resources).register.load().tracks()


@pytest.mark.slow
def test_a_server_outlives_its_deployer_is_adopted_replaced_and_started_again(
    resources: Resources, versions: Versions, deploy_elsewhere: Callable[..., str]
) -> None:
    url = deploy_elsewhere(SERVICE, versions[0], resources)
    pid = pid_of(url)
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    answer = client.chat.completions.create(model="tiny-vila", messages=[{"role": "user", "content": "Hello"}])
    assert answer.system_fingerprint == versions[0].checkpoint.digest
    health = httpx.get(f"{url}/health").json()
    assert health["replica"]["digest"] == health["model"] == versions[0].checkpoint.digest
    assert "torch" in health["replica"]["versions"]
    assert health["replica"]["device"] == describe(device_of("auto"))

    demoted = ModelVersion(**{**versions[0].model_dump(), "promoted": False})
    adopted = deploy(SERVICE, demoted, resources)
    assert (adopted.url, adopted.model, adopted.version) == (url, versions[0].checkpoint.digest, 1)
    assert pid_of(url) == pid

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tracks, "START_SECONDS", 0.0)
        with pytest.raises(NotReady, match="It has not failed and may still load: run the same command again"):
            deploy(SERVICE, versions[1], resources)
    loading = LocalProcess(SERVICE.name, resources).register.load().starting
    assert loading is not None
    second = deploy(SERVICE, versions[1], resources)
    stable = LocalProcess(SERVICE.name, resources).register.load().stable
    assert stable == loading, "it was waited for, not started again"
    assert second.model == versions[1].checkpoint.digest
    assert second.url == url
    replaced = pid_of(url)
    assert replaced != pid
    wait_until(lambda: ended(pid))

    os.kill(replaced, signal.SIGKILL)
    while not ended(replaced):
        time.sleep(0.05)
    response = httpx.get(f"{url}/v1/models")
    assert (response.status_code, response.json()["error"]["code"]) == (503, "no_replica")
    again = deploy(SERVICE, versions[1], resources)
    assert again.url == url
    health = httpx.get(f"{again.url}/health").json()
    assert health["model"] == versions[1].checkpoint.digest
    assert health["replica"]["pid"] != replaced

    undeploy(SERVICE, resources)
    undeploy(SERVICE, resources)
    assert ended(health["replica"]["pid"])


@pytest.mark.slow
def test_a_server_keeps_no_temporary_files(
    resources: Resources, versions: Versions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    deploy(SERVICE, versions[0], resources)
    undeploy(SERVICE, resources)
    assert list((tmp_path / "tmp").iterdir()) == []


def test_a_port_that_another_process_holds_is_an_error_that_names_it(resources: Resources, versions: Versions) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        taken = resources.with_changes({"serve.port": port})
        with pytest.raises(ValueError, match=f"port {port} of 127.0.0.1 .* process {os.getpid()} listens there"):
            deploy(SERVICE, versions[0], taken)


def test_damaged_weights_are_refused_before_anything_is_touched(
    resources: Resources, versions: Versions, tmp_path: Path
) -> None:
    good = versions[0].checkpoint
    source = Path(good.uri)
    copied = tmp_path / "copy"
    subprocess.run(["cp", "-r", source, copied], check=True)
    bad = Checkpoint(**{**good.model_dump(), "uri": str(copied)})
    (content(bad) / "config.json").write_text("{}")
    with pytest.raises(CorruptArtifact):
        deploy(SERVICE, ModelVersion(**{**versions[0].model_dump(), "checkpoint": bad}), resources)
    assert not list(Path(resources.storage.store).rglob("*.json"))


def test_the_log_of_a_server_that_dies_at_its_start_is_in_the_error(
    resources: Resources, versions: Versions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho no memory left >&2\nexit 3\n")
    python.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(NotReady, match=r"process \d+ ended\nno memory left"):
        deploy(SERVICE, versions[0], resources)


def test_a_service_name_that_is_no_file_name_is_refused(resources: Resources, versions: Versions) -> None:
    with pytest.raises(ValueError, match="names files"):
        deploy(Service(name="../up"), versions[0], resources)
