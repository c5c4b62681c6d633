"""Metrics, files, tags and the status of a run: written to a local file first, then sent to MLflow by a thread.

FOLDER/RUN.TRACKER.TOKEN.jsonl   one line for each entry that MLflow has not acknowledged; locked while its writer lives

TRACKER is a hash of the tracking URI: another MLflow, on the same store, that does not have the run leaves the file.

So training neither waits for MLflow nor stops with it. What a full disk does not take waits in memory. Lines are sent
in order. A line whose answer was lost is sent again, which changes nothing: a metric's key in MLflow's store is run,
name, step, time and value. If a writer was killed, or MLflow did not answer at its end, the next writer in the same
folder sends the rest. A step that is done again after a kill has another time, so of what is logged by `log_once` only
the steps are sent that MLflow lacks.
"""

import base64
import fcntl
import json
import logging
import os
import secrets
import tempfile
import threading
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Literal, Self

from vila_ops.config import Resources, fingerprint
from vila_ops.config.secrets import without_logins
from vila_ops.tracking.system import SystemMetrics

SEND_SECONDS = 10.0
"""The longest time until a metric is sent while MLflow answers, and the interval of the machine's load."""
RETRY_SECONDS = 30.0
"""Time between two tries while MLflow does not answer."""
CLOSE_SECONDS = 15.0
"""How long the end of a run waits for MLflow."""
BATCH = 500
"""Metrics per call; the server's limit is 1000."""
CHECKSUM = "crc32"
"""Field of a line with the CRC-32 of the others."""
PIECE = 2**18
"""Bytes of the file that are read and sent at a time; more where a line has more."""
Status = Literal["FINISHED", "FAILED", "KILLED"]
"""How a run ended."""
Entry = dict[str, Any]
"""One of `metrics` and `once` ([name, value, milliseconds, step] each), `file` (a path), `content` (base64, and its
path among the run's artifacts), `tag` ([key, value]), `twins` ([tag, value]) and `status` (with milliseconds)."""
log = logging.getLogger(__name__)


class MetricLog:
    """The log of one run, in one process. Only `close` waits. Without a tracking URI or a run it does nothing."""

    def __init__(self, resources: Resources, run_id: str | None, *, system: SystemMetrics | None = None) -> None:
        """`system` is read every SEND_SECONDS and logged at the newest step."""
        self._uri, self._run_id, self._system = resources.tracking.uri or "", run_id or "", system
        self._folder = resources.storage.scratch() / "metrics"
        self._tracker = fingerprint(self._uri)[:8]
        self._step = 0
        self._away = self._full = False
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None
        if self._uri and run_id:
            self._spool = Spool.new(self._folder / f"{run_id}.{self._tracker}.{secrets.token_hex(4)}.jsonl")
            self._thread = threading.Thread(target=self._send_till_closed, name="mlflow", daemon=True)
            self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def log(self, values: dict[str, float], *, step: int) -> None:
        """Log values of one step."""
        self._step = step
        self._put({"metrics": _points(values, step)})

    def log_once(self, values: dict[str, float], *, step: int) -> None:
        """Log values of one step whose steps rise, unless an earlier attempt has told this step or a later one."""
        self._step = step
        self._put({"once": _points(values, step)})

    def attach(self, path: Path) -> None:
        """Attach a small file, which is read when it is sent. Weights stay in the store."""
        self._put({"file": str(path.resolve())})

    def put_files(self, contents: Mapping[str, bytes]) -> None:
        """Attach small files by their paths among the run's artifacts; one that is there is replaced."""
        for path, content in contents.items():
            self._put({"content": base64.b64encode(content).decode(), "path": path})

    def tag(self, key: str, value: str) -> None:
        """Set a tag of the run."""
        self._put({"tag": [key, value]})

    def end_twins(self, tag: str, value: str) -> None:
        """End the other runs with this tag as KILLED: nobody else was told of them."""
        self._put({"twins": [tag, value]})

    def end(self, status: Status) -> None:
        """Record that the run has ended."""
        self._put({"status": status, "at": _now()})

    def close(self) -> None:
        """Send the rest. Entries that MLflow does not take within CLOSE_SECONDS stay in the file, with a warning."""
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
                log.warning("entries for MLflow cannot be kept in %s, only in memory: %s", self._spool.path, error)
            self._full = True

    def _send_till_closed(self) -> None:
        """Send entries until `close`; runs in the thread."""
        if self._system is not None:
            self._system.read()  # utilisations are measured from this call on
        sent_left = closing = False
        while not closing:
            closing = self._closing.wait(RETRY_SECONDS if self._away else SEND_SECONDS)
            if self._system is not None:
                self._put({"metrics": _points(self._system.read(), self._step)})
            if not sent_left:  # first, because it is older: its status must not overwrite a newer one
                sent_left = self._send_left()
            self._send(self._spool, self._run_id)
        self._spool.close()

    def _send(self, spool: "Spool", run_id: str) -> bool:
        """Send the entries of a file; False where MLflow did not take all of them."""
        from mlflow.exceptions import MlflowException  # heavy

        try:
            for entries, lines in spool.pieces():
                deliver(self._uri, run_id, entries)
                spool.sent(lines)
        except (MlflowException, OSError) as error:
            if not self._away:
                log.warning(
                    "MLflow at %s does not answer; %s keeps the entries: %s", shown(self._uri), spool.path, shown(error)
                )
            self._away = True
            return False
        if self._away:
            log.warning("MLflow at %s answers again", shown(self._uri))
        self._away = False
        return True

    def _send_left(self) -> bool:
        """Send the files of writers that have ended, also to another tracking URI if MLflow has their run there.

        False where MLflow does not answer: the next file would wait as long, and waits for the next try instead.
        """
        for path in sorted(self._folder.glob("*.jsonl")):
            if (spool := Spool.left(path)) is not None:
                is_there = self._send_left_file(spool)
                spool.close()
                if is_there is None:
                    return False
        return True

    def _send_left_file(self, spool: "Spool") -> bool | None:
        """Send the file of a writer that has ended; returns whether MLflow has its run, as `_has` does."""
        path, run_id = spool.path, spool.path.name.partition(".")[0]
        is_own = f".{self._tracker}." in path.name
        if not is_own and not (is_there := self._has(run_id)):
            if is_there is False:
                log.debug("%s waits for another MLflow than %s", path, shown(self._uri))
            return is_there
        if self._send(spool, run_id):
            log.info("entries of %s were sent to MLflow", path)
            return True
        is_there = self._has(run_id)
        if is_there is False:
            refused = path.rename(path.with_suffix(".refused"))
            log.warning("MLflow at %s no longer has run %s; %s will not be sent", shown(self._uri), run_id, refused)
        return is_there

    def _has(self, run_id: str) -> bool | None:
        """Whether MLflow has a run that was not deleted; None where it does not answer that."""
        from mlflow.exceptions import MlflowException  # heavy

        client, _ = connect(self._uri)
        try:
            return bool(client.get_run(run_id).info.lifecycle_stage != "deleted")
        except MlflowException as error:
            return False if error.error_code == "RESOURCE_DOES_NOT_EXIST" else None
        except OSError:
            return None


