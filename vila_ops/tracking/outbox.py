"""What MLflow is told of a run once it has one: written to a file first, and sent by a thread while MLflow answers.

FOLDER/RUN.TOKEN.jsonl   a line for each thing that MLflow has not said it has; locked while its writer lives

So training neither waits for MLflow nor stops with it. Lines are sent in order. One whose answer was lost is sent
again, which changes nothing: a metric's key in MLflow's store is run, name, step, time and value. What a writer left,
because it was killed or MLflow was away at its end, is sent by the next one that writes into the same folder.
"""

import fcntl
import json
import logging
import os
import re
import secrets
import threading
import time
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

from vila_ops.config import Resources
from vila_ops.tracking.system import SystemMetrics

SEND_SECONDS = 10.0
"""How long a metric waits at most while MLflow answers, and how often the machine's load is read."""
RETRY_SECONDS = 30.0
"""Between two tries while it does not."""
CLOSE_SECONDS = 15.0
"""How long the end of a run waits for MLflow."""
BATCH = 500
"""Metrics of one call; the server takes 1000."""
PIECE = 2**18
"""Bytes of the file that are sent before the next are read."""
Entry = dict[str, Any]
"""One of `metrics` ([name, value, milliseconds, step] each), `file` (a path) and `status` (with milliseconds)."""
log = logging.getLogger(__name__)


class MetricLog:
    """Of one run, in one process. No call of it waits, but `close`. Without a tracking URI or a run it does nothing."""

    def __init__(self, resources: Resources, run_id: str | None, *, system: SystemMetrics | None = None) -> None:
        """`system` is read every SEND_SECONDS and logged at the newest step."""
        self._uri, self._run_id, self._system = resources.tracking.uri or "", run_id or "", system
        self._folder = resources.storage.scratch() / "metrics"
        self._step = 0
        self._away = self._full = False
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None
        if self._uri and run_id:
            self._spool = Spool.new(self._folder / f"{run_id}.{secrets.token_hex(4)}.jsonl")
            self._thread = threading.Thread(target=self._send_till_closed, name="mlflow", daemon=True)
            self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def log(self, values: dict[str, float], *, step: int) -> None:
        """Numbers of one step."""
        self._step = step
        self._put({"metrics": [[name, float(value), _now(), step] for name, value in values.items()]})

    def attach(self, path: Path) -> None:
        """A small file, read when it is sent; never weights, which stay in the store."""
        self._put({"file": str(path.resolve())})

    def end(self, *, failed: bool) -> None:
        """The run is over."""
        self._put({"status": "FAILED" if failed else "FINISHED", "at": _now()})

    def close(self) -> None:
        """Send what waits; what MLflow does not take within CLOSE_SECONDS stays in the file, and a warning tells."""
        if self._thread is None:
            return
        self._closing.set()
        self._thread.join(CLOSE_SECONDS)
        if self._spool.path.exists():
            log.warning(
                "MLflow at %s has not taken all of run %s; %s keeps the rest, and the next run that logs from %s "
                "sends it", shown(self._uri), self._run_id, self._spool.path, self._folder,
            )  # fmt: skip

    def _put(self, entry: Entry) -> None:
        if self._thread is None:
            return
        try:
            self._spool.put(entry)
        except OSError as error:
            if not self._full:
                log.warning("what MLflow is told cannot be kept in %s and is lost: %s", self._spool.path, error)
            self._full = True

    def _send_till_closed(self) -> None:
        """The thread."""
        if self._system is not None:
            self._system.read()  # utilisations count from here
        sent_left = closing = False
        while not closing:
            closing = self._closing.wait(RETRY_SECONDS if self._away else SEND_SECONDS)
            if self._system is not None:
                self._put({"metrics": [[n, v, _now(), self._step] for n, v in self._system.read().items()]})
            if not sent_left:  # first, as it is older: an end that is late must not follow a newer one
                self._send_left()
            sent_left |= self._send(self._spool, self._run_id)
        self._spool.close()

    def _send(self, spool: "Spool", run_id: str) -> bool:
        """Send what waits in a file; False where MLflow did not take all of it."""
        from mlflow.exceptions import MlflowException  # heavy

        try:
            for entries, size in spool.pieces():
                deliver(self._uri, run_id, entries)
                spool.sent(size)
        except (MlflowException, OSError) as error:
            if not self._away:
                log.warning("MLflow at %s takes nothing; %s keeps it: %s", shown(self._uri), spool.path, shown(error))
            self._away = True
            return False
        if self._away:
            log.warning("MLflow at %s answers again", shown(self._uri))
        self._away = False
        return True

    def _send_left(self) -> None:
        """Send what writers left that are no more."""
        for path in sorted(self._folder.glob("*.jsonl")):
            if (spool := Spool.left(path)) is not None:
                run_id = path.name.partition(".")[0]
                if self._send(spool, run_id):
                    log.info("MLflow was sent what %s kept", path)
                elif self._has_no(run_id):
                    refused = path.rename(path.with_suffix(".refused"))
                    log.warning(
                        "MLflow at %s has no run %s any more; %s is not tried again", shown(self._uri), run_id, refused
                    )
                spool.close()

    def _has_no(self, run_id: str) -> bool:
        """Whether MLflow answers that a run is not there, or was deleted."""
        from mlflow.exceptions import MlflowException  # heavy

        client, _ = connect(self._uri)
        try:
            return bool(client.get_run(run_id).info.lifecycle_stage == "deleted")
        except MlflowException as error:
            return bool(error.error_code == "RESOURCE_DOES_NOT_EXIST")
        except OSError:
            return False


