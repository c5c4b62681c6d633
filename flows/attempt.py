"""One attempt at a flow run: it is refused where it cannot run, others see by a lease that it lives, and it ends by
itself when someone cancels it.

Prefect lets the worker end what is cancelled, so nothing would end it where the worker is dead.
"""

import gc
import logging
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from types import FrameType
from typing import Self, TypeVar
from uuid import UUID

import httpx
import mlflow.tracking.request_header.registry  # noqa: F401 each run asks MLflow; this takes no time of a run's own
import pyarrow.dataset  # noqa: F401 by which each run reads indices
from prefect import get_client, runtime
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.objects import State
from prefect.context import FlowRunContext
from prefect.exceptions import PrefectException, TerminationSignal
from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, temporary_settings
from prefect.states import Cancelled

from flows.events import telling_of_promotions
from vila_ops import doctor, logs, tracing
from vila_ops.artifacts import leases
from vila_ops.artifacts.progress import Reporter
from vila_ops.artifacts.store import root_of
from vila_ops.config import Recipe, Resources, Run, run_of
from vila_ops.config.base import build_schemas
from vila_ops.errors import Preempted
from vila_ops.pipeline.explain import Step, works
from vila_ops.pipeline.sweeper import ATTEMPT, JOB, JOB_SERVER, LABEL, lease_of
from vila_ops.train.stage import FollowedJob

POLL_SECONDS = 3.0
STOP_SECONDS = 12.0
"""How long a cancelled attempt may take to end by itself before it is killed."""
ANSWER_SECONDS = 8.0
"""How long an attempt that is ended asks why: a job on a cluster is stopped only where its flow run was cancelled."""
RETRY_SECONDS = 0.5
AGAIN_SECONDS = 1.0
R = TypeVar("R")
log = logging.getLogger(__name__)
build_schemas()  # a run uses most of them


def checked_run(recipe: str | Recipe, resources: str | Resources, overrides: tuple[str, ...]) -> Run:
    """The run that the parameters of a flow ask for. Raises ValueError where what it needs is not there."""
    gc.freeze()  # what was imported stays; looking through it again took a fifth of the CPU of an unchanged run
    run = run_of(recipe, resources, overrides)
    logging.getLogger("vila_ops").setLevel(logging.INFO)  # Prefect gives the logger handlers, but no level
    logs.adopt()
    doctor.refuse(run, doctor.services(run.resources))
    return run


def check_work(run: Run, steps: Iterable[Step], *, serves: bool) -> None:
    """Raise ValueError where a task will work, and its device, its cluster or the engine that serves is not there.

    A run that finds everything sealed needs none, and where it starts a model without its engine, `deploy` says so.
    """
    if works(steps):
        served = doctor.serving(run.resources) if serves else ()
        doctor.refuse(run, (*doctor.device_findings(run.resources), *served))


def attempt(run: Run, work: Callable[[], R]) -> R | State[None]:
    """Work while this flow run holds its lease in the store; the state Cancelled where it was cancelled meanwhile.

    Outside of a flow run it works alone. For Prefect a preempted machine is a crash, after which another process goes
    on.
    """
    context, store = FlowRunContext.get(), run.resources.storage.store
    if context is None or context.flow_run is None:
        return work()
    flow_run, name = context.flow_run, f"{runtime.flow_run.flow_name} {run.recipe.name}"
    threading.Thread(target=_outlive_the_worker, name="standard streams", daemon=True).start()
    with _terminated_once(), _CancelWatchdog(flow_run.id) as watchdog:
        try:
            with leases.hold(lease_of(str(flow_run.id)), store=store) as lease:
                lease.report = Reporter("flow", name)
                with get_client(sync_client=True) as client:
                    client.update_flow_run_labels(flow_run.id, {LABEL: root_of(store), ATTEMPT: str(flow_run.state_id)})
                with telling_of_promotions(run), tracing.work("flow", name, flow_run=str(flow_run.id)):
                    return work()
        except (TerminationSignal, Preempted) as error:
            if not watchdog.cancelled:
                raise TerminationSignal(signal.SIGTERM) from error
    return Cancelled(message="It was cancelled and has ended. Run it again: what was finished is kept.")


def cancelled() -> bool:
    """Whether someone has cancelled this flow run; False where Prefect does not answer within ANSWER_SECONDS."""
    if (flow_run := runtime.flow_run.id) is None:
        return False
    if (watchdog := _watching.get()) is not None and watchdog.cancelled:
        return True
    answer, until = None, time.monotonic() + ANSWER_SECONDS
    with _asking() as client:
        while answer is None and time.monotonic() < until:
            answer = _is_cancelled(client, UUID(flow_run))
            if answer is None:
                time.sleep(RETRY_SECONDS)
    if answer is None:
        log.warning("Prefect did not say within %.0f s whether this flow run was cancelled", ANSWER_SECONDS)
    return bool(answer)


