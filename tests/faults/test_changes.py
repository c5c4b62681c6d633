"""A service is changed while 16 clients use it, also to versions that do not work. No client tries anything again.

VILA_CHANGES sets the number of changes (2: a good version, and a canary that crashes); with 20, which `make faults`
sets, five are to broken versions of all kinds, and a stream of 40 seconds survives an update.
"""

import asyncio
import itertools
import json
import multiprocessing
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil
import pytest
from PIL import Image as Pillow

from tests.faults import faulty_replica
from tests.faults.faulty_replica import CRASHES_AT, RIGHT, TOKEN_SECONDS
from vila_ops.artifacts.kinds import Checkpoint, ModelVersion
from vila_ops.config import Model, Resources, Service
from vila_ops.config.serve import Golden
from vila_ops.errors import NotReady
from vila_ops.model.assemble import assemble
from vila_ops.processes import ProcessId
from vila_ops.release.canary import promote, roll_back, start_canary
from vila_ops.serve import tracks
from vila_ops.serve.backends.local_process import LocalProcess, free_port
from vila_ops.serve.deploy import deploy, undeploy
from vila_ops.serve.router.state import ServiceState, Track
from vila_ops.serve.spec import Spec

pytestmark = pytest.mark.slow

CHANGES = int(os.environ.get("VILA_CHANGES", "2"))
LONG_SECONDS = 40 if CHANGES > 2 else 5
CLIENTS = 16
SHARE = 0.3
"""Of the conversations, which the canary answers."""
CUT_MARGIN = 3
"""Streams beyond the canary's share of all clients that a crash may cut, since the share is drawn."""
BROKEN = ("does not load", "crashes", "answers wrongly", "slow", "leaks")
HARD_SECONDS = 30.0
"""Within which a canary is taken back after a hard sign."""
PATIENCE = 1200.0
"""How long a replica may take to start, and an answer to end: a busy processor is no fault of a version."""


class FaultyProcesses(LocalProcess):
    """The real backend, whose replicas have an engine that a test writes.

    They are forks of one process that has imported everything, which takes most of the time of a start.
    """

    forks = multiprocessing.get_context("forkserver")
    forks.set_forkserver_preload([faulty_replica.__name__])

    def start(self, spec: Spec) -> Track:
        port = free_port("127.0.0.1", 0)
        arguments = (spec.model_dump_json(), "127.0.0.1", port, str(self.manager.log_of(spec)))
        forked = self.forks.Process(target=faulty_replica.serve, args=arguments)
        forked.start()
        assert forked.pid is not None
        process = ProcessId(forked.pid, psutil.Process(forked.pid).create_time())
        return Track(spec=spec, url=f"http://127.0.0.1:{port}", process=process)


@dataclass
class Seen:
    """What the clients saw."""

    whole: int = 0
    streams: int = 0
    failed: list[str] = field(default_factory=list)
    cut: list[str] = field(default_factory=list)
    """Streams with an error event."""
    answers: Counter[str] = field(default_factory=Counter)


