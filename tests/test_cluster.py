"""A cluster that is not there is told at once, and may be there at the next try."""

import signal
import socket
import subprocess
import sys
from collections.abc import Callable

import pytest

from tests.ray_head import ray_head
from vila_ops.cluster import connect, passed_on
from vila_ops.config import Resources
from vila_ops.errors import ClusterUnreachable, is_final


def test_an_address_where_nothing_listens_is_unreachable_at_once() -> None:
    with socket.socket() as holder:  # bound, and not listening: nobody else gets the port meanwhile
        holder.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{holder.getsockname()[1]}"
        with pytest.raises(ClusterUnreachable, match=f"no Ray cluster accepts a connection at {address}") as raised:
            connect(Resources(launch="ray", ray_address=address))
    assert not is_final(raised.value)


def test_a_host_without_an_address_is_unreachable() -> None:
    with pytest.raises(ClusterUnreachable, match=r"at head\.invalid:6379"):
        connect(Resources(launch="ray", ray_address="head.invalid:6379"))


@pytest.mark.parametrize("address", ["127.0.0.1", ":6379", "auto", "head:port"])
def test_an_address_is_a_host_and_a_port(address: str) -> None:
    with pytest.raises(ValueError, match="is not host:port") as raised:
        connect(Resources(launch="ray", ray_address=address))
    assert is_final(raised.value)


def test_a_password_in_a_url_is_not_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "https://collector:4318")
    assert passed_on()["OTEL_EXPORTER_OTLP_ENDPOINT"] == "https://collector:4318"
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "https://me:secret@collector:4318")
    with pytest.raises(ValueError, match="OTEL_EXPORTER_OTLP_ENDPOINT has a password in its URL") as raised:
        passed_on()
    assert "secret" not in str(raised.value)


@pytest.mark.ray
@pytest.mark.slow
def test_connecting_keeps_what_this_process_does_when_it_is_told_to_end(ray_cluster: str) -> None:
    """Ray would raise SystemExit in a flow run that was cancelled, whose job on the cluster then goes on."""
    told = []
    before = signal.signal(signal.SIGTERM, lambda number, _: told.append(number))
    try:
        connect(Resources(launch="ray", ray_address=ray_cluster))
        signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert told == [signal.SIGTERM]


@pytest.mark.ray
@pytest.mark.slow
def test_a_process_ends_with_its_node(free_ports: Callable[[int], list[int]]) -> None:
    """A new head that is there before Ray notices refuses what the process asks, which it would ask for ever."""
    driver = "import sys, time; from vila_ops.cluster import connect; from vila_ops.config import Resources; "
    driver += (
        "connect(Resources(launch='ray', ray_address=sys.argv[1])); print('connected', flush=True); time.sleep(3600)"
    )
    with ray_head(free_ports) as (address, head):
        process = subprocess.Popen(
            [sys.executable, "-c", driver, address], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        assert process.stdout.readline() == b"connected\n"
        (raylet,) = (one for one in head.children(recursive=True) if one.name() == "raylet")
        raylet.kill()
        _, told = process.communicate(timeout=300)
    assert b"the Ray node of this process has ended" in told
    assert process.returncode != 0