class Spool:
    """A file of entries that wait to be sent, locked while it is open. What its disk does not take waits in memory."""

    def __init__(self, path: Path, file: BinaryIO | None) -> None:
        """`file`: None where the disk takes none."""
        self.path = path
        self._file = file
        self._end = 0 if file is None else os.fstat(file.fileno()).st_size
        self._sent = 0
        self._unwritten: list[bytes] = []
        """Lines that come after those of the file."""
        self._lock = threading.Lock()

    @classmethod
    def new(cls, path: Path) -> Self:
        """A new file. It gets its name when it is locked, so that no other writer takes it for an abandoned one."""
        draft = path.with_suffix(".draft")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = draft.open("x+b")
            fcntl.flock(file, fcntl.LOCK_EX)
            draft.rename(path)
        except OSError as error:  # such as the disk whose fault ended the run
            log.warning("entries for MLflow cannot be kept in %s, only in memory: %s", path, error)
            return cls(path, None)
        return cls(path, file)

    @classmethod
    def left(cls, path: Path) -> Self | None:
        """The file of a writer that has ended; None if the writer lives or the file is gone."""
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
        """Append an entry. Raises OSError, and then leaves the file as it was; the next `put` tries again.

        So the file has a first part of what was put, without a gap: no step that is told hides a lost one before it
        from the next attempt, see `MetricLog.log_once`.
        """
        line = json.dumps({**entry, CHECKSUM: _checksum(entry)}).encode() + b"\n"
        with self._lock:
            self._unwritten.append(line)
            if self._file is not None:
                self._write(self._file.fileno())

    def _write(self, file: int) -> None:
        text, written = b"".join(self._unwritten), 0
        try:
            while written < len(text):
                written += os.pwrite(file, text[written:], self._end + written)
        except OSError:
            os.ftruncate(file, self._end)
            raise
        self._end += len(text)
        self._unwritten.clear()

    def waits(self) -> bool:
        """Whether there is an entry that was not sent."""
        return self._sent < self._end or bool(self._unwritten)

    def pieces(self) -> Iterator[tuple[list[Entry], list[bytes]]]:
        """The waiting entries, about PIECE bytes at a time, with their lines. Call `sent` before the next piece."""
        while self.waits():
            with self._lock:
                lines = self._next_lines()
            yield [entry for line in lines if (entry := self._entry(line)) is not None], lines

    def _next_lines(self) -> list[bytes]:
        """The last one may be a part, which a killed writer left."""
        if self._file is None or self._sent == self._end:
            return list(self._unwritten)
        size = PIECE
        while True:
            text = os.pread(self._file.fileno(), size, self._sent)
            whole = text.rfind(b"\n") + 1
            if whole or len(text) < size:
                return text[: whole or len(text)].splitlines(keepends=True)
            size *= 2

    def _entry(self, line: bytes) -> Entry | None:
        """The entry of a line; None if it is damaged, or if a killed writer left a part of it."""
        try:
            entry: Entry = json.loads(line)
            if entry.pop(CHECKSUM, None) == _checksum(entry):
                return entry
        except (ValueError, AttributeError, TypeError):
            pass
        log.warning("a line of %s is not whole and is not sent to MLflow: %r", self.path, line[:80])
        return None

    def sent(self, lines: Sequence[bytes]) -> None:
        """Mark the next lines as sent. A file that is sent in full is emptied."""
        with self._lock:
            if self._file is None or self._sent == self._end:
                del self._unwritten[: len(lines)]
                return
            self._sent += sum(map(len, lines))
            if self._sent == self._end:
                os.ftruncate(self._file.fileno(), 0)
                self._sent = self._end = 0

    def close(self) -> None:
        """Close the file, and remove it if no entry waits in it."""
        if self._unwritten:
            log.warning("the last %d entries of %s are lost: it has none of them", len(self._unwritten), self.path)
        if self._file is not None:
            if self._sent == self._end:
                self.path.unlink(missing_ok=True)
            self._file.close()