class Clients:
    """Clients that ask one question after another, every second one by a stream."""

    def __init__(self, url: str) -> None:
        self.url, self.seen = f"{url}/v1/chat/completions", Seen()
        self._done, self._questions = threading.Event(), itertools.count()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))

    def __enter__(self) -> "Clients":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    async def _run(self) -> None:
        limits = httpx.Limits(max_connections=CLIENTS + 1)
        async with httpx.AsyncClient(timeout=PATIENCE, limits=limits, trust_env=False) as http:
            await asyncio.gather(*(self._ask_on(http) for _ in range(CLIENTS)))

    async def _ask_on(self, http: httpx.AsyncClient) -> None:
        while not self._done.is_set():
            number = next(self._questions)
            await self.ask(http, f"question {number}", tokens=8, stream=number % 2 == 0)
            await asyncio.sleep(0.3)

    async def ask(self, http: httpx.AsyncClient, question: str, *, tokens: int, stream: bool) -> None:
        """Ask once, and check the answer in every way that a client can."""
        messages = [{"role": "user", "content": question}]
        body = {"model": "tiny-vila", "messages": messages, "max_tokens": tokens, "stream": stream}
        try:
            response = await http.post(self.url, json=body)
        except httpx.HTTPError as error:
            self.seen.failed.append(f"{question}: {error!r}")
            return
        if response.status_code != 200:
            self.seen.failed.append(f"{question}: {response.status_code} {response.text}")
        elif not stream:
            choice = response.json()["choices"][0]
            assert choice["finish_reason"] == "length"
            self.seen.answers[choice["message"]["content"]] += 1
            self.seen.whole += 1
        else:
            self._check_stream(question, response.text)

    def _check_stream(self, question: str, text: str) -> None:
        events = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
        if events[-1] != "[DONE]":
            error = json.loads(events[-1]).get("error")
            (self.seen.cut if error else self.seen.failed).append(f"{question}: {events[-1]}")
            return
        chunks = [json.loads(event) for event in events[:-1]]
        assert chunks[-1]["choices"][0]["finish_reason"] == "length"
        said = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
        self.seen.answers[said] += 1
        self.seen.streams += 1


@contextmanager
def long_stream(url: str, *, seconds: float) -> Iterator[None]:
    """A stream that begins before the body and ends after it, whole."""
    tokens = int(seconds / TOKEN_SECONDS)
    client = Clients(url)
    with ExitStack() as stack:
        begun = threading.Event()

        async def one() -> None:
            async with httpx.AsyncClient(timeout=PATIENCE, trust_env=False) as http:
                begun.set()
                await client.ask(http, "a long question", tokens=tokens, stream=True)

        thread = threading.Thread(target=lambda: asyncio.run(one()))
        stack.callback(thread.join)
        thread.start()
        begun.wait()
        time.sleep(0.5)
        yield
    assert (client.seen.streams, client.seen.failed, client.seen.cut) == (1, [], [])


class Changes:
    """The changes of a service, numbered as they come."""

    def __init__(self, checkpoint: Checkpoint, service: Service, resources: Resources) -> None:
        self.checkpoint, self.service, self.resources = checkpoint, service, resources
        self.register = FaultyProcesses(service.name, resources).register
        self._numbers = itertools.count(1)

    def version(self, fault: str = "") -> ModelVersion:
        """A new version, with a fault."""
        checkpoint = self.checkpoint.with_changes({"stage": fault or "works"})
        return ModelVersion(name="tiny-vila", version=next(self._numbers), checkpoint=checkpoint, promoted=False)

    def good(self, kind: int) -> None:
        """Change to another version that works: by an update, by a canary and its promotion, or back."""
        if kind == 0:
            deploy(self.service, self.version(), self.resources)
        elif kind == 1:
            start_canary(self.service, self.version(), self.resources)
            time.sleep(2)
            promote(self.service, self.resources)
        else:
            roll_back(self.service, self.resources)

    def broken(self, fault: str) -> None:
        """Change to a version that does not work, and wait until the service has got rid of it."""
        version = self.version(fault)
        if fault in ("does not load", "answers wrongly"):
            with pytest.raises(NotReady):
                deploy(self.service, version, self.resources)
            return
        start_canary(self.service, version, self.resources)
        since, signed, canary = time.monotonic(), False, self.state().canary  # from its start where no sign is seen
        while self.state().canary is not None:
            if not signed and canary is not None and has_hard_sign(canary.track):
                since, signed = time.monotonic(), True
            time.sleep(0.1)
        rollback = self.state().rolled_back
        assert rollback is not None
        assert rollback.version == version.version
        if fault == "slow":
            assert rollback.reason.startswith("slower")
        else:
            assert time.monotonic() < since + HARD_SECONDS

    def state(self) -> ServiceState:
        return self.register.load()