class Spool:
    """Lines that wait in a file, which is locked while this is open."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path = path
        self._file = file
        self._end = os.fstat(file.fileno()).st_size
        self._sent = 0
        self._lock = threading.Lock()

    @classmethod
    def new(cls, path: Path) -> Self:
        """An empty file; it has its name only once it is locked, lest another takes it for one that was left."""
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(".draft")
        file = draft.open("x+b")
        fcntl.flock(file, fcntl.LOCK_EX)
        draft.rename(path)
        return cls(path, file)

    @classmethod
    def left(cls, path: Path) -> Self | None:
        """One whose writer is no more; None where it lives, or where another has sent the file."""
        try:
            file = path.open("r+b")
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return None
        return cls(path, file)

    def put(self, entry: Entry) -> None:
        """Add a line. Raises OSError, and then the file is as before."""
        line = json.dumps(entry).encode() + b"\n"
        with self._lock:
            self._file.seek(self._end)
            try:
                self._file.write(line)
                self._file.flush()
            except OSError:
                os.ftruncate(self._file.fileno(), self._end)
                raise
            self._end += len(line)

    def waits(self) -> bool:
        """Whether there is a line that was not sent."""
        return self._sent < self._end

    def pieces(self) -> Iterator[tuple[list[Entry], int]]:
        """What waits, some lines at a time with their size; the next ones once these were `sent`."""
        while self.waits():
            with self._lock:
                self._file.seek(self._sent)
                lines = self._file.readlines(PIECE)
            whole = [line for line in lines if line.endswith(b"\n")]  # a killed writer may leave the start of a line
            yield [json.loads(line) for line in whole], sum(map(len, lines))

    def sent(self, size: int) -> None:
        """So many bytes more are done with; a file of which all is sent is emptied."""
        with self._lock:
            self._sent += size
            if self._sent == self._end:
                self._file.seek(0)
                self._file.truncate()
                self._sent = self._end = 0

    def close(self) -> None:
        """Give up the file, and remove it where nothing waits in it."""
        if not self.waits():
            self.path.unlink(missing_ok=True)
        self._file.close()


def deliver(tracking_uri: str, run_id: str, entries: list[Entry]) -> None:
    """Tell MLflow of a run in this order, the metrics of neighbours together. Raises MlflowException, OSError."""
    client, entities = connect(tracking_uri)
    for is_metrics, group in groupby(entries, key=lambda entry: "metrics" in entry):
        if is_metrics:
            metrics = [entities.Metric(*one) for entry in group for one in entry["metrics"]]
            for start in range(0, len(metrics), BATCH):
                client.log_batch(run_id, metrics=metrics[start : start + BATCH])
            continue
        for entry in group:
            if "status" in entry:
                client.set_terminated(run_id, entry["status"], entry["at"])
            elif os.path.exists(entry["file"]):
                client.log_artifact(run_id, entry["file"])
            else:
                log.warning("%s is no more, and MLflow does not get it", entry["file"])


def connect(tracking_uri: str) -> tuple[Any, Any]:
    """MLflow's client and entities. A call fails some seconds after a server does not answer, not minutes."""
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # standard output is for our handles
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    from mlflow import MlflowClient, entities

    return MlflowClient(tracking_uri), entities


def shown(text: object) -> str:
    """A text with the users and passwords taken out of its addresses."""
    return re.sub(r"//[^/@\s]*@", "//", str(text))


def _now() -> int:
    return int(time.time() * 1000)