def _checksum(entry: Entry) -> int:
    return zlib.crc32(json.dumps(entry).encode())


def deliver(tracking_uri: str, run_id: str, entries: list[Entry]) -> None:
    """Send entries of a run in their order, adjacent ones of a kind together. Raises MlflowException, OSError."""
    client, entities = connect(tracking_uri)
    for kind, group in groupby(entries, key=_kind):
        match kind:
            case "metrics" | "once":
                told = _last_steps(client, run_id) if kind == "once" else {}
                points = [one for entry in group for one in entry[kind] if one[3] > told.get(one[0], -1)]
                for start in range(0, len(points), BATCH):
                    batch = [entities.Metric(*one) for one in points[start : start + BATCH]]
                    client.log_batch(run_id, metrics=batch)
            case "content":
                with tempfile.TemporaryDirectory() as folder:
                    _write_contents(Path(folder), group)
                    client.log_artifacts(run_id, folder)
            case "tag":
                for entry in group:
                    client.set_tag(run_id, *entry["tag"])
            case "twins":
                for entry in group:
                    _end_twins(client, run_id, *entry["twins"])
            case "status":
                for entry in group:
                    client.set_terminated(run_id, entry["status"], entry["at"])
            case _:
                _send_files(client, run_id, group)


def _kind(entry: Entry) -> str:
    return next(kind for kind in ("metrics", "once", "content", "tag", "twins", "status", "file") if kind in entry)


def _last_steps(client: Any, run_id: str) -> dict[str, int]:
    """The last step of each metric that MLflow has of a run. The public properties of a run have the values alone."""
    return {metric.key: metric.step for metric in client.get_run(run_id).data.to_proto().metrics}


def _end_twins(client: Any, run_id: str, tag: str, value: str) -> None:
    experiment = client.get_run(run_id).info.experiment_id
    for run in client.search_runs([experiment], f"tags.{tag} = '{value}'"):
        if run.info.run_id != run_id and run.info.status == "RUNNING":
            client.set_terminated(run.info.run_id, "KILLED")


def _write_contents(folder: Path, entries: Iterable[Entry]) -> None:
    for entry in entries:
        path = folder / entry["path"]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(base64.b64decode(entry["content"]))


def _send_files(client: Any, run_id: str, entries: Iterable[Entry]) -> None:
    for entry in entries:
        if os.path.exists(entry["file"]):
            client.log_artifact(run_id, entry["file"])
        else:
            log.warning("%s no longer exists and is not sent to MLflow", entry["file"])


def connect(tracking_uri: str) -> tuple[Any, Any]:
    """MLflow's client and entities.

    A call to a server that is away fails within seconds, and within six minutes where it takes the call and hangs.
    """
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # we print artifact references there
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    from mlflow import MlflowClient, entities

    return MlflowClient(tracking_uri), entities


def shown(text: object) -> str:
    """A text without the user names and passwords of its URLs."""
    return without_logins(str(text))


def _points(values: Mapping[str, float], step: int) -> list[list[Any]]:
    return [[name, float(value), _now(), step] for name, value in values.items()]


def _now() -> int:
    return int(time.time() * 1000)