def has_hard_sign(track: Track) -> bool:
    """Whether a replica has ended, or says that it is not ready any more."""
    try:
        return httpx.get(f"{track.url}/ready", timeout=30, trust_env=False).status_code != 200
    except httpx.TransportError:
        return True


@pytest.fixture
def changes(make_model: Callable[..., Model], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Changes]:
    """A service with a golden question, whose processes end with the test."""
    monkeypatch.setattr(tracks, "LocalProcess", FaultyProcesses)
    monkeypatch.setattr(tracks, "START_SECONDS", PATIENCE)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
    Pillow.new("RGB", (56, 56), "red").save(tmp_path / "red.png")
    golden = Golden(image=str(tmp_path / "red.png"), question="What is this?", answer="red circle")
    service = Service(name="changed", golden=golden, max_new_tokens=2000, request_timeout_seconds=PATIENCE)
    serve = {
        "serve.port": 0,
        "serve.max_memory_bytes": 1200 * 2**20,
        "serve.canary.share": SHARE,
        "serve.max_batch": 64,
    }
    resources = Resources(launch="inline").with_changes({"storage.store": str(tmp_path / "store"), **serve})
    sealed = assemble(make_model(seed=1), resources)
    checkpoint = Checkpoint(uri=sealed.uri, digest=sealed.digest, parents=sealed.parents, stage="works", step=1)
    yield Changes(checkpoint, service, resources)
    undeploy(service, resources)


def test_changes_under_load_lose_no_request_and_cut_no_stream_of_the_stable_version(changes: Changes) -> None:
    url = deploy(changes.service, changes.version(), changes.resources).url
    plan: list[str | int] = [0, "crashes"]
    if CHANGES > 2:
        good = [number % 3 for number in range(CHANGES - len(BROKEN))]
        plan = [*good]
        for place, fault in enumerate(BROKEN):
            plan.insert(2 + 3 * place, fault)
    with Clients(url) as clients:
        with long_stream(url, seconds=LONG_SECONDS):
            changes.good(0)
        for change in plan[1:]:
            changes.broken(change) if isinstance(change, str) else changes.good(change)
        time.sleep(2)
    seen = clients.seen
    assert not seen.failed
    assert len(seen.answers) == 1, "the version that answers wrongly never answered a client"
    assert next(iter(seen.answers)).startswith(RIGHT[:8])
    assert min(seen.whole, seen.streams) > CLIENTS
    crashed = sum(change == "crashes" for change in plan)
    assert len(seen.cut) <= crashed * (SHARE * CLIENTS + CUT_MARGIN), (
        "on a canary that crashes, its share of the clients"
    )
    wait_until_drained(changes)
    check_stable_that_crashes(changes, url)


def check_stable_that_crashes(changes: Changes, url: str) -> None:
    """A stable version that crashes is lost, until a rollback serves the former one."""
    former = changes.state().stable
    deploy(changes.service, changes.version("crashes"), changes.resources)
    crashing = changes.state().stable
    body = {"model": "tiny-vila", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}
    with httpx.Client(base_url=url, timeout=PATIENCE, trust_env=False) as http:

        def ask(**more: bool) -> httpx.Response:
            return http.post("/v1/chat/completions", json=body | more)

        for _ in range(2, CRASHES_AT):  # the first was the golden question
            assert ask().status_code == 200
        last = [line for line in ask(stream=True).text.splitlines() if line][-1]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "replica_lost"
        lost = ask()
        assert (lost.status_code, lost.json()["error"]["code"], lost.headers["retry-after"]) == (503, "no_replica", "1")
        assert changes.state().stable == crashing != former, "nobody took it back"
        roll_back(changes.service, changes.resources)
        assert ask().status_code == 200
    again = changes.state().stable
    assert former is not None
    assert again is not None
    assert again.spec == former.spec


def wait_until_drained(changes: Changes) -> None:
    """Every version but the stable one ends by itself."""
    deadline = time.monotonic() + PATIENCE
    while changes.state().retired:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    state = changes.state()
    assert state.tracks() == (state.stable,)