def follow(job: FollowedJob) -> None:
    """Name the job that this flow run follows in its labels: where its process is dead, the sweeper stops the job."""
    if (flow_run := runtime.flow_run.id) is not None:
        with get_client(sync_client=True) as client:
            client.update_flow_run_labels(UUID(flow_run), {JOB: job.key, JOB_SERVER: job.server})


def _outlive_the_worker() -> None:
    """Drop what is written to standard streams that nobody reads any more.

    They are pipes to the worker. Where it was killed, the next line of a log would end this process by SystemExit, as
    rich does for a broken pipe.
    """
    unread = select.poll()
    for stream in (1, 2):
        unread.register(stream, 0)  # of a pipe's end, an error is told in any case
    for _ in (1, 2):
        for stream, _event in unread.poll():
            unread.unregister(stream)
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream)


@contextmanager
def _terminated_once() -> Iterator[None]:
    """Let SIGTERM interrupt the body once: worker and watchdog may both send one, and clean-up takes time.

    What the handler raises is lost where Python has nowhere to raise it, such as in a destructor. Raised in the import
    system, it may leave the lock of all imports held for ever. So the signal comes again until its exception is there.
    """
    raises = signal.getsignal(signal.SIGTERM)
    if threading.current_thread() is not threading.main_thread() or not callable(raises):
        yield
        return
    told, ended, raised = list[int](), threading.Event(), list[BaseException]()

    def once(number: int, frame: FrameType | None) -> None:
        told.append(number)
        if _is_handled(raised) or _imports(frame):
            return
        try:
            raises(number, frame)
        except BaseException as error:
            raised.append(error)
            raise

    def again() -> None:
        while not ended.wait(AGAIN_SECONDS):
            if told:
                os.kill(os.getpid(), signal.SIGTERM)

    signal.signal(signal.SIGTERM, once)
    threading.Thread(target=again, name="termination", daemon=True).start()
    try:
        yield
    finally:
        ended.set()
        if signal.getsignal(signal.SIGTERM) is once:
            signal.signal(signal.SIGTERM, raises if not told else lambda *_: None)


def _is_handled(raised: Sequence[BaseException]) -> bool:
    """Whether this thread is in the clean-up after one of these exceptions."""
    error = sys.exception()
    while error is not None and error not in raised:
        error = error.__context__
    return error is not None


def _imports(frame: FrameType | None) -> bool:
    """Whether a frame is one of the import system's own, which hold locks."""
    return frame is not None and frame.f_code.co_filename.startswith("<frozen importlib")


class _CancelWatchdog:
    """A thread that asks Prefect whether a flow run was cancelled, and then interrupts the main thread."""

    def __init__(self, flow_run: UUID) -> None:
        self.cancelled = False
        self._flow_run, self._done = flow_run, threading.Event()

    def __enter__(self) -> Self:
        self._token = _watching.set(self)
        threading.Thread(target=self._run, name="cancellation", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        _watching.reset(self._token)

    def _run(self) -> None:
        if self._done.wait(POLL_SECONDS):  # an unchanged run needs no client
            return
        with _asking() as client:
            while not _is_cancelled(client, self._flow_run):
                if self._done.wait(POLL_SECONDS):
                    return
        self.cancelled = True
        log.warning("this flow run was cancelled and ends; what was finished is kept")
        os.kill(os.getpid(), signal.SIGTERM)  # Prefect turns it into an exception in the main thread
        if not self._done.wait(STOP_SECONDS):
            os.kill(os.getpid(), signal.SIGKILL)  # the sweeper tells Prefect


_watching: ContextVar[_CancelWatchdog | None] = ContextVar("watching", default=None)
"""The watchdog of the present attempt."""


@contextmanager
def _asking() -> Iterator[SyncPrefectClient]:
    """A client of Prefect, with its credentials, that asks once: while Prefect is away, work goes on."""
    seconds = {"timeout": POLL_SECONDS}
    with (
        temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}),
        get_client(sync_client=True, httpx_settings=seconds) as client,
    ):
        yield client


def _is_cancelled(client: SyncPrefectClient, flow_run: UUID) -> bool | None:
    """Whether Prefect says that a flow run was cancelled; None where it says nothing."""
    try:
        state = client.read_flow_run(flow_run).state
    except (httpx.HTTPError, PrefectException, ValueError):  # away or busy, or another program answers in its place
        return None
    return state is not None and (state.is_cancelling() or state.is_cancelled())
